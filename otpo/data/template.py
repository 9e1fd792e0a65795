"""The one meaning of `data.template`: how a prompt and its completion are rendered before they become tokens.

    chat      through the tokenizer's chat template; strings are wrapped as a user's message and an assistant's
    literal   strings as they are, TRL's convention for strings; messages are refused
    auto      training rows as they are: messages -> chat, strings -> literal. Without rows, as the model was trained
              (`otpo.json` in an exported folder says it), else chat where the tokenizer has a chat template

With a chat template go the variables that it is given (`data.chat_template_kwargs`), such as `enable_thinking`.

Data, sampled pairs, generation, reward models and token weights all ask here. Imports nothing heavy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from otpo.data.rows import Text
from otpo.errors import UserError
from otpo.files import write_json

Template = Literal["chat", "literal"]
Setting = Literal["auto", "chat", "literal"]

SETTINGS = ("auto", "chat", "literal")
FILE = "otpo.json"  # in an exported model's folder
AS_TRAINED = f"as the model was trained ({FILE})"


@dataclass(frozen=True)
class Rendering:
    """How prompts are rendered: a template, and the variables that a chat template is given."""

    template: Template
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.template + _with(self.chat_template_kwargs)

    @classmethod
    def of(cls, value: Rendering | Template) -> Rendering:
        """A template alone has no variables."""
        return value if isinstance(value, Rendering) else cls(value)


@dataclass(frozen=True)
class Choice:
    """A template, or "chat and literal" for rows of both kinds, and why, in a few words for a person.

    Attributes:
        chat_template_kwargs: variables of the chat template.
    """

    template: str
    why: str
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.template}{_with(self.chat_template_kwargs)}: {self.why}"

    @property
    def for_generation(self) -> Rendering:
        """How prompts are rendered.

        Raises:
            UserError: the training rows were rendered in two ways, so that no prompt can be rendered as in training.
        """
        if self.template == "chat":
            return Rendering("chat", self.chat_template_kwargs)
        if self.template == "literal":
            return Rendering("literal")
        raise UserError(
            "expected training rows that are all messages or all strings, so that generation can render prompts as"
            " training saw them; found both. Set data.template=chat, which puts all of them through the chat template."
        )


def _with(chat_template_kwargs: Mapping[str, Any]) -> str:
    return f" with {json.dumps(dict(chat_template_kwargs), sort_keys=True)}" if chat_template_kwargs else ""


# ---- training rows ----


def template_of(setting: str, texts: Iterable[Text], where: str) -> Template:
    """The template of one example, or of one prompt.

    Args:
        setting: a value of `data.template`. texts: the prompt and its completions. where: for the error.

    Raises:
        UserError: no such setting, or messages that are to be taken literally.
    """
    if setting not in SETTINGS:
        raise UserError(f"data.template is one of {', '.join(SETTINGS)}; found {setting!r}")
    if not any(isinstance(text, list) for text in texts):
        return "chat" if setting == "chat" else "literal"
    if setting == "literal":
        raise UserError(
            f"{where}: expected strings, because the template is literal; found a list of messages. Set the template to"
            " chat (data.template, or --template), or write prompt and completion as strings."
        )
    return "chat"


def of_rows(setting: str, found: Iterable[str], chat_template_kwargs: Mapping[str, Any] | None = None) -> Choice:
    """The template of a file's rows.

    Args:
        setting: a value of `data.template`. found: the templates that its rows have.
        chat_template_kwargs: variables of the chat template.
    """
    template = " and ".join(sorted(set(found)))
    kwargs = (chat_template_kwargs or {}) if "chat" in template else {}
    if setting != "auto":
        return Choice(template, "as asked for", kwargs)
    why = {
        "chat": "the rows are messages, or strings with a system prompt or tools",
        "literal": "the rows are strings; data.template=chat puts them through the chat template",
    }
    mixed = "the rows mix messages and strings; data.template=chat treats all alike"
    return Choice(template, why.get(template, mixed), kwargs)


def as_trained(setting: str, model: str | Path) -> str:
    """The setting for rows shown to a model after its training: "auto" becomes the template it was trained with.

    A model that was not trained here leaves the setting as it is.
    """
    return (trained_with(model) if setting == "auto" else None) or setting


# ---- a model without training rows ----


def of_model(
    setting: str | Rendering, model: str | Path, chat_template_kwargs: Mapping[str, Any] | None = None
) -> Choice:
    """The template for prompts that a model answers, or that a reward model reads, where no training rows tell.

    Args:
        setting: a value of `data.template`, or a rendering that is decided. model: a folder or a hub name.
        chat_template_kwargs: variables of the chat template; None: those that the model was trained with.

    Raises:
        UserError: no such setting, or an `otpo.json` that cannot be read.
    """
    if isinstance(setting, Rendering):
        return Choice(setting.template, "as asked for", setting.chat_template_kwargs)
    trained = trained_with(model)
    kwargs = trained_kwargs(model) if chat_template_kwargs is None else chat_template_kwargs
    if setting != "auto":
        other = f", although the model was trained with {trained}" if trained not in (None, setting) else ""
        found = Choice(template_of(setting, (), str(model)), f"as asked for{other}")
    elif trained:
        found = Choice(trained, AS_TRAINED)
    elif has_chat_template(model):
        found = Choice("chat", "the tokenizer has a chat template")
    else:
        found = Choice("literal", "the tokenizer has no chat template")
    return replace(found, chat_template_kwargs=kwargs) if found.template == "chat" else found


def trained_kwargs(model: str | Path) -> dict[str, Any]:
    """The variables of the chat template that a model was trained with here.

    Raises:
        UserError: the file that says them cannot be read.
    """
    found = _said(model).get("chat_template_kwargs", {})
    if not isinstance(found, dict):
        raise UserError(f"expected an object as chat_template_kwargs in {_file(model, FILE)}, found {found!r:.200}")
    return found


def trained_with(model: str | Path) -> Template | None:
    """The template that a model was trained with here; None for a model from elsewhere.

    Raises:
        UserError: the file that says it cannot be read.
    """
    template = _said(model).get("template")
    if template not in ("chat", "literal", None):
        raise UserError(f'expected {{"template": "chat" or "literal"}} in {_file(model, FILE)}, found {template!r}')
    return template


def _said(model: str | Path) -> dict[str, Any]:
    """What a model's folder says about its training's prompts; nothing for a model from elsewhere."""
    file = _file(model, FILE)
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text())
        found["template"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f'expected {{"template": "chat" or "literal"}} in {file}, found {error!r}') from None
    return found


def write_template(folder: Path, rendering: str | Rendering) -> None:
    """Write into a model's folder how its training rendered prompts; nothing where it rendered them in two ways."""
    template = rendering.template if isinstance(rendering, Rendering) else rendering
    kwargs = dict(rendering.chat_template_kwargs) if isinstance(rendering, Rendering) else {}
    if template in ("chat", "literal"):
        write_json(folder / FILE, {"template": template} | ({"chat_template_kwargs": kwargs} if kwargs else {}))


