"""Settings of the judge, checked when a recipe or a command line is read. Light to import."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class JudgeConfig(BaseModel):
    """An OpenAI-compatible chat-completions endpoint and how it is asked; or a reward model, whose scores are compared.

    The API key is read from the environment variable named by `api_key_env` and is written nowhere. With
    `reward_model`, `model` is its name on the board (by default the folder's) and `protocol` is "reward".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str | None = None
    model: str | None = None
    protocol: str = "preference"
    reward_model: str | None = Field(
        None, description="in place of url and model: a folder, a hub name, or a label of the run"
    )
    api_key_env: str = "OPENAI_API_KEY"
    both_orders: bool = False
    each_other: bool = Field(False, description="also judge every two models of a run against each other")
    concurrency: int = Field(32, ge=1)
    max_retries: int = Field(10, ge=0)
    timeout: float = Field(120.0, gt=0)
    temperature: float = Field(0.0, ge=0)
    max_tokens: int | None = Field(None, ge=1, description="the protocol's own number unless given")
    allow_text_verdict: bool = Field(False, description="take a plain m or M where the endpoint gives no logprobs")
    extra_body: dict[str, Any] = Field(
        default_factory=dict, description="further request fields of this endpoint; null leaves one out"
    )
    seed: int = 0
    budget_usd: float | None = Field(None, ge=0)
    price_input: float = Field(0.0, ge=0, description="USD per million prompt tokens")
    price_output: float = Field(0.0, ge=0, description="USD per million completion tokens")
    max_requests_per_minute: int | None = Field(None, ge=1)
    calibration: str | None = Field(None, description="folder with instruction_difficulty.csv and df_gamed*.csv")
    reference: str | None = Field(None, description="model_outputs.json or the label of a model of the run; 'base'")

    @model_validator(mode="before")
    @classmethod
    def _reward_model(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not value.get("reward_model"):
            return value
        path = PurePath(str(value["reward_model"]))
        name = path.parent.name if path.name == "model" and path.parent.name else path.name
        if value.get("url"):
            raise ValueError("reward_model stands in place of a judge's url: keep one, and set the other to null")
        return {**value, "model": value.get("model") or name, "protocol": "reward"}
