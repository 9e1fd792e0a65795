"""The sections of a recipe as pydantic models. A field's description is its line in the recipe reference."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from eval.judge.config import CHECKED, JudgeConfig, no_boolean_for_a_number
from otpo.dtypes import TORCH_NAMES
from otpo.errors import UserError
from pipeline.recipe.judged import JUDGED, LENGTHS

WORLD_PREFIX = "world:"  # a path inside the prepared world's folder; `world:judge` is the address of its judge
SAVING_SHARE = 20  # checkpoints by the clock are at least this many times as long apart as one takes to save

_SPELLINGS = {name: short for short, name in TORCH_NAMES.items()}


def short_dtype(value: Any) -> Any:
    """`float32` and `bfloat16`, as torch and vLLM spell them, as a recipe spells them."""
    return _SPELLINGS.get(value, value) if isinstance(value, str) else value


def long_form(section: str, value: Any) -> Any:
    """What the short form of a section stands for: `model: PATH`, `data: PATH`, `methods: [LABEL, ...]`.

    A section whose keys are all commented out is null, and has all defaults.
    """
    if value is None and section in ("data", "train", "generate", "judge", "report", "sweep", "cluster"):
        return {}
    if section in ("model", "data") and isinstance(value, str):
        return {"path": value}
    if section == "methods" and isinstance(value, str):
        return {value: {}}
    if section == "methods" and isinstance(value, list) and all(isinstance(label, str) for label in value):
        return {label: {} for label in value} if len(set(value)) == len(value) else value
    return value


Dtype = Annotated[Literal["fp32", "bf16"], BeforeValidator(short_dtype)]
AutoDtype = Annotated[Literal["auto", "fp32", "bf16"], BeforeValidator(short_dtype)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy, torch and vLLM all take


class Section(BaseModel):
    """A part of a recipe. Unknown keys are refused, and values cannot be changed."""

    model_config = CHECKED
    _numbers = field_validator("*", mode="before")(classmethod(no_boolean_for_a_number))


class LoraConfig(Section):
    """Adapters beside frozen weights (https://arxiv.org/abs/2106.09685); names and meaning are those of peft."""

    r: int = Field(16, ge=1, description="Rank of each adapter.")
    lora_alpha: int = Field(32, ge=1, description="Scale: what an adapter adds is multiplied by lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Fraction of the adapters' inputs that is dropped.")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="Modules that get an adapter: ends of names, a regular expression, or all-linear.",
    )

    @model_validator(mode="after")
    def _some_modules(self) -> LoraConfig:
        if not self.target_modules:
            raise ValueError("target_modules is empty: name modules, for example [q_proj, v_proj], or set all-linear")
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(
                    f"target_modules: '{self.target_modules}' is no regular expression ({error}): name modules in a"
                    " list, for example [q_proj, v_proj], or set all-linear"
                ) from error
        return self


class ModelConfig(Section):
    """The model before training. It is also the reference of every preference method."""

    path: str = Field(description="A model folder or a Hugging Face hub name.")
    attn_implementation: str = Field("sdpa", description="Attention of the training step, as transformers names it.")
    lora: LoraConfig | None = Field(
        None, description="Trains adapters alone, in `base` too; `{}` takes every default. Unset trains all weights."
    )
    quantization: Literal["none", "4bit"] = Field(
        "none", description="How the frozen weights beside adapters are stored; 4bit is QLoRA and needs CUDA GPUs."
    )

    @model_validator(mode="after")
    def _only_adapters_train_in_4_bits(self) -> ModelConfig:
        if self.quantization != "none" and self.lora is None:
            raise ValueError(
                f"quantization is {self.quantization}, and such weights cannot be trained: set model.lora={{}} to train"
                " adapters beside them"
            )
        return self


class PairsConfig(Section):
    """On-policy preference pairs: several completions of each prompt, scored, best against worst."""

    prompts: str = Field(description="A prompts file, or the name of a task.")
    n: int = Field(8, ge=2, description="Completions sampled for each prompt.")
    per_prompt: int = Field(1, ge=1, description="Most pairs kept of each prompt.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling: probability mass that is sampled from.")
    max_tokens: int = Field(512, ge=1, description="Most tokens of a completion.")
    seed: Seed = Field(0, description="Seed of the sampling.")
    limit: int | None = Field(None, ge=1, description="Uses only the first prompts: how many. Unset: all.")
    scorer: JudgeConfig = Field(
        JudgeConfig(protocol="rating"),
        description="Who scores them: a judge that rates from 1 to 10, or a reward model. Keys as in `judge`.",
    )


