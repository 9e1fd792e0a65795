"""The models that a run trains and reads, checked before a worker starts, and the token ids that they are to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from otpo.errors import UserError
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from otpo.data.token_file import TokenFile
    from otpo.models.disk.architecture import Limits
    from pipeline.train.tokens import Tokens

SHOWN = 5  # ids in a message
BLOCK = 2**22  # ids that are looked at at a time


def check_models(recipe: Recipe, labels: Sequence[str], resolve: Callable[[str], str]) -> list[str]:
    """Check the model that labels start from, and their frozen models.

    Args:
        labels: those that are not trained yet, "base" among them.
        resolve: a source of the recipe as a path or hub name.

    Returns:
        Sentences for the person.

    Raises:
        UserError: a model that cannot be trained, or a frozen one of another tokenizer.
    """
    if not labels:
        return []
    path = resolve(recipe.model.path)
    limits = model_limits(path, recipe, labels)
    for label in labels:
        if recipe.train_of(label).activation_checkpointing is True and not limits.recomputes:
            raise UserError(
                f"train.activation_checkpointing: the architecture of {path} has none in transformers. Set it to false."
            )
        frozen = {} if label == "base" else recipe.method(label).frozen_models
        _check_apart(
            label,
            {name: source if source in recipe.methods else resolve(source) for name, source in frozen.items()},
            reference=None if recipe.base else path,
        )
        for name, source in frozen.items():
            if source not in recipe.methods:
                _check_frozen(f"methods.{label}.{name}", resolve(source), path, recipe, limits)
    from otpo.models.disk.architecture import own_code
    from otpo.models.disk.loaded import rounded_at_loading

    notes = [note for note in (own_code(path), rounded_at_loading(path)) if note]
    if limits.text_model is None:
        return notes
    return [
        *notes,
        f"{recipe.model.path} is a multimodal model: its text model alone ({limits.text_model}) was trained, and is"
        " what models/LABEL/model holds.",
    ]


def check_tokens(tokens: Tokens, recipe: Recipe, path: str, source: str, labels: Sequence[str]) -> None:
    """Check token ids against the model that is to be trained on them.

    Args:
        path: the model's folder or hub name.
        source: where the rows come from.
        labels: of `methods`, or ["base"].

    Raises:
        UserError: ids beyond the model's vocabulary, or rows with more tokens than it has positions.
    """
    files = [tokens.train, tokens.validation]
    if tokens.unpaired:
        files += [tokens.unpaired.train, tokens.unpaired.validation]
    limits = model_limits(path, recipe, labels)
    for file in filter(None, files):
        _check_file(file, limits, path, source)


def model_limits(path: str, recipe: Recipe, labels: Sequence[str]) -> Limits:
    """What token ids the model can take that these labels start from; a UserError if it cannot be trained."""
    rewards = all(label != "base" and recipe.trains_rewards(label) for label in labels)
    return _limits(path, recipe.model.attn_implementation, rewards)


@lru_cache(maxsize=4)
def _limits(path: str, attn_implementation: str, rewards: bool) -> Limits:
    from otpo.models.disk.architecture import check_language_model, check_reward_start

    check = check_reward_start if rewards else check_language_model
    return check(path, attn_implementation=attn_implementation)


def _check_apart(label: str, frozen: dict[str, str], *, reference: str | None) -> None:
    """Refuse frozen models between which no token has a log-ratio: weights by it would say nothing.

    Args:
        frozen: name -> folder, or a label that is trained first. reference: the folder of the reference; None where it
            is trained in this run.
    """
    names = list(frozen) if len(set(frozen.values())) < len(frozen) else []
    if reference is not None and frozen.get("oracle") == reference:
        names = ["oracle", "reference"]
    if names:
        raise UserError(
            f"methods.{label}: {' and '.join(names)} are one model, {frozen[names[0]]}. Their log-ratio is 0 for every"
            " token, so weights by it would say nothing: name models that were trained on preferences from it."
        )


def _check_frozen(key: str, path: str, policy: str, recipe: Recipe, limits: Limits) -> None:
    from otpo.data.tokens import check_same_tokens, load_tokenizer

    found = _limits(path, recipe.model.attn_implementation, False)
    if path == policy:
        return
    tokenizer = load_tokenizer(policy)
    check_same_tokens(key, path, tokenizer)
    needed = min(limits.tokens, 1 + max(tokenizer.get_vocab().values()))  # rows that are beyond it are padding
    if found.tokens < needed:
        raise UserError(
            f"{key}: {path} has embeddings for {found.tokens} tokens, and model.path reads {needed}: give a model of"
            " the same vocabulary."
        )


def _check_file(file: str, limits: Limits, model: str, source: str) -> None:
    from otpo.data.token_file import load_tokens

    tokens = load_tokens(file)
    if len(tokens):
        _check_vocabulary(tokens, limits, model, source)
        _check_positions(tokens, limits, model, source)


def _check_vocabulary(tokens: TokenFile, limits: Limits, model: str, source: str) -> None:
    blocks = (tokens.ids[start : start + BLOCK] for start in range(0, len(tokens.ids), BLOCK))
    beyond = np.unique(np.concatenate([np.unique(block[block >= limits.tokens]) for block in blocks]))
    if not len(beyond):
        return
    from otpo.data.tokens import load_tokenizer

    tokenizer = load_tokenizer(model)
    shown = ", ".join(f"{i} {tokenizer.convert_ids_to_tokens(int(i))!r}" for i in beyond[:SHOWN])
    more = f" and {len(beyond) - SHOWN} more" if len(beyond) > SHOWN else ""
    raise UserError(
        f"{model} has embeddings for the token ids 0 to {limits.tokens - 1}, but its tokenizer turns {source} into"
        f" {shown}{more}. Tokens were added to the tokenizer and not to the model: give the tokenizer that belongs to"
        " the model, or add them (`model.resize_token_embeddings(len(tokenizer))`, then save both; new rows are"
        " random and must be trained first)."
    )


def _check_positions(tokens: TokenFile, limits: Limits, model: str, source: str) -> None:
    if limits.positions is None:
        return
    spans = np.diff(tokens.offsets).reshape(len(tokens), -1)
    lengths = spans[:, 0] + spans[:, 1:].max(axis=1)
    long = lengths > limits.positions
    if not long.any():
        return
    raise UserError(
        f"{long.sum()} of {len(tokens)} rows of {source} are longer than the {limits.positions} positions of {model}"
        f" ({limits.why}); the longest, row {tokens.rows[lengths.argmax()]}, has {lengths.max()} tokens. Set"
        f" data.max_length={limits.positions}, or give a model with more positions."
    )
