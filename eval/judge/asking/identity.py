"""Which model answers: what the endpoint says in its replies, and a name that answers as another model than before.

A name such as "gpt-4o" stands for one model today and another one later. The first that it answers as is remembered
with the replies. Where all new replies of a run come from another, they and all later ones have keys of their own, so
that the next run asks that model everything in place of mixing the two. An endpoint that answers under several names
at once is one judge.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

from eval.judge.store import Store


def answers_as(reply: str) -> str | None:
    """What a reply calls the model that gave it; None where it does not say."""
    try:
        found = json.loads(reply).get("model")
    except (ValueError, AttributeError):
        return None
    return found if isinstance(found, str) and found else None


class Identities:
    """Watches what the replies of a run call their model.

    Args:
        model: the name that is asked for.
        store: of the replies.
    """

    def __init__(self, model: str, store: Store):
        self._model, self._store = model, store
        self._seen: Counter[str] = Counter()
        self._keys: list[str] = []

    def see(self, key: str, reply: str) -> None:
        """Note who gave a new reply, which is stored under this key."""
        if name := answers_as(reply):
            self._seen[name] += 1
            self._keys.append(key)

    def settle(self, new_key: Callable[[str], str]) -> None:
        """Remember who answers, at the end of a run.

        Args:
            new_key: the key of a reply by its old one, once the identity has changed.
        """
        if len(self._seen) != 1:
            return
        [name] = self._seen
        known = self._store.identity(self._model)
        if known is not None and known[1] == name:
            return
        self._store.put_identity(self._model, name)
        if known is not None:
            for key in self._keys:
                self._store.rename(key, new_key(key))
