"""How a judge is asked.

address    of its endpoint, the key, whose certificates are trusted
refusals   what an endpoint that refuses means
streams    replies that come in pieces
questions  a question and what came of it
forms      in which a verdict is asked for
ways       the ways of asking, as fields of the request
probe      which way an endpoint takes, found by a few calls
"""
