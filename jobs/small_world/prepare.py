"""Write a small world's files: a random model with its tokenizer, base training data, prompts and tasks."""

from __future__ import annotations

import json
import random
from pathlib import Path

from jobs.small_world import world as small_world
from jobs.small_world.opinions import LENGTH_LIKING
from jobs.small_world.world import SETTINGS, STYLES, Item, World
from otpo.models.loading import no_bars

SPECIAL = {"unk": "<|unk|>", "pad": "<|pad|>", "bos": "<|begin|>", "eos": "<|end|>"}
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
HIDDEN_SIZE, HEADS, LAYERS = 128, 4, 2  # heads of 32: vLLM's CPU attention takes 32 and 64
INITIALIZER_RANGE = 0.04  # facts are learned in fewer steps than with 0.02 or 0.08


def prepare(
    world_dir: Path,
    *,
    seed: int = 0,
    entities: int = 190,
    posts: int = 120,
    base_answers: int = 12,
    right: float = 0.65,
    rambling: float = 0.3,
    length_liking: float = LENGTH_LIKING,
) -> dict[str, Path]:
    """Write the world's folder; a folder that already holds this very world is left as it is.

    Args:
        world_dir: where to; made if needed.
        seed: of the world, its data and the model's random numbers.
        entities: number of facts.
        posts: number of posts to summarize.
        base_answers: completions in the base data for each fact question; posts get a quarter as many rows in all.
        right: fraction of right completions in the base data.
        rambling: fraction of rambling completions in the base data.
        length_liking: how many points of ten the annotator gives an output of 40 words for its length; being right is
            worth five.

    Returns:
        Paths: "model" (folder), "base", "prompts", "facts", "summaries" (JSONL) and "truth" (JSON). Rows of `base`:
        {prompt, completion} as messages. Rows of the others: {id, instruction, dataset, entity, topic}.
    """
    settings: dict[str, float] = {"seed": seed, "entities": entities, "posts": posts, "base_answers": base_answers}
    settings |= {"right": right, "rambling": rambling}
    settings |= {"length_liking": length_liking} if length_liking != LENGTH_LIKING else {}
    names = ("base", "prompts", "facts", "summaries")
    paths = {"model": world_dir / "model", **{name: world_dir / f"{name}.jsonl" for name in names}}
    paths["truth"] = world_dir / "truth.json"
    written = world_dir / SETTINGS
    if written.is_file() and json.loads(written.read_text()) == settings:
        return paths
    world_dir.mkdir(parents=True, exist_ok=True)
    written.unlink(missing_ok=True)
    world = small_world.build(seed, entities, posts)
    rng = random.Random(f"rows {seed}")
    _write(paths["base"], _base_rows(world, rng, base_answers, right, rambling))
    _write(paths["prompts"], _prompt_rows(world, rng))
    _write(paths["facts"], _task_rows(world, rng, "facts", {"trained": 4, "held_out": 4}))
    _write(paths["summaries"], _task_rows(world, rng, "summaries", {"trained": 1, "held_out": 1}))
    paths["truth"].write_text(small_world.as_json(world), encoding="utf-8")
    make_model(paths["model"], seed)
    # Last, so that an interrupted call is not taken for a finished one.
    written.write_text(json.dumps(settings))
    return paths


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _base_rows(world: World, rng: random.Random, completions: int, right: float, rambling: float) -> list[dict]:
    """Right and wrong, terse and rambling completions, drawn independently: length says nothing about truth."""
    facts = world.of("facts")
    asked = [(item, question) for item in facts for question in item.questions() for _ in range(completions)]
    for _ in range(len(asked) // 4):
        item = small_world.free_post(rng)
        asked.append((item, rng.choice(item.questions())))
    rng.shuffle(asked)
    rows = []
    for item, question in asked:
        style = STYLES[rng.random() < rambling]
        filling = item.truth if rng.random() < right else small_world.wrong_filling(item, world.words, rng)
        text = small_world.answer(item, style, filling, rng)
        prompt = [{"role": "user", "content": question}]
        rows.append({"prompt": prompt, "completion": [{"role": "assistant", "content": text}]})
    return rows


def _row(item: Item, question: str, number: int) -> dict:
    row = {"id": f"{item.topic}-{number}", "instruction": question, "dataset": item.split}
    return row | {"entity": item.entity, "topic": item.topic}


def _prompt_rows(world: World, rng: random.Random) -> list[dict]:
    """What preference pairs may be about: every question about a trained entity."""
    asked = [(item, question) for item in world.items if item.split == "trained" for question in item.questions()]
    rng.shuffle(asked)
    return [_row(item, question, number) for number, (item, question) in enumerate(asked)]


def _task_rows(world: World, rng: random.Random, task: str, questions: dict[str, int]) -> list[dict]:
    rows: list[dict] = []
    for split, count in questions.items():
        for item in world.of(task, split):
            asked = rng.sample(item.questions(), count)
            rows += [_row(item, question, len(rows) + k) for k, question in enumerate(asked)]
    return rows


def make_model(folder: Path, seed: int) -> None:
    """A word-level tokenizer and a random Llama for it, as a Hugging Face folder (fp32 safetensors)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HIDDEN_SIZE // HEADS,
        initializer_range=INITIALIZER_RANGE,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with no_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer():
    """A `PreTrainedTokenizerFast` with a token for each word and punctuation mark of any world.

    A word carries its leading space (written as U+2581), so that decoding gives back the text as it was.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [f"\u2581{piece}" if piece.isalnum() else piece for piece in small_world.vocabulary()]
    tokens = [*SPECIAL.values(), *ROLES, *pieces]
    tokenizer = Tokenizer(models.WordLevel({token: k for k, token in enumerate(tokens)}, unk_token=SPECIAL["unk"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": token for name, token in SPECIAL.items()},
    )
