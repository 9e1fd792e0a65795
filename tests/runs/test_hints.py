"""Keys of other trainers: each is answered, by keys that exist here and values that are accepted."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from otpo.errors import UserError
from otpo.methods import METHODS
from pipeline.recipe import Recipe, load_recipe, make_recipe, set_key
from pipeline.recipe.hints.convert import METHODS as LOSSES
from pipeline.recipe.hints.lookup import KEYS, TABLES, answer_for

TREE = {"name": "x", "model": {"path": "m"}, "data": {"path": "d.json"}, "methods": {"dpo": {}}}


def configs() -> dict[str, type]:
    from transformers import TrainingArguments
    from trl import DPOConfig, KTOConfig, ModelConfig, RewardConfig, ScriptArguments, SFTConfig
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    known = (TrainingArguments, DPOConfig, KTOConfig, ModelConfig, RewardConfig, ScriptArguments, SFTConfig, CPOConfig)
    return {config.__name__: config for config in (*known, ORPOConfig)}


def test_every_field_of_trls_and_transformers_configurations_has_an_answer():
    without = {
        name: [field.name for field in dataclasses.fields(config) if field.name not in KEYS]
        for name, config in configs().items()
    }
    assert {name: fields for name, fields in without.items() if fields} == {}
    assert len(dataclasses.fields(configs()["DPOConfig"])) > 120


def test_every_loss_of_trl_is_a_method():
    told = next(f for f in dataclasses.fields(configs()["DPOConfig"]) if f.name == "loss_type").metadata["help"]
    names = set(re.findall(r"'(\w+)'", told)) - {"sft"}
    assert len(names) > 10 and names <= LOSSES.keys()
    assert set(LOSSES.values()) <= METHODS.keys()


def dotted(model: type[BaseModel], path: str = ""):
    for name, field in model.model_fields.items():
        yield f"{path}{name}"
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from dotted(part, f"{path}{name}.")


@pytest.mark.parametrize("trainer", TABLES)
def test_answers_name_keys_that_exist(trainer):
    known = set(dotted(Recipe))
    hyperparameters = {name for method in METHODS.values() for name in method.hyperparameters} | {"sft_weight"}
    for key, hint in TABLES[trainer].items():
        named = re.findall(
            r"\b((?:train|data|model|generate|judge|pairs|methods)\.[\w.-]*\w)", f"{hint.key} {hint.note}"
        )
        for name in named:
            section, *rest = name.split(".")
            if section == "methods":
                assert rest[0] == "LABEL" or rest[0] in METHODS, f"{key}: {name}"
                assert not rest[1:] or rest[1] in hyperparameters, f"{key}: {name}"
            else:
                assert name in known, f"{key}: {name}"
        answer = hint.answer(None, {})
        assert len(answer) > 15 and answer.endswith(".") and not answer.endswith(".."), f"{key}: {answer}"


def test_where_models_are_judged_the_sections_own_key_comes_before_another_trainers():
    with pytest.raises(UserError, match=r"judge\.vllm\.max_len'\. Did you mean 'max_model_len'"):
        make_recipe(TREE | {"judge": {"vllm": {"model": "m", "max_len": 512}}})
    with pytest.raises(UserError, match=r"train\.max_len'\..*data\.max_length"):
        make_recipe(TREE | {"train": {"max_len": 512}})


def recipe_of(settings) -> Recipe:
    """A small recipe with these settings; only what they say is trained."""
    data = {} if "data.datasets" in settings else {"path": "d.json"}
    tree = {"name": "x", "model": {"path": "m"}, "data": data, "train": {"eval_every": 5}}
    for key, value in sorted(settings.items(), key=lambda item: item[0].count(".")):
        set_key(tree, key, value)
    return make_recipe(tree)


@pytest.mark.parametrize(
    ("key", "value", "config", "settings"),
    [
        ("report_to", "wandb", {}, {"tracking": ["wandb"]}),
        ("report_to", ["tensorboard", "mlflow"], {}, {"tracking": ["tensorboard", "mlflow"]}),
        ("report_to", "none", {}, {"tracking": []}),
        ("gradient_accumulation_steps", 8, {"per_device_train_batch_size": 4}, {"train.global_batch_size": 32}),
        ("gradient_accumulation_steps", 8, {}, {}),
        ("per_device_train_batch_size", 4, {}, {"train.micro_batch_size": 4}),
        ("packing", True, {}, {}),
        ("bf16", True, {}, {"train.dtype": "bf16"}),
        ("bf16", False, {}, {"train.dtype": "fp32"}),
        ("num_train_epochs", 3, {}, {"train.epochs": 3}),
        ("max_steps", -1, {}, {}),
        ("warmup_steps", 50, {"max_steps": 200}, {"train.warmup_ratio": 0.25}),
        ("warmup_steps", 0.1, {}, {"train.warmup_ratio": 0.1}),
        ("loss_type", "ipo", {}, {"methods.ipo": {}}),
        ("loss_type", ["sigmoid", "sft"], {"loss_weights": [0.5, 0.25]}, {"methods.dpo.sft_weight": 0.5}),
        ("loss_type", ["sigmoid", "bco_pair"], {}, {}),
        ("beta", 0.2, {"loss_type": "ipo"}, {"methods.ipo.beta": 0.2}),
        ("beta", 0.2, {"rl": "orpo"}, {"methods.orpo.orpo_lambda": 0.2}),
        ("label_smoothing", 0.001, {"loss_type": "exo_pair"}, {"methods.exo.exo_epsilon": 0.001}),
        ("simpo_gamma", 0.5, {"beta": 2.0, "loss_type": "simpo"}, {"methods.simpo.gamma_beta_ratio": 0.25}),
        ("f_divergence_type", "js_divergence", {}, {"methods.f-dpo.divergence": "js"}),
        ("use_weighting", True, {}, {"methods.wpo": {}}),
        ("max_prompt_length", 512, {}, {"data.max_prompt_length": 512}),
        ("precompute_ref_log_probs", True, {}, {}),
        ("metric_for_best_model", "loss", {}, {"train.best_metric": "eval_loss"}),
        ("greater_is_better", False, {}, {"train.best_mode": "min"}),
        ("save_total_limit", 2, {}, {"train.keep_checkpoints": 2}),
        ("lr_scheduler_type", "constant_with_warmup", {}, {"train.lr_scheduler": "constant"}),
        ("lr_scheduler_type", "polynomial", {}, {}),
        ("optim", "adamw_torch_fused", {}, {"train.optimizer": "adamw"}),
        ("optim", "paged_adamw_8bit", {}, {"train.optimizer": "adamw_8bit"}),
        ("optimizer", "adamw_bnb_8bit", {}, {"train.optimizer": "adamw_8bit"}),
        ("optim", "lion_8bit", {}, {}),
        ("use_cpu", True, {}, {"train.use_gpu": False}),
        ("run_name", "my run/3", {}, {"name": "3"}),
        ("lora_r", 8, {}, {"model.lora.r": 8}),
        ("lora_target_modules", "q_proj,v_proj", {}, {"model.lora.target_modules": ["q_proj", "v_proj"]}),
        ("peft_config", {"r": 8, "bias": "none"}, {}, {"model.lora": {"r": 8}}),
        ("adapter", "qlora", {}, {"model.lora": {}, "model.quantization": "4bit"}),
        ("datasets", [{"path": "a.jsonl", "type": "chatml.intel"}], {}, {"data.path": "a.jsonl"}),
        ("datasets", ["a.jsonl"], {}, {"data.path": "a.jsonl"}),
        ("datasets", [{"path": "x/a", "split": "train[:9]"}, {"path": "x/b", "type": "dpo"}], {},
         {"data.datasets": [{"path": "x/a", "split": "train[:9]"}, {"path": "x/b"}]}),
        ("dataset", "a, b", {"interleave_probs": "0.7,0.3"},
         {"data.datasets": [{"path": "a", "fraction": 0.7}, {"path": "b", "fraction": 0.3}]}),
        ("datasets", [{"data_files": "x"}], {}, {}),
        ("mix_strategy", "interleave_over", {}, {"data.stopping_strategy": "all_exhausted"}),
        ("val_set_size", 0.05, {}, {"data.validation": 0.05}),
        ("rl", "kto", {}, {"methods.kto": {}}),
        ("sequence_len", 2048, {}, {"data.max_length": 2048}),
        ("wandb_project", "mine", {}, {}),
        ("pref_loss", "sigmoid", {"stage": "dpo"}, {"methods.dpo": {}}),
        ("pref_beta", 0.3, {"pref_loss": "hinge", "stage": "dpo"}, {"methods.hinge.beta": 0.3}),
        ("cutoff_len", 4096, {}, {"data.max_length": 4096}),
        ("finetuning_type", "lora", {}, {"model.lora": {}}),
        ("quantization_bit", 4, {}, {"model.quantization": "4bit"}),
        ("input_key", "question", {}, {"data.columns.prompt": "question"}),
        ("rejected_key", "rejected", {}, {}),
        ("max_len", 2048, {}, {"data.max_length": 2048}),
        ("train_batch_size", 128, {}, {"train.global_batch_size": 128}),
        ("beta", 0.2, {"ipo": True}, {"methods.ipo.beta": 0.2}),
        ("dataset", "a,b", {"dataset_probs": "0.7,0.3"},
         {"data.datasets": [{"path": "a", "fraction": 0.7}, {"path": "b", "fraction": 0.3}]}),
        ("enable_thinking", False, {}, {"data.chat_template_kwargs": {"enable_thinking": False}}),
    ],
)  # fmt: skip
def test_values_are_translated_and_accepted(key, value, config, settings):
    assert KEYS[key].settings(value, {**config, key: value}) == settings
    with_adapters = {"model.lora": {}} if "model.quantization" in settings else {}
    assert recipe_of(with_adapters | settings)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"report_to": "wandb"}, ["unknown key 'report_to'. Here it is `tracking: [wandb]`"]),
        ({"train": {"gradient_accumulation_steps": 4, "micro_batch_size": 2}},
         ["unknown key 'train.gradient_accumulation_steps'", "`train.global_batch_size: 8`", "x GPUs"]),
        ({"train": {"packing": True}}, ["unknown key 'train.packing'. Batches hold no padding"]),
        ({"train": {"bf16": True}}, ["`train.dtype: bf16`"]),
        ({"train": {"optim": "adamw_8bit"}}, ["unknown key 'train.optim'. Here it is `train.optimizer: adamw_8bit`"]),
        ({"train": {"num_train_epochs": 3}}, ["`train.epochs: 3`"]),
        ({"data": {"path": "d", "sequence_len": 64}}, ["'data.sequence_len'. Here it is `data.max_length: 64`"]),
        ({"methods": {"dpo": {"loss_type": "ipo"}}}, ["methods.dpo.loss_type", "`methods.ipo: {}`"]),
        ({"methods": {"dpo": {"max_prompt_length": 9}}}, ["dpo.max_prompt_length", "`data.max_prompt_length: 9`"]),
        ({"learning_rate": 1e-6}, ["'learning_rate'. Here it is `train.learning_rate: 1.0e-06`"]),
        ({"train": {"zero_stage": 3}}, ["unknown key 'train.zero_stage'. The model is sharded over train.workers"]),
        ({"data": {"path": "d", "chosen_key": "good"}}, ["'data.chosen_key'. Here it is `data.columns.chosen: good`"]),
        ({"limit": 3}, ["Did you mean", "data.limit"]),
        ({"train": {"lerning_rate": 1}}, ["Did you mean 'learning_rate'?"]),
        ({"train": {"xyz": 1}}, ["Known keys: max_steps,"]),
        ({"train": {"max_steps": -1}}, ["train.max_steps", "leave it out"]),
        ({"train": {"eval_every": 0}}, ["train.eval_every", "leave it out"]),
    ],
)  # fmt: skip
def test_a_foreign_key_in_a_recipe(tree, words):
    with pytest.raises(UserError) as error:
        make_recipe({**TREE, **tree})
    for word in words:
        assert word in str(error.value), str(error.value)


FILES = {
    "TRL": (
        """
        model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
        dataset_name: trl-lib/ultrafeedback_binarized
        loss_type: ipo
        beta: 0.2
        per_device_train_batch_size: 4
        gradient_accumulation_steps: 8
        learning_rate: 5.0e-6
        max_steps: -1
        report_to: wandb
        logging_steps: 10
        use_peft: true
        lora_r: 8
        output_dir: out/qwen ipo
        not_a_key: 1
        """,
        {
            "name": "qwen-ipo", "model": {"path": "Qwen/Qwen2.5-0.5B-Instruct", "lora": {"r": 8}},
            "data": {"path": "trl-lib/ultrafeedback_binarized"}, "methods": {"ipo": {"beta": 0.2}},
            "train": {"micro_batch_size": 4, "global_batch_size": 32, "learning_rate": 5e-6}, "tracking": ["wandb"],
        },
        ["logging_steps: every step is a line", "max_steps: Here it is", "not_a_key: not known here"],
    ),
    "axolotl": (
        """
        base_model: NousResearch/Llama-3.2-1B
        load_in_4bit: true
        adapter: qlora
        lora_r: 32
        lora_target_linear: true
        rl: dpo
        rl_beta: 0.3
        datasets: [{path: argilla/pairs, type: chat_template.default, split: train}]
        val_set_size: 0.1
        sequence_len: 2048
        sample_packing: false
        micro_batch_size: 2
        num_epochs: 2
        optimizer: paged_adamw_8bit
        lr_scheduler: cosine
        learning_rate: 0.0002
        bf16: auto
        flash_attention: true
        wandb_project: mine
        warmup_ratio: 0.1
        evals_per_epoch: 4
        weight_decay: 0.0
        """,
        {
            "name": "config", "model": {"path": "NousResearch/Llama-3.2-1B", "quantization": "4bit",
                                        "lora": {"r": 32, "target_modules": "all-linear"},
                                        "attn_implementation": "flash_attention_2"},
            "data": {"path": "argilla/pairs", "split": "train", "validation": 0.1, "max_length": 2048},
            "methods": {"dpo": {"beta": 0.3}},
            "train": {"micro_batch_size": 2, "global_batch_size": 2, "epochs": 2, "lr_scheduler": "cosine",
                      "learning_rate": 2e-4, "dtype": "bf16", "warmup_ratio": 0.1, "weight_decay": 0.0,
                      "optimizer": "adamw_8bit"},
        },
        ["sample_packing: Batches", "wandb_project:", "evals_per_epoch: Here it is `train.eval_every`"],
    ),
    "LLaMA-Factory": (
        """
        model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
        stage: dpo
        do_train: true
        finetuning_type: lora
        lora_rank: 8
        lora_target: all
        pref_beta: 0.1
        pref_loss: simpo
        simpo_gamma: 0.05
        dataset: dpo_en_demo
        template: llama3
        cutoff_len: 2048
        max_samples: 1000
        overwrite_cache: true
        output_dir: saves/llama3-8b/lora/dpo
        per_device_train_batch_size: 1
        gradient_accumulation_steps: 8
        learning_rate: 5.0e-6
        num_train_epochs: 3.0
        val_size: 0.1
        """,
        {
            "name": "dpo", "model": {"path": "meta-llama/Meta-Llama-3-8B-Instruct",
                                     "lora": {"r": 8, "target_modules": "all-linear"}},
            "data": {"path": "dpo_en_demo", "max_length": 2048, "limit": 1000, "validation": 0.1},
            "methods": {"simpo": {"beta": 0.1, "gamma_beta_ratio": 0.5}},
            "train": {"micro_batch_size": 1, "global_batch_size": 8, "learning_rate": 5e-6, "epochs": 3.0},
        },
        ["template: Here it is `data.template`", "overwrite_cache: rows become token ids"],
    ),
    "OpenRLHF": (
        """
        pretrain: OpenRLHF/Llama-3-8b-sft-mixture
        dataset: OpenRLHF/preference_dataset_mixture2
        prompt_key: question
        chosen_key: chosen
        rejected_key: worse
        apply_chat_template: true
        micro_train_batch_size: 1
        train_batch_size: 256
        zero_stage: 3
        adam_offload: true
        flash_attn: true
        packing_samples: true
        learning_rate: 5.0e-7
        nll_loss_coef: 0.2
        save_path: ./checkpoint/llama3-8b-dpo
        """,
        {
            "name": "llama3-8b-dpo",
            "model": {"path": "OpenRLHF/Llama-3-8b-sft-mixture", "attn_implementation": "flash_attention_2"},
            "data": {"path": "OpenRLHF/preference_dataset_mixture2", "template": "chat",
                     "columns": {"prompt": "question", "rejected": "worse"}},
            "methods": {"dpo": {"sft_weight": 0.2}},
            "train": {"micro_batch_size": 1, "global_batch_size": 256, "learning_rate": 5e-7},
        },
        ["zero_stage: the model is sharded", "adam_offload: Here it is `train.optimizer`", "packing_samples: Batches",
         "chosen_key: `data.columns` says which column"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("trainer", FILES)
def test_a_whole_configuration_is_answered_with_the_recipe(tmp_path, trainer):
    text, recipe, words = FILES[trainer]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(path)
    said = str(error.value)
    assert f"a configuration of {trainer}" in said
    found = yaml.safe_load(said.split("\n\n")[1])
    assert found == recipe
    assert make_recipe(found)
    for word in words:
        assert word.lower() in said.lower(), said


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(
    st.fixed_dictionaries({key: VALUES for key in ("loss_type", "loss_weights", "interleave_probs", "beta")}), VALUES
)
def test_any_value_of_any_key_has_an_answer(config, value):
    for key in KEYS:
        assert answer_for(key, value, config)


def test_a_recipe_with_one_foreign_key_stays_a_recipe():
    with pytest.raises(UserError, match="is not a recipe"):
        make_recipe({**TREE, "report_to": "wandb", "seed": 1, "bf16": True, "packing": True})
    assert answer_for("max_step", 3, {}) is None
