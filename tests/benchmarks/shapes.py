"""The shapes of the benchmarks: a model, and the ranges of prompt and completion lengths."""

from __future__ import annotations

import random
from dataclasses import dataclass

PAIRS = 4  # of a step, unless a shape says otherwise


@dataclass(frozen=True)
class Shape:
    """A Llama, and the fewest and most tokens of prompts and completions.

    Attributes:
        tied: whether head and embeddings share their weight.
        lora: train adapters beside bf16 weights, not all weights in fp32.
        checkpointing: compute activations again in backward, on every side.
        optimizer: ours, as `train.optimizer` names it; TRL has AdamW with float32 states.
        step_pairs: pairs of a step.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    mlp: int
    prompt: tuple[int, int]
    completion: tuple[int, int]
    tied: bool = True
    lora: bool = False
    checkpointing: bool = False
    optimizer: str = "adamw"
    step_pairs: int = PAIRS

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
            tie_word_embeddings=self.tied,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            max_position_embeddings=4096,
        )

    def model(self, device: str):
        """The model with random weights, created on the device."""
        import torch
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        with torch.device(device):
            return LlamaForCausalLM._from_config(
                self.config(), attn_implementation="sdpa", dtype=torch.bfloat16 if self.lora else torch.float32
            )

    def flops(self, pairs: list[tuple[list[int], list[int], list[int]]]) -> float:
        """The floating-point operations of the matrix products that a step on these pairs needs at least.

        Products of the layers for every token of a prompt and its two completions, and of the head for the completions,
        once forward and twice backward (once if weights are frozen); and of attention over both sequences, half of the
        square each. Nothing is computed twice.
        """
        width = self.hidden // self.heads * self.kv_heads
        layer = 2 * self.hidden**2 + 2 * self.hidden * width + 3 * self.hidden * self.mlp
        passes = 4 if self.lora else 6
        flops = 0.0
        for p, c, r in pairs:
            completions = len(c) + len(r) + 2
            flops += passes * (len(p) + completions) * layer * self.layers
            flops += passes * completions * self.hidden * self.vocab
            flops += 6 * self.layers * self.hidden * ((len(p) + len(c) + 1) ** 2 + (len(p) + len(r) + 1) ** 2)
        return flops

    def pairs(self, count: int) -> list[tuple[list[int], list[int], list[int]]]:
        """Token ids of prompt, chosen, rejected, without EOS; ids below 3 are reserved. Every call gives the same."""
        rng = random.Random(0)

        def words(low: int, high: int) -> list[int]:
            return [rng.randrange(3, self.vocab) for _ in range(rng.randint(low, high))]

        return [(words(*self.prompt), words(*self.completion), words(*self.completion)) for _ in range(count)]

    def tokens(self, steps: int) -> list[int]:
        """Tokens of each step, as TRL counts them: the prompt twice, and an EOS behind each completion."""
        counts = [2 * len(p) + len(c) + len(r) + 2 for p, c, r in self.pairs(self.step_pairs * steps)]
        return [sum(counts[start : start + self.step_pairs]) for start in range(0, len(counts), self.step_pairs)]


LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
LONG, SHORT, GPU = ((64, 448), (96, 464)), ((16, 48), (32, 64)), ((768, 1024), (768, 1023))
SHAPES = {
    "tiny-short": Shape(128, 2, 4, 2, 2000, 256, *SHORT),
    "30m-long": Shape(384, 6, 6, 2, 32000, 1024, *LONG),
    "30m-short": Shape(384, 6, 6, 2, 32000, 1024, *SHORT),
    "135m-long": Shape(576, 30, 9, 3, 49152, 1536, *LONG),
    "tiny-lora": Shape(128, 2, 4, 2, 2000, 256, *SHORT, tied=False, lora=True, checkpointing=True),
    # the shapes of Llama-3.2-1B, 3B and Llama-3-8B with sequences of up to 2,048 tokens: for a GPU
    "llama-1b": Shape(2048, 16, 32, 8, 128256, 8192, *GPU),
    "llama-3b": Shape(3072, 28, 24, 8, 128256, 8192, *GPU, checkpointing=True),
    "llama-8b": Shape(4096, 32, 32, 8, 128256, 14336, *GPU, tied=False, checkpointing=True, optimizer="adamw_8bit"),
    "llama-8b-lora": Shape(4096, 32, 32, 8, 128256, 14336, *GPU, tied=False, lora=True, checkpointing=True),
}
