"""How a judge is asked, as options of a command line: one group that every verb with a judge takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from otpo.errors import UserError

if TYPE_CHECKING:
    from eval.judge.config import JudgeConfig

JudgeUrl = Annotated[
    str | None,
    typer.Option("--judge-url", help="base URL of an OpenAI-compatible server, for example http://127.0.0.1:8000/v1"),
]
JudgeModel = Annotated[str | None, typer.Option("--judge-model", help="the judge's model as its server knows it")]
JudgeVllm = Annotated[
    str | None,
    typer.Option("--judge-vllm", help="folder or hub name of a model that vLLM serves meanwhile, in place of a URL"),
]
JudgeSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="judge.KEY=VALUE", show_default=False,
        help="any key of a recipe's judge section, for example --set judge.temperature=1; may be given several times",
    ),
]  # fmt: skip
Protocol = Annotated[
    str | None,
    typer.Option(
        "--protocol", show_default=False,
        help="how the judge is asked: preference (where nothing is said), summary, tldr, alpaca_eval (the official"
        " prompt), arena_hard, mt_bench, mt_bench_single, rating, or a YAML file of your own",
    ),
]  # fmt: skip
Concurrency = Annotated[int | None, typer.Option("--concurrency", help="requests at a time, 32 where nothing is said")]
BudgetUsd = Annotated[float | None, typer.Option("--budget-usd", help="stop asking beyond this")]
PriceInput = Annotated[float | None, typer.Option("--price-input", help="USD per million prompt tokens")]
PriceOutput = Annotated[float | None, typer.Option("--price-output", help="USD per million completion tokens")]
RequestsPerMinute = Annotated[int | None, typer.Option("--max-requests-per-minute", help="most requests a minute")]
MaxRetries = Annotated[int | None, typer.Option("--max-retries", help="of one request, 10 where nothing is said")]


@dataclass(frozen=True)
class JudgeOptions:
    """What a person says of the judge. None is not said."""

    judge_url: JudgeUrl = None
    judge_model: JudgeModel = None
    judge_vllm: JudgeVllm = None
    protocol: Protocol = None
    concurrency: Concurrency = None
    budget_usd: BudgetUsd = None
    price_input: PriceInput = None
    price_output: PriceOutput = None
    max_requests_per_minute: RequestsPerMinute = None
    max_retries: MaxRetries = None
    settings: JudgeSettings = None

    def config(self, **given: Any) -> JudgeConfig:
        """The judge: `given` keys of a recipe's judge section, then these options, then `--set`; the latter win.

        Raises:
            UserError: as `judge_of`.
        """
        named = {"judge_url": "url", "judge_model": "model", "judge_vllm": "vllm"}
        said = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "settings"}
        said["judge_vllm"] = served_model(self.judge_vllm)
        return judge_of(self.settings, **given | {named.get(k, k): v for k, v in said.items() if v is not None})


def served_model(model: str | None) -> dict[str, str] | None:
    """`--judge-vllm` as `judge.vllm`. A folder is found from elsewhere too."""
    if model is None:
        return None
    return {"model": str(Path(model).absolute()) if Path(model).is_dir() else model}


def with_judge(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb with a parameter `asked: JudgeOptions`: on the command line its fields are options of their own."""
    hints = get_type_hints(JudgeOptions, include_extras=True)
    group = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(JudgeOptions)
    ]
    parameters: list[inspect.Parameter] = []
    for each in inspect.signature(verb, eval_str=True).parameters.values():
        parameters += group if each.name == "asked" else [each.replace(kind=inspect.Parameter.KEYWORD_ONLY)]

    @wraps(verb)
    def wrapped(**words: Any) -> None:
        asked = JudgeOptions(**{each.name: words.pop(each.name) for each in group})
        verb(**words, asked=asked)

    del wrapped.__wrapped__
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": None}
    return wrapped


def judge_of(settings: Sequence[str] | None, **given: Any) -> JudgeConfig:
    """The judge that `given` and `--set judge.KEY=VALUE` name; the latter win.

    Raises:
        UserError: a setting that is not judge.KEY=VALUE, an unknown key, or a value that it cannot have.
    """
    from pydantic import ValidationError

    from eval.judge.config import JudgeConfig
    from pipeline.recipe.files import apply_overrides

    for setting in settings or ():
        if not (setting.startswith("judge.") and "=" in setting):
            raise UserError(f"--set {setting}: expected judge.KEY=VALUE, for example --set judge.temperature=1")
    tree = apply_overrides({"judge": given}, settings or ())["judge"]
    if unknown := sorted(set(tree) - set(JudgeConfig.model_fields)):
        near = get_close_matches(unknown[0], JudgeConfig.model_fields)
        hint = f"did you mean {near[0]}?" if near else f"Known: {', '.join(JudgeConfig.model_fields)}."
        raise UserError(f"--set judge.{unknown[0]}: there is no such key; {hint}")
    try:
        return JudgeConfig(**tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"judge.{'.'.join(map(str, first['loc']))}: {first['msg']}, found {first['input']!r}") from None
