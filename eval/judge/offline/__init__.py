"""Judging without a call now: questions go into a batch file, replies come from one, or only their price is asked.

Each is an `Answer` of `eval.judge.client`: it takes the endpoint's place.
"""
