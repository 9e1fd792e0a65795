"""Figures that only a judge gives, which a sweep may optimise and a training may choose its best step by."""

LENGTHS = ("avg_length", "length_ratio")
JUDGED = ("win_rate", "discrete_win_rate", "length_adjusted_winrate", "length_controlled_winrate")
