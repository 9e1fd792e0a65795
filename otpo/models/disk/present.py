"""Whether there is a model at a path or under a hub name, told before anything heavy is loaded.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path

from otpo.errors import UserError, first_line
from otpo.files import NOT_READ, is_address
from otpo.identity import weight_files
from otpo.lfs import POINTER, is_pointer
from otpo.models.disk.stored import INDEX, READ, WHOLE, missing_files, not_whole

SECONDS = 5.0  # that the hub may take to answer
SHOWN = 4  # files in a message
TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")


def check_present(key: str, path: str) -> None:
    """Refuse a model that is not there, and a folder without weights or tokenizer, or with weights that are not whole.

    Args:
        key: of the recipe, or the option, that names it.
        path: folder or hub name.

    Raises:
        UserError: says what is missing, and names folders that are called nearly so.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if reason := not_of_the_hub(path):
            raise UserError(f"{key}: {missing(path, reason)}")
        return
    if (folder / "adapter_config.json").is_file():
        return  # has an answer of its own
    if not (folder / "config.json").is_file():
        raise UserError(f"{key}: {path} is no model folder: expected a config.json in it.")
    check_weights(key, folder)
    if not any(next(folder.glob(pattern), None) for pattern in TOKENIZERS):
        raise UserError(
            f"{key}: {path} holds no tokenizer: expected tokenizer.json and tokenizer_config.json beside config.json."
            " Save the model's own there, `AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)`."
        )


def check_weights(key: str, folder: Path) -> None:
    """Refuse a folder of which transformers would not read all weights, told from names and headers of its files.

    Raises:
        UserError: says which files are missing or not whole.
    """
    if not weight_files(folder):
        raise UserError(
            f"{key}: {folder} holds no weights: expected *.safetensors beside config.json. Copy or download the model"
            " whole, or save it there with `save_pretrained` of transformers."
        )
    for file in weight_files(folder):
        if not file.is_file():
            raise UserError(
                f"{key}: {file} is no file, but a folder or a link to what is not there: copy or download the model"
                " whole."
            )
        wrong = not_whole(file) if file.suffix == ".safetensors" else POINTER if is_pointer(file) else None
        if wrong:
            raise UserError(f"{key}: {file} {wrong}.")
    _check_names(key, folder)
    try:
        absent = missing_files(folder)
    except ValueError as error:
        raise UserError(
            f"{key}: {folder / INDEX} is torn: expected JSON with a weight_map, which says in which file each weight"
            " is. Copy it anew."
        ) from error
    if absent:
        raise UserError(
            f"{key}: {folder} lacks {_some(absent)}, which {INDEX} names: copy or download the model whole."
        )


def _check_names(key: str, folder: Path) -> None:
    """Refuse weights in files that transformers does not look for: shards without their index, GGUF, ..."""
    if (
        any((folder / name).is_file() for name in READ)
        or "transformers_weights" in (folder / "config.json").read_text()
    ):
        return
    names = [file.name for file in weight_files(folder)]
    raise UserError(
        f"{key}: expected {WHOLE}, or {INDEX} that names its parts, in {folder}; found {_some(names)}, which"
        " transformers does not read by itself. Copy or download the model whole, or save it with `save_pretrained`."
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def missing(path: str, reason: str) -> str:
    """The sentence for a model that is no folder here and not to be had from the hub either."""
    parent = Path(path).expanduser().parent
    names = [each.name for each in parent.iterdir() if each.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(Path(path).name, names, n=3)
    meant = f" Did you mean {' or '.join(repr(str(parent / name)) for name in near)}?" if near else ""
    return f"there is no folder '{path}' here (looked in {parent.absolute()}), and {reason}.{meant}"


@cache
def not_of_the_hub(name: str) -> str | None:
    """Why a name is no model of the hub, or cannot be asked for; None where the hub or the local cache has it.

    The hub is asked once, without retries.
    """
    if is_address(name):
        return f"that is an address: {NOT_READ}"
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        return "that is no name of the hub"
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return None
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=SECONDS)
    except HFValidationError:
        return "that is no name of the hub"
    except (GatedRepoError, EntryNotFoundError):
        return None  # it is there: what is wrong is told where it is loaded
    except RepositoryNotFoundError:
        return "the Hugging Face hub has no public model of that name (a private one needs HF_TOKEN)"
    except Exception as error:  # the client raises many types for one thing: the hub cannot be asked
        return f"the Hugging Face hub cannot be asked for it ({first_line(error):.200})"
    return None
