"""The board: the leaderboard and the pages.

leaderboard       one row a model and task, from verdicts and outputs
standings         the models against each other: ranks, groups, paired differences
terminal          the leaderboard in a terminal
run_files         reads the folders that a report is about
report            report.html: all sections; sentences, judges, figures, curves and examples are its parts
weights_page      token weights of pairs; effective_tokens says when they are nearly uniform
pages             renders the files of `templates/`; numbers formats what they show
"""