class TrainConfig(Section):
    """One optimisation run. A label under `methods` (and `base`) may override any of these keys."""

    max_steps: int | None = Field(None, ge=1, description="Optimizer steps. Unset trains for `epochs`.")
    epochs: float = Field(1.0, gt=0, description="Passes over the rows, if max_steps is unset; may be a fraction.")
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw",
        description="AdamW with states in fp32, or (by torchao) in 8 bits: 2 bytes a trained weight instead of 8.",
    )
    learning_rate: float = Field(5e-7, gt=0, description="Peak learning rate of AdamW.")
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the learning rate falls after the warm-up."
    )
    warmup_ratio: float = Field(0.1, ge=0, le=1, description="Fraction of the steps in which the learning rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay; biases and norms have none.")
    max_grad_norm: float = Field(
        1.0, ge=0, allow_inf_nan=True, description="Norm to which larger gradients are clipped; 0 clips none."
    )
    global_batch_size: int = Field(
        128, ge=1, description="Pairs (or completions) of one optimizer step, over all workers and micro-batches."
    )
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="Most pairs (or completions) that a worker computes at once. Unset: 4 on a CPU, all on a GPU.",
    )
    micro_batch_tokens: int | None = Field(
        None, ge=1, description="Most tokens that a worker computes at once. Unset: 2,048 on a CPU, 16,384 on a GPU."
    )
    workers: int = Field(
        2,
        ge=1,
        description="Training workers; each takes one GPU, or a share of the CPUs. [2, 8]: as min_workers 2 and 8.",
    )
    min_workers: int | None = Field(
        None,
        ge=1,
        description="Elastic: trains with as many workers as there is room for, from this number up to `workers`.",
    )
    use_gpu: bool | Literal["auto"] = Field("auto", description="auto takes GPUs if there is one for each worker.")
    dtype: Dtype = Field("bf16", description="Precision of the computation; trained weights stay in fp32.")
    activation_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="Computes activations again in the backward pass: less memory, more time. auto does on GPUs too"
        " small for them.",
    )
    sharding: Literal["auto", "full", "hybrid"] = Field(
        "auto",
        description="Over all workers (full, FSDP) or those of each node (hybrid, HSDP). auto: hybrid on GPU nodes, if"
        " it fits.",
    )
    torch_compile: bool | Literal["auto"] = Field(
        "auto",
        description="Compiles the layers and the loss over the vocabulary, which takes 10 to 20 seconds once. auto does"
        " on GPUs.",
    )
    seed: Seed = Field(42, description="Seed of the order of rows, of dropout and of the held-out rows.")
    eval_every: int | None = Field(None, ge=1, description="Steps between evaluations on held-out rows. Unset: none.")
    save_every: int | None = Field(None, ge=1, description="Steps between checkpoints. Unset: by save_minutes.")
    save_minutes: float | None = Field(
        10.0,
        gt=0,
        description="Minutes between checkpoints where save_every is unset; more where saving is slow. null: none.",
    )
    async_save: bool = Field(
        False,
        description="Writes checkpoints beside training, from a copy in CPU memory of 12 bytes a trained weight.",
    )
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints kept; the best one is kept beside them.")
    best_metric: str | None = Field(
        None, description="Exports the step that is best by this, such as eval_loss or win_rate. Unset: the last step."
    )
    best_mode: Literal["min", "max"] = Field("min", description="Whether a smaller or a larger best_metric is better.")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Evaluations without a better best_metric after which training stops. Unset: never."
    )
    max_failures: int = Field(3, ge=0, description="Times that a failed worker group is started again.")

    @property
    def selects_by_judge(self) -> bool:
        """Whether a judge chooses the best step, among models that are exported every `eval_every` steps."""
        return self.best_metric in (*JUDGED, *LENGTHS)

    @property
    def fewest_workers(self) -> int:
        """Workers that there must be room for."""
        return self.min_workers or self.workers

    @model_validator(mode="before")
    @classmethod
    def _range_of_workers(cls, tree: Any) -> Any:
        workers = tree.get("workers") if isinstance(tree, dict) else None
        if not isinstance(workers, list):
            return tree
        if len(workers) != 2:
            raise ValueError(f"workers: expected a number or [fewest, most], found {workers}")
        if tree.get("min_workers") not in (None, workers[0]):
            raise ValueError(
                f"workers {workers} and min_workers {tree['min_workers']} both say the fewest workers: keep one"
            )
        return {**tree, "min_workers": workers[0], "workers": workers[1]}

    @model_validator(mode="after")
    def _elastic_workers(self) -> TrainConfig:
        if self.min_workers and self.min_workers > self.workers:
            raise ValueError(f"min_workers is {self.min_workers}, more than workers, {self.workers}")
        if self.min_workers and not self.max_failures:
            raise ValueError(
                "min_workers needs max_failures of 1 or more: a lost worker is how a group becomes smaller"
            )
        return self

    @model_validator(mode="after")
    def _best_needs_evaluation(self) -> TrainConfig:
        if (self.best_metric or self.early_stopping_patience) and not self.eval_every:
            raise ValueError("best_metric and early_stopping_patience need train.eval_every: set how often to evaluate")
        if self.best_metric and not self.best_metric.startswith("eval_") and not self.selects_by_judge:
            raise ValueError(
                "best_metric is a figure of an evaluation, for example eval_loss or eval_rewards/accuracies, or of the"
                f" judge's board ({', '.join((*JUDGED, *LENGTHS))}); found '{self.best_metric}'"
            )
        if self.best_metric in JUDGED and self.best_mode == "min":
            raise ValueError(
                f"best_mode is min, which would export the worst step by {self.best_metric}: set it to max"
            )
        if self.early_stopping_patience and not self.best_metric:
            raise ValueError("early_stopping_patience needs train.best_metric, for example eval_loss")
        return self

    @model_validator(mode="after")
    def _states_that_can_be_copied(self) -> TrainConfig:
        if self.async_save and self.optimizer != "adamw":
            raise ValueError(
                f"async_save is for optimizer adamw, found {self.optimizer}: torch cannot copy its states for a save"
                " beside training. Leave async_save out, or set train.optimizer=adamw"
            )
        return self


