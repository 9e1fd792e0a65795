"""Several judges in one: `members` of a panel, and `combine`, their verdicts together."""
