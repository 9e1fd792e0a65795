"""The ways of asking a judge, as data.

protocol   what a protocol is
registry   the list of them, and the one that `judge.protocol` names
files      a user's own: a YAML file
templates  fills a prompt template, in one pass
"""
