"""The shapes that benchmarks are run at: a model, and the ranges of prompt and answer lengths."""

from __future__ import annotations

import random
from dataclasses import dataclass

PAIRS = 4  # a step


@dataclass(frozen=True)
class Shape:
    """A Llama with tied vocabulary, and the least and most tokens of prompts and answers."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    mlp: int
    prompt: tuple[int, int]
    answer: tuple[int, int]

    def config(self):  # transformers is imported by what uses it alone
        """The model's `LlamaConfig`."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.mlp,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            max_position_embeddings=4096,
        )

    def pairs(self, count: int) -> list[tuple[list[int], list[int], list[int]]]:
        """Token ids of prompt, chosen, rejected, without EOS; ids below 3 are reserved. The same in every call."""
        rng = random.Random(0)

        def words(low: int, high: int) -> list[int]:
            return [rng.randrange(3, self.vocab) for _ in range(rng.randint(low, high))]

        return [(words(*self.prompt), words(*self.answer), words(*self.answer)) for _ in range(count)]


LONG, SHORT = ((64, 448), (96, 464)), ((16, 48), (32, 64))
SHAPES = {
    "tiny-short": Shape(128, 2, 4, 2, 2000, 256, *SHORT),
    "30m-long": Shape(384, 6, 6, 2, 32000, 1024, *LONG),
    "30m-short": Shape(384, 6, 6, 2, 32000, 1024, *SHORT),
    "135m-long": Shape(576, 30, 9, 3, 49152, 1536, *LONG),
}
