"""Whether a folder's configuration tells the truth about a tied head: vLLM goes by it, transformers by the weights."""

from __future__ import annotations

from pathlib import Path

from otpo.models.disk.stored import places, same_bytes

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


def has_own_head(folder: Path) -> bool:
    """Whether the weights hold a head that is not the embeddings. Reads no more of them than these two."""
    head, embeddings = None, None
    for path in sorted(folder.glob("*.safetensors")):
        for name, place in places(path):
            head = place if name.endswith(HEADS) else head
            embeddings = place if name.endswith(EMBEDDINGS) and "vision" not in name else embeddings
    return head is not None and embeddings is not None and not same_bytes(head, embeddings)
