"""Pushing a trained model to the Hugging Face hub: its folder's files and a card, nothing else.

The token comes from `HF_TOKEN` in the environment and goes into the requests' headers alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otpo.errors import UserError, WorkError
from pipeline.hub.card import hub_card, origin
from pipeline.recipe import Recipe, load_recipe
from pipeline.run.folder import RunFolder
from pipeline.run.manifest import Manifest

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TOKEN = "HF_TOKEN"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]{0,95}")
_WEIGHTS = re.compile(r".*\.(safetensors|bin)(\.index\.json)?")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """Where a model goes.

    Attributes:
        repository: OWNER/NAME.
        public: visibility of a repository that is made here; one that exists keeps its own.
        revision: branch, made if it is not there; None is the main one.
        license: for the card, as the hub names it.
    """

    repository: str
    public: bool = False
    revision: str | None = None
    license: str | None = None


def push(folder: str | Path, label: str, target: Target, *, adapter: bool = False, say: Say = print) -> str:
    """Push what a run trained under a label.

    A push that was interrupted is repeated by the same call; files that are there already are not sent again.

    Args:
        folder: of the run.
        adapter: push the adapters alone, in peft's format, instead of the merged model.
        say: called with a line about what is done.

    Returns:
        The address of the commit.

    Raises:
        UserError: no such run, label or token, a name that is none, or a token that is refused; nothing was pushed.
        WorkError: the hub failed on the way.
    """
    run = RunFolder(Path(folder).absolute())
    recipe = _recipe(run, folder)
    source = _trained(run, recipe, label, folder, adapter)
    if not _REPOSITORY.fullmatch(target.repository):
        raise UserError(f"--to {target.repository}: expected OWNER/NAME, as in huggingface.co/OWNER/NAME.")
    token = os.environ.get(TOKEN, "").strip()
    if not token:
        raise UserError(
            f"No token: set {TOKEN} in the environment to a token of the hub that may write"
            " (https://huggingface.co/settings/tokens)."
        )
    card = hub_card(run, recipe, label, name=target.repository, license=target.license, adapter=adapter)
    files = model_files(source, card, origin(run, recipe, label).start)
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="otpo")
    with _told(api, token, WorkError):
        with _told(api, token, UserError):
            user = api.whoami()["name"]
            api.create_repo(target.repository, private=not target.public, exist_ok=True)
        if target.revision:
            api.create_branch(target.repository, branch=target.revision, exist_ok=True)
        say(f"{user} pushes {len(files)} files, {sum(map(_size, files.values())) / 2**20:.1f} MiB")
        return _commit(api, target, files, f"Push {label} of the run {recipe.name}")


def _recipe(run: RunFolder, given: str | Path) -> Recipe:
    if not (run.recipe.is_file() and run.manifest.is_file()):
        raise UserError(f"{given}: expected the folder of a run, with recipe.yaml and manifest.json in it.")
    return load_recipe(run.recipe)


def _trained(run: RunFolder, recipe: Recipe, label: str, given: str | Path, adapter: bool) -> Path:
    """The folder to push; what is not finished, or not there, is refused with what there is."""
    manifest = Manifest(run.path)
    stages = {"base": "base"} if recipe.base else {}
    stages |= {name: f"train/{name}" for name in recipe.methods}
    finished = [name for name, stage in stages.items() if manifest.finished(stage) and run.model(name).is_dir()]
    if label not in stages:
        raise UserError(f"{given}: there is no label '{label}'. Trained here: {', '.join(finished) or 'none yet'}.")
    if label not in finished:
        raise UserError(
            f"{given}: '{label}' is not trained to its end: `otpo train` goes on with it. Trained here:"
            f" {', '.join(finished) or 'none yet'}."
        )
    if not adapter:
        return run.model(label)
    if not run.label(label).adapter.is_dir():
        raise UserError(f"--adapter: '{label}' has no adapters, because the recipe has no model.lora: leave it out.")
    return run.label(label).adapter


def model_files(source: Path, card: str, start: str | None) -> dict[str, Path | bytes]:
    """Name in the repository -> file, or content, of everything that is pushed: the folder's own files and the card.

    Args:
        start: hub name of the model that training started from, which adapters name; a local one's path is left out.
    """
    files: dict[str, Path | bytes] = {
        path.name: path
        for path in sorted(source.iterdir())
        if path.is_file() and not path.is_symlink() and not path.name.startswith(".")
    }
    for name, path in list(files.items()):
        if name.endswith("config.json") and isinstance(path, Path):
            config = json.loads(path.read_text(encoding="utf-8"))
            named = [key for key in config if key.endswith("name_or_path") and config[key]]
            if named:
                files[name] = json.dumps(config | dict.fromkeys(named, start), indent=2, ensure_ascii=False).encode()
    return files | {"README.md": card.encode()}


def _commit(api: HfApi, target: Target, files: dict[str, Path | bytes], message: str) -> str:
    """One commit of the files; weights of an earlier push that are no part of this one go."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
    there = api.list_repo_files(target.repository, revision=target.revision)
    operations += [CommitOperationDelete(name) for name in there if _WEIGHTS.fullmatch(name) and name not in files]
    done = api.create_commit(
        target.repository, operations, commit_message=message, revision=target.revision, num_threads=2
    )
    return str(done.commit_url)


def _size(content: Path | bytes) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


@contextmanager
def _told(api: HfApi, token: str, kind: type[Exception]) -> Iterator[None]:
    """Turn what the hub or the network says into `kind`, without the token or the signature of an address."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # its warnings about retries print addresses with their signatures
    try:
        yield
    except (UserError, WorkError):
        raise
    except Exception as error:
        causes = [error, error.__cause__] if error.__cause__ else [error]
        text = re.sub(r"\?\S+", "", " ".join(" ".join(str(cause).split()) for cause in causes))
        said = text.replace(token, TOKEN)[:500]
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if status in (401, 403):
            raise kind(
                f"{api.endpoint} refuses the token in {TOKEN} ({status}): expected one that may write to the"
                f" repository's owner. It said: {said}"
            ) from None
        raise kind(
            f"The push to {api.endpoint} failed: {type(error).__name__}: {said} The same command goes on: what has"
            " arrived is not sent again."
        ) from None
    finally:
        logging.set_verbosity(before)
