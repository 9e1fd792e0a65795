"""Settings of the judge, checked when a recipe or a command line is read. Light to import."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

CHECKED = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
"""Of each section of settings: unknown keys, infinity and NaN are refused, and values cannot be changed."""


def no_boolean_for_a_number(section: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """Refuse true and false for a number, which pydantic takes for 1 and 0. YAML reads `on` and `yes` as true."""
    annotation = section.model_fields[str(info.field_name)].annotation
    kinds = {annotation, *get_args(annotation)}
    if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
        raise ValueError(f"expected a number, found {str(value).lower()}")
    return value


def _no_field_of_ours(fields: dict[str, Any] | None) -> dict[str, Any] | None:
    """Refuse further fields of a request that would take the place of the question, or are no limit of tokens."""
    for name, value in (fields or {}).items():
        if name in ("messages", "model"):
            raise ValueError(f"'{name}' is what the judge is asked, and is no further field: leave it out")
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if name in ("max_tokens", "max_completion_tokens") and value is not None and not whole:
            raise ValueError(f"{name}: expected a whole number of tokens, at least 1, or null; found {value!r}")
    return fields


class PanelMember(BaseModel):
    """A further judge of a panel. What is not given is as the first judge has it."""

    model_config = CHECKED
    _numbers = field_validator("*", mode="before")(classmethod(no_boolean_for_a_number))
    _fields = field_validator("extra_body")(_no_field_of_ours)

    model: str = Field(description="The judge's model, as its server names it.")
    url: str | None = Field(None, description="Base address of its server.")
    api_key_env: str | None = Field(None, description="Environment variable that holds its key.")
    verdict: Literal["auto", "logprobs", "json", "tool", "text"] | None = Field(
        None, description="Where its verdicts are read."
    )
    temperature: float | None = Field(None, ge=0, description="Its sampling temperature.")
    max_tokens: int | None = Field(None, ge=1, description="Most tokens of its replies.")
    extra_body: dict[str, Any] | None = Field(None, description="Further fields of each request to it.")
    price_input: float | None = Field(None, ge=0, description="USD per million prompt tokens.")
    price_output: float | None = Field(None, ge=0, description="USD per million completion tokens.")


class ServedModel(BaseModel):
    """A judge of one's own: vLLM's OpenAI server, started before it is asked and ended after."""

    model_config = CHECKED
    _numbers = field_validator("*", mode="before")(classmethod(no_boolean_for_a_number))

    model: str = Field(description="The model that vLLM serves: a folder, a hub name, or a label of the run.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share the model's weights.")
    data_parallel_size: int = Field(1, ge=1, description="Copies of the model, each on GPUs of its own on one node.")
    dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU and fp32 on a CPU.")
    max_model_len: int | None = Field(
        None, ge=1, description="Tokens of a question and its reply. Unset: what the model knows, at most 16,384."
    )
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of a GPU's memory that vLLM may fill.")
    start_timeout: float = Field(900.0, gt=0, description="Seconds that the server may take to start.")

    @property
    def gpus(self) -> int:
        """GPUs that it takes, on one node, where the cluster has any."""
        return self.tensor_parallel_size * self.data_parallel_size


def _name_of(model: object) -> str:
    """What a model is called: the end of its path or hub name, or the label of a run's folder."""
    path = PurePath(str(model))
    return path.parent.name if path.name == "model" and path.parent.name else path.name