def has_chat_template(model: str | Path) -> bool:
    """Whether the tokenizer of a model has a chat template, told from its files."""
    if any(_file(model, name) for name in ("chat_template.jinja", "chat_template.json")):
        return True
    settings = _file(model, "tokenizer_config.json")
    return settings is not None and bool(json.loads(settings.read_text()).get("chat_template"))


def _file(model: str | Path, name: str) -> Path | None:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if str(model).startswith(("/", ".", "~")) or str(model).count("/") > 1:
        return None  # a folder that is not there
    from transformers.utils import cached_file

    try:
        found = cached_file(str(model), name)
    except OSError:  # not there, or no such model: whoever loads the model says so
        return None
    return Path(found) if found else None


# ---- a run ----


def of_run(
    data: str,
    generate: str,
    rows: Mapping[str, Choice],
    model: str | Path,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Choice:
    """The one template of a run: training, sampled pairs, generation, reward models and token weights.

    Args:
        data, generate: `data.template` and `generate.template`.
        rows: the recipe's key of each training file -> the template of its rows; empty where nothing is trained on
            rows that are there already.
        model: what the run starts from.
        chat_template_kwargs: `data.chat_template_kwargs`; None: those that the model was trained with here.

    Raises:
        UserError: files, or training and generation, that would see prompts rendered differently.
    """
    if len({choice.template for choice in rows.values()}) > 1:
        found = ", ".join(f"{key} {choice}" for key, choice in rows.items())
        raise UserError(
            f"expected all training rows of a run to be rendered alike, found {found}. Set data.template=chat to put"
            " all of them through the chat template, or write them the same way."
        )
    if not rows:
        if "auto" not in (data, generate) and data != generate:
            raise UserError(_differs(generate, f"data.template is {data}"))
        return of_model(data if data != "auto" else generate, model, chat_template_kwargs)
    key, choice = next(iter(rows.items()))
    if choice.template == "chat":
        kwargs = trained_kwargs(model) if chat_template_kwargs is None else chat_template_kwargs
        choice = replace(choice, chat_template_kwargs=kwargs)
    if generate not in ("auto", choice.template):
        raise UserError(_differs(generate, f"{key} is trained as {choice}"))
    trained = trained_with(model)
    if trained not in (None, choice.template):
        return replace(choice, why=f"{choice.why}; note that {model} was trained with {trained}")
    return choice


def _differs(generate: str, trained: str) -> str:
    return (
        f"expected generation to render prompts as training does, found generate.template={generate} where {trained}."
        " Leave generate.template out; to change how both render prompts, set data.template."
    )


# ---- for a person ----


def one_line(text: str, limit: int | None = None) -> str:
    r"""A rendered text on one line: line breaks as \n, and where it is longer than `limit`, cut in its middle."""
    text = text.replace("\n", "\\n").replace("\r", "\\r")
    if limit is None or len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"
