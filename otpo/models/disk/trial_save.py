"""What would make saving a trained model fail, found before it is trained: everything but the weights is saved once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from otpo.errors import UserError
from otpo.identity import weight_files

SAMPLE = "What is 12 + 30?\n\nIt is 42. <|end|> é 谢谢"
GB = 1e9


def check_saving(model: str | Path, *, generates: bool = True) -> None:
    """Save a model's configuration, generation configuration and tokenizer into a folder that is then removed.

    Args:
        model: folder or hub name.
        generates: whether what is trained generates, so that it is saved with a generation configuration.

    Raises:
        UserError: transformers cannot save one of them, or reads another tokenizer back.
    """
    with tempfile.TemporaryDirectory() as folder:

        def save(what: str, file: str, load: Callable[[str | Path], Any]) -> Any:
            try:
                part = load(model)
                part.save_pretrained(folder)
            except Exception as error:  # every class has its own complaints, of its own types
                raise UserError(
                    f"expected a model that transformers can save again, and it cannot save the {what} of {model}:"
                    f" {_brief(error)} Mend {file} there: training would end without a model."
                ) from error
            return part

        save("configuration", "config.json", AutoConfig.from_pretrained)
        if generates:
            save("generation configuration", "generation_config.json", _generation_config)
        tokenizer = save("tokenizer", "tokenizer_config.json", AutoTokenizer.from_pretrained)
        if _of(tokenizer) != _of(AutoTokenizer.from_pretrained(folder)):
            raise UserError(
                f"the tokenizer of {model} is another one once transformers has saved and loaded it, so the trained"
                " model would read other tokens than it was trained on. Save it yourself with a current transformers"
                " (`AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)`) and start from that folder."
            )


def _generation_config(model: str | Path) -> GenerationConfig:
    """As `from_pretrained` of a model reads it, except for one that is torn, which that would leave out."""
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        if (Path(model) / "generation_config.json").is_file():
            raise
        return GenerationConfig.from_pretrained(model, config_file_name="config.json", _from_model_config=True)


def _of(tokenizer: Any) -> tuple[Any, ...]:
    return len(tokenizer), tokenizer(SAMPLE)["input_ids"], tokenizer.chat_template, tokenizer.eos_token_id


def _brief(error: Exception) -> str:
    """An error's first lines in one."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.removesuffix("Fix these issues to save the configuration.").strip()
    return text if len(text) <= 400 else f"{text[:400]}..."


def check_space(
    out: Path, model: str | Path, *, models: int, checkpoints: int, adapters: bool, weight_bytes: float = 12
) -> None:
    """Refuse a training whose models and checkpoints will not fit on the disk. A hub model is not estimated.

    Args:
        out: the folder that they are written into, which may not exist yet.
        model: that training starts from.
        models: how many are trained from it.
        checkpoints: how many are kept of each, and written before an older one is removed.
        adapters: whether only adapters are trained: their checkpoints are small.
        weight_bytes: of a weight in a checkpoint: itself in float32, and the optimizer's states.

    Raises:
        UserError: there is less space than they need.
    """
    files = weight_files(Path(model)) if Path(model).is_dir() else []
    weights = sum(file.stat().st_size for file in files)
    if not weights:
        return
    dtype = getattr(AutoConfig.from_pretrained(model), "dtype", None) or torch.float32
    kept = 0 if adapters else checkpoints * weight_bytes * weights / torch.empty((), dtype=dtype).element_size()
    needed = models * (weights + kept)
    while not out.exists():
        out = out.parent
    free = shutil.disk_usage(out).free
    if needed > free:
        text = f"{models} models of {weights / GB:.1f} GB"
        if kept:
            text += f", each with up to {checkpoints} checkpoints of {kept / checkpoints / GB:.1f} GB"
        raise UserError(
            f"expected {needed / GB:.1f} GB of free space at {out} ({text}), found {free / GB:.1f} GB. Remove old runs,"
            " write to another disk (--runs), keep fewer checkpoints (train.keep_checkpoints), or save none"
            " (train.save_minutes=null)."
        )
