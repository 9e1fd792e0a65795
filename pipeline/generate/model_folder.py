"""A model's folder as generation sees it: what it is, whether it can be served, and whether two can share an engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from otpo.data.template import Template, has_chat_template
from otpo.errors import UserError, first_line
from otpo.identity import TOKENIZER_FILES, content_digest
from otpo.models.disk.present import check_weights, missing, not_of_the_hub
from pipeline.generate.tied_head import has_own_head

# vLLM's CPU attention refuses every other size after the engine's start (vllm/v1/attention/backends/cpu_attn.py, 0.32).
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
# Keys of config.json that may differ between checkpoints of one architecture.
_NOT_ARCHITECTURE = {
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face folder.

    Attributes:
        path: the folder, absolute.
        name: what the user called it: the folder, or a hub name.
        config: config.json.
        generation_config: generation_config.json, or {}.
        digest: SHA-256 over weights, configs and tokenizer: it tells whether an engine already holds the model, and
            whether outputs on disk are this model's.
    """

    path: Path
    name: str
    config: dict[str, Any] = field(hash=False)
    generation_config: dict[str, Any] = field(hash=False)
    digest: str

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """config.json with the text model's own part on top."""
        return {**self.config, **self.config.get("text_config", {})}

    def _size(self, *names: str) -> int | None:
        return next((self.text_config[name] for name in names if self.text_config.get(name)), None)

    @property
    def layers(self) -> int:
        """Number of transformer layers."""
        return self._size("num_hidden_layers", "n_layer") or 1

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self._size("num_attention_heads", "n_head") or 1

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return kv_heads_of(self.text_config, self.heads)

    @property
    def head_dim(self) -> int:
        """Dimensions of an attention head."""
        return self._size("head_dim") or (self._size("hidden_size", "n_embd") or 0) // self.heads

    @property
    def engine_sizes(self) -> list[int]:
        """Numbers of GPUs that vLLM can share the model among."""
        return engine_sizes(self.text_config, self.heads)

    def context(self, wanted: int | None = None) -> int:
        """Tokens of prompt and output together: what is wanted, else the model's own limit, at most 4,096."""
        return wanted or min(self._size("max_position_embeddings", "n_positions", "n_ctx") or 4096, 4096)

    @property
    def own_limit(self) -> int | None:
        """Positions that the model knows; None where its config does not say."""
        return self._size("max_position_embeddings", "n_positions", "n_ctx")

    def shares_engine_with(self, other: ModelFolder) -> bool:
        """Whether an engine that holds `other` can take this model by reloading its weights."""
        if self.digest == other.digest:
            return True

        def architecture(config: dict[str, Any]) -> dict[str, Any]:
            return {k: v for k, v in config.items() if k not in _NOT_ARCHITECTURE}

        quantized = "quantization_config" in self.config or "quantization_config" in other.config
        return not quantized and architecture(self.config) == architecture(other.config)


def kv_heads_of(config: Mapping[str, Any], heads: int) -> int:
    """Key-value heads of a text model with so many attention heads, by its config.json."""
    if config.get("multi_query") and not config.get("new_decoder_architecture"):  # Falcon and GPT-BigCode
        return 1
    return config.get("num_key_value_heads") or config.get("num_kv_heads") or heads


def engine_sizes(config: Mapping[str, Any], heads: int) -> list[int]:
    """Numbers of GPUs that vLLM can share a text model among.

    Each takes as many attention heads and as much of the feed-forward part as the others, and as many key-value heads,
    or one that others take too.
    """
    keys = kv_heads_of(config, heads)
    widths = [config[name] for name in ("intermediate_size", "moe_intermediate_size") if config.get(name)]
    return [
        size
        for size in range(1, heads + 1)
        if heads % size == 0
        and (keys % size == 0 or size % keys == 0)
        and not any(width % size for width in widths if isinstance(width, int))
    ]


