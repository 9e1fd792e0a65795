"""Statistics of verdicts: win rates, intervals, paired differences, length control, verbosity."""
