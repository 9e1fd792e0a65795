"""Who judges and how, as groups of options: a verb takes a group as one parameter."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from jobs.cli.options import OutputColumn, Template, columns_of
from jobs.cli.terminal import one_of
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
CountMissing = Annotated[
    bool, typer.Option("--count-missing", help="rows without an output count as prompts without a verdict")
]
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
        said = {name: getattr(self, name) for name in JudgeOptions.__dataclass_fields__ if name != "settings"}
        if model := self.judge_vllm:  # a folder is found from elsewhere too
            said["judge_vllm"] = {"model": str(Path(model).absolute()) if Path(model).is_dir() else model}
        return judge_of(self.settings, **given | {named.get(k, k): v for k, v in said.items() if v is not None})

    @property
    def loaded(self) -> list[str]:
        """The options that name a judge which is loaded here, as far as they are given."""
        return ["--judge-vllm"] if self.judge_vllm else []

    def check(self, option: str = "", reward_model: str | None = None) -> None:
        """Refuse two judges, or none.

        Args:
            option: names the reward model's; empty where none can judge.
            reward_model: what was given there.

        Raises:
            UserError: what was given, and what is to be.
        """
        url, model = self.judge_url, self.judge_model
        ways = {option: reward_model, "--judge-vllm": self.judge_vllm, "--judge-url": url}
        given = [name for name, value in ways.items() if value]
        if len(given) > 1 or (reward_model and model):
            name, *others = [*given, *(["--judge-model"] if reward_model and model else [])]
            raise UserError(f"{name} {ways[name]} stands in place of {' and '.join(others)}: keep one.")
        if not given or (url and not model):
            other = f", or {option} FOLDER" if option else ""
            raise UserError(
                "Who judges? Give --judge-url and --judge-model (an OpenAI-compatible server), or --judge-vllm MODEL,"
                f" which vLLM serves meanwhile{other}."
            )


@dataclass(frozen=True)
class BoardOptions(JudgeOptions):
    """What a person says of a new board: the judge, or a reward model in its place, and how files are read."""

    reward_model: Annotated[
        str | None, typer.Option("--reward-model", help="folder whose scores are compared, in place of a judge's URL")
    ] = None
    template: Template = "auto"
    task: Annotated[str, typer.Option("--task", help="the task's name on the board")] = "alpaca_eval"
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="folder with instruction_difficulty.csv and df_gamed*.csv")
    ] = None
    both_orders: Annotated[bool, typer.Option("--both-orders", help="show every pair to the judge twice")] = False
    column: OutputColumn = None
    count_missing: CountMissing = False

    @property
    def loaded(self) -> list[str]:
        """As `JudgeOptions.loaded`."""
        return [*(["--reward-model"] if self.reward_model else []), *super().loaded]

    def config(self, **given: Any) -> JudgeConfig:
        """As `JudgeOptions.config`."""
        return super().config(
            reward_model=self.reward_model,
            both_orders=self.both_orders,
            calibration=str(self.calibration) if self.calibration else None,
            columns=columns_of(self.column),
            count_missing=self.count_missing,
            **given,
        )

    def rendering(self) -> tuple[str, str]:
        """How a reward model sees prompts (auto, chat or literal), and what to say of it; empty where none judges.

        Raises:
            UserError: another word, or no reward model.
        """
        setting = one_of("--template", self.template, "auto", "chat", "literal")
        if not self.reward_model:
            return setting, ""
        from otpo.data.template import of_model
        from pipeline.judge.reward_model import check_reward_model

        check_reward_model("--reward-model", self.reward_model)
        choice = of_model(setting, self.reward_model)
        return choice.template, f"template  {choice}"


def with_groups(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb whose parameters may be groups (dataclasses): on the command line their fields are options."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for each in inspect.signature(verb, eval_str=True).parameters.values():
        if is_dataclass(each.annotation):
            groups[each.name] = each.annotation
            parameters += _options_of(each.annotation)
        else:
            parameters.append(each.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(verb)
    def wrapped(**words: Any) -> None:
        made = {
            name: group(**{field.name: words.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        verb(**words, **made)

    del wrapped.__wrapped__
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": None}
    return wrapped


def _options_of(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(group)
    ]


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
        # A rule of ours says itself what it found; of the whole section there is no single value to show.
        if (said := first["msg"].removeprefix("Value error, ")) == first["msg"]:
            said = f"{said}, found {first['input']!r}"
        raise UserError(f"{'.'.join(['judge', *map(str, first['loc'])])}: {said}") from None