def check_shared(model: ModelFolder, gpus: int, key: str) -> None:
    """Refuse a number of GPUs that vLLM cannot share a model among; it would fail when it loads the model.

    Args:
        key: of the recipe that says how many there are.

    Raises:
        UserError: names those that could be.
    """
    if gpus > 1 and model.heads > 1 and gpus not in model.engine_sizes:
        *others, last = map(str, model.engine_sizes)
        raise UserError(
            f"{key} is {gpus}, and vLLM shares {model.name} evenly among its GPUs: {model.heads} attention heads,"
            f" {model.kv_heads} of keys and values, and the feed-forward part. Set"
            f" {', '.join(others)}{' or ' * bool(others)}{last}."
        )


def open_model(model: str | Path) -> ModelFolder:
    """Read a model's folder, or fetch a hub name into the local cache first.

    Raises:
        UserError: there is no such model, or it is not a whole Hugging Face model with safetensors weights.
    """
    path = Path(model).expanduser()
    if not path.is_dir():
        path = _fetch(str(model))
    if not (path / "config.json").is_file():
        adapter = (path / "adapter_config.json").is_file()
        found = (
            "a LoRA adapter: merge it into its base model first"
            if adapter
            else f"{sorted(p.name for p in path.iterdir())[:8]}"
        )
        raise UserError(f"{model}: expected a Hugging Face model folder with config.json; found {found}.")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise UserError(
            f"{model}: expected weights in *.safetensors beside config.json; found none. Save the model with "
            "`save_pretrained` of transformers (pickled *.bin weights are not read)."
        )
    path = path.resolve()
    check_weights(str(model), path)
    generation = path / "generation_config.json"
    return ModelFolder(
        path=path,
        name=str(model),
        config=_object_of(path / "config.json"),
        generation_config=_object_of(generation) if generation.is_file() else {},
        digest=content_digest(path),
    )


def _object_of(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}. Copy it anew.") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected an object, found {type(found).__name__}. Copy it anew.")
    return found


def why_not_vllm(model: ModelFolder, *, on_cpu: bool) -> str | None:
    """Why vLLM cannot serve a model that transformers can; None if it can."""
    if model.text_config.get("tie_word_embeddings") and has_own_head(model.path):
        return (
            "config.json says that the head is tied to the embeddings, and the weights hold a head of their own: vLLM"
            " would ignore it and serve another model"
        )
    if on_cpu and model.head_dim not in CPU_HEAD_SIZES:
        return (
            f"its attention heads have {model.head_dim} dimensions, and vLLM on a CPU knows only"
            f" {', '.join(map(str, CPU_HEAD_SIZES))}"
        )
    return None


def check_servable(model: ModelFolder, *, template: Template, max_model_len: int | None) -> None:
    """Refuse before anything starts what would fail minutes later.

    Raises:
        UserError: no tokenizer, no chat template where one is needed, or a length that cannot be.
    """
    if not any((model.path / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{model.name}: expected a tokenizer ({', '.join(TOKENIZER_FILES)}) in the model's folder; found none. "
            "Save it there: `AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)`."
        )
    if template == "chat" and not has_chat_template(model.path):
        raise UserError(
            f"{model.name}: prompts are to go through the chat template, and the tokenizer has none. Put "
            "chat_template.jinja beside it, or set data.template=literal to give the model each "
            "text as it is."
        )
    if max_model_len is not None and model.own_limit is not None and max_model_len > model.own_limit:
        raise UserError(
            f"{model.name}: max_model_len is {max_model_len}, and the model knows {model.own_limit} positions."
        )


@lru_cache(maxsize=8)
def _tokenizer(path: Path, digest: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def tokenizer_of(model: ModelFolder) -> Any:
    """The tokenizer in the model's folder."""
    return _tokenizer(model.path, model.digest)


def _fetch(name: str) -> Path:
    if reason := not_of_the_hub(name):
        raise UserError(missing(name, reason))
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except Exception as error:  # the hub's client raises many types for one thing: the model cannot be had
        raise UserError(f"{name}: neither a folder here nor a model of the hub that can be read ({error}).") from error
