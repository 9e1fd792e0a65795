"""Statistics of verdicts: win rates, intervals, paired differences, rank groups, length control, verbosity."""