class GenerateConfig(Section):
    """The outputs that are judged: which prompts, which engine, how they are sampled."""

    tasks: dict[str, str] | list[str] = Field(
        {},
        description="Name of each task and its source: alpaca_eval, tldr or a prompts file; or a source, or a list.",
    )
    limit: int | None = Field(None, ge=1, description="Uses only the first prompts of a task: how many. Unset: all.")
    backend: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="auto is vLLM where it is installed and can serve the model, else transformers."
    )
    workers: int = Field(1, ge=1, description="Engines that work side by side; fewer where fewer fit the cluster.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs of one engine, all of one node.")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Fraction of a GPU's memory that vLLM may fill.")
    dtype: AutoDtype = Field("auto", description="Precision; auto is bf16 on a GPU, fp32 on a CPU.")
    max_model_len: int | None = Field(
        None, ge=8, description="Most tokens of a prompt and its output. Unset: the model's own limit, at most 4,096."
    )
    template: Literal["auto", "chat", "literal"] = Field(
        "auto",
        description="auto: prompts are rendered as in training. Another template than training's is refused.",
    )
    temperature: float = Field(0.0, ge=0, description="Sampling temperature; 0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling: probability mass that is sampled from.")
    max_tokens: int = Field(1024, ge=1, description="Most tokens of an output.")
    seed: Seed = Field(0, description="Seed of the sampling.")

    @field_validator("tasks", mode="before")
    @classmethod
    def _list_of_tasks(cls, value: Any) -> Any:
        """One source stands for a list of one."""
        return [value] if isinstance(value, str) else value

    def named_tasks(self) -> dict[str, str]:
        """Task name -> known name or path; a file in a list is named by its stem."""
        if isinstance(self.tasks, dict):
            return dict(self.tasks)
        names = {
            source if "/" not in source and "." not in source else Path(source).name.split(".")[0]: source
            for source in self.tasks
        }
        if len(names) < len(self.tasks):
            raise UserError(
                f"generate.tasks: two of {self.tasks} have the same name. Give names:"
                " `tasks: {one: a.jsonl, two: b.jsonl}`."
            )
        return names


class ReportConfig(Section):
    """The page and its intervals."""

    title: str | None = Field(None, description="Title of the page. Unset: the run's name.")
    seed: Seed = Field(0, description="Seed of the bootstrap behind every interval.")
    weight_pairs: int = Field(8, ge=0, description="Pairs whose token weights the page shows.")


class ClusterConfig(Section):
    """Where Ray is."""

    address: str | None = Field(None, description="A Ray cluster. Unset: RAY_ADDRESS, else this machine alone.")
    node_wait_minutes: float = Field(
        15.0, gt=0, description="Minutes that training waits for room for its workers after it lost a node."
    )
    silent_minutes: float = Field(
        3.0, ge=0.5, description="Minutes without a response after which a training worker is given up."
    )
