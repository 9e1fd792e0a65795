"""`otpo board`: a leaderboard that is kept in a folder.

state       board.yaml: what the board is judged by, its models and what was imported
kept        the folder, as it lies there
making      a new board, and what its folder takes over
keeping     adds, removes, judges and judges again; everything is made from board.yaml, the outputs and the store
mixing      what would mix two judges is refused
importing   figures of other people
pages       leaderboard and pages of all that, and nothing of what is gone
"""
