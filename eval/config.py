"""Settings of the judge, checked when a recipe or a command line is read. Light to import."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class JudgeConfig(BaseModel):
    """An OpenAI-compatible chat-completions endpoint and how it is asked.

    The API key is read from the environment variable named by `api_key_env` and is written nowhere.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str | None = None
    model: str | None = None
    protocol: str = "preference"
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
