"""Greedy outputs of a model by plain transformers, one prompt at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from eval.tasks import Prompt
from otpo.data.encoder import encode_prompt
from pipeline.generate.engine import stop_tokens
from pipeline.generate.model_folder import open_model, tokenizer_of

QUESTIONS = [
    "Where is it?",
    "What is the capital of Mongolia, and how high does it lie above the sea?",
    "No.",
    "é 谢谢 😀",
]
PROMPTS = [Prompt(id=str(i), instruction=f"{QUESTIONS[i % 4]} ({i})", dataset="test") for i in range(24)]


def greedy(network: torch.nn.Module, prompt: list[int], stops: list[int], length: int) -> tuple[list[int], float]:
    """Greedy tokens by plain forward passes without a cache, and the smallest gap between the two best logits."""
    ids, gap = list(prompt), float("inf")
    with torch.inference_mode():
        while len(ids) < len(prompt) + length:
            best = network(torch.tensor([ids])).logits[0, -1].topk(2)
            gap = min(gap, float(best.values[0] - best.values[1]))
            ids.append(int(best.indices[0]))
            if ids[-1] in stops:
                break
    return ids[len(prompt) :], gap


def oracle(model: Path, prompts: list[Prompt], length: int) -> dict[str, str]:
    """Greedy outputs of those prompts whose tokens are never nearly tied."""
    folder = open_model(model)
    tokenizer = tokenizer_of(folder)
    stops = stop_tokens(folder, tokenizer)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    answers = {}
    for prompt in prompts:
        ids, gap = greedy(network, encode_prompt(tokenizer, prompt.instruction, "chat"), stops, length)
        if gap > 1e-2:
            answers[prompt.id] = tokenizer.decode([t for t in ids if t not in stops], skip_special_tokens=True)
    assert len(answers) >= len(prompts) // 2
    return answers
