"""Figures of other people, to stand beside a board's own: AlpacaEval's leaderboard, lm-evaluation-harness's results."""
