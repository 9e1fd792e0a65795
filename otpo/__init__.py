"""The science: weights for tokens, losses, models, one training step. Needs torch and transformers, but not Ray.

    import otpo

    otpo.token_weights("my/model", prompt, chosen, rejected)
    otpo.loss("dpo", chosen_logps=..., rejected_logps=..., ...)

Both are loaded when they are first used, so that `import otpo` stays light.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from otpo.notebook import loss, token_weights

__all__ = ["loss", "token_weights"]

# transformers loads torchao wherever that is installed, and it warns of kernels for other machines
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'otpo' has no attribute {name!r}; it has {', '.join(__all__)}")
    import otpo.notebook

    return getattr(otpo.notebook, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