class JudgeConfig(BaseModel):
    """Who judges, and how: an OpenAI-compatible endpoint, a model that vLLM serves meanwhile, or a reward model.

    The API key is read from the environment variable named by `api_key_env` and is written nowhere. With `vllm` or
    `reward_model`, `model` is the judge's name on the board (by default the folder's); with `reward_model`, `protocol`
    is "reward".
    """

    model_config = CHECKED
    _numbers = field_validator("*", mode="before")(classmethod(no_boolean_for_a_number))
    _fields = field_validator("extra_body")(_no_field_of_ours)

    url: str | None = Field(None, description="Base address of an OpenAI-compatible server; it usually ends in /v1.")
    model: str | None = Field(None, description="The judge's model, as its server names it.")
    protocol: str = Field(
        "preference",
        description="How the judge is asked: the name of a protocol such as alpaca_eval, or a YAML file of your own.",
    )
    vllm: ServedModel | None = Field(
        None, description="A model that vLLM serves while it judges, in place of url: its folder, or {model, ...}."
    )
    reward_model: str | None = Field(
        None,
        description="Judges by its scores, in place of url and model: a folder, a hub name, or a label of the run.",
    )
    api_key_env: str = Field("OPENAI_API_KEY", description="Environment variable that holds the key.")
    ca_file: str | None = Field(
        None, description="File of certificates (PEM) to trust, of a server that signs its own. Unset: SSL_CERT_FILE."
    )
    both_orders: bool = Field(False, description="Asks about each pair twice, once in either order: twice the cost.")
    each_other: bool = Field(False, description="Also judges every two trained models of a run against each other.")
    concurrency: int = Field(32, ge=1, description="Most requests in flight.")
    max_retries: int = Field(10, ge=0, description="Times that a question is asked again after a passing failure.")
    timeout: float = Field(120.0, gt=0, description="Seconds that one request may take.")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature of the judge.")
    max_tokens: int | None = Field(None, ge=1, description="Most tokens of a reply. Unset: the protocol's own number.")
    verdict: Literal["auto", "logprobs", "json", "tool", "text"] = Field(
        "auto",
        description="Where verdicts are read: logprobs, json, tool (its call), text. auto: the first that it gives.",
    )
    samples: int = Field(
        1, ge=1, description="Times that each question is asked; the mean counts. Needs a temperature above 0."
    )
    sampling_seed: int | None = Field(
        None, description="Seed sent with each request, plus the number of the sample. Unset: none is sent."
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = Field(
        None, description="How long a reasoning judge may think. Unset: its own default."
    )
    allow_text_verdict: bool = Field(
        False, description="Reads the verdict from the reply's text where the server gives no logprobs."
    )
    extra_body: dict[str, Any] = Field(
        default_factory=dict, description="Further fields of each request; null leaves out one that is sent by default."
    )
    seed: int = Field(0, description="Seed of the order in which the two outputs are shown.")
    budget_usd: float | None = Field(None, ge=0, description="Most USD that one command may spend. Unset: no limit.")
    price_input: float = Field(0.0, ge=0, description="USD per million prompt tokens.")
    price_output: float = Field(0.0, ge=0, description="USD per million completion tokens.")
    max_requests_per_minute: int | None = Field(None, ge=1, description="Most requests a minute. Unset: no limit.")
    max_tokens_per_minute: int | None = Field(
        None, ge=1, description="Most tokens a minute, of prompts and replies together. Unset: no limit."
    )
    calibration: str | None = Field(
        None, description="Folder with instruction_difficulty.csv and df_gamed*.csv, for length-controlled win rates."
    )
    panel: list[PanelMember] = Field(
        default_factory=list,
        description="Further judges, each asked every question: {model, url, ...}. Their verdicts count together.",
    )
    panel_vote: Literal["mean", "majority"] = Field(
        "mean", description="How a panel's verdict is made: the mean, or the winner that most judges name."
    )
    reference: str | None = Field(
        None, description="What outputs are compared with: a model_outputs.json, or a model of the run such as base."
    )

    columns: dict[str, str | None] = Field(
        default_factory=dict,
        description="Which column of the reference's file is what, where its name does not say it: {output: antwort}. "
        "null leaves one out.",
    )
    count_missing: bool = Field(
        False, description="Counts rows without an output as prompts without a verdict, in place of refusing the file."
    )

    @model_validator(mode="before")
    @classmethod
    def _own_model(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if isinstance(value.get("vllm"), str):
            value = {**value, "vllm": {"model": value["vllm"]}}
        given = [name for name in ("url", "vllm", "reward_model") if value.get(name)]
        if len(given) > 1:
            raise ValueError(
                f"{given[-1]} stands in place of a judge's {given[0]}: keep one, and set the other to null"
            )
        if value.get("reward_model"):
            if value.get("panel"):
                raise ValueError("panel: a reward model judges alone; leave one of the two out")
            return {**value, "model": value.get("model") or _name_of(value["reward_model"]), "protocol": "reward"}
        served = value.get("vllm")
        if isinstance(served, dict) and served.get("model"):
            return {**value, "model": value.get("model") or _name_of(served["model"])}
        return value

    @property
    def named(self) -> bool:
        """Whether it says who judges."""
        return bool(self.reward_model or self.vllm or (self.url and self.model))

    @property
    def own_model(self) -> str | None:
        """The model that the pipeline itself loads to judge, if it does: served by vLLM, or a reward model."""
        return self.vllm.model if self.vllm else self.reward_model

    @model_validator(mode="after")
    def _each_judge_once(self) -> JudgeConfig:
        names = [self.model, *(member.model for member in self.panel)]
        if len(set(names)) < len(names):
            raise ValueError("panel: expected judges of different models, found one twice")
        return self
