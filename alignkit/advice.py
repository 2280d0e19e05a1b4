"""What an unknown key probably meant: a name remembered from another suite, or a key that lives in another block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import get_args

from alignkit.core.config import Config

RENAMED: Mapping[str, str] = {
    "<<": "extends",
    "activation_checkpointing": "model.gradient_checkpointing",
    "bf16": "model.dtype",
    "cutoff_len": "train.max_length",
    "dataset": "data",
    "dataset_config_name": "data.0.name",
    "dataset_name": "data.0.path",
    "datasets": "data",
    "early_stopping_patience": "eval.patience",
    "early_stopping_threshold": "eval.min_delta",
    "epochs": "train.num_epochs",
    "eval_dataset": "eval.data",
    "eval_steps": "eval.every_steps",
    "fp16": "model.dtype",
    "gradient_accumulation_steps": "train.batch_size",
    "greater_is_better": "eval.best_mode",
    "learning_rate_scheduler": "train.lr_scheduler",
    "load_best_model_at_end": "eval.best_metric",
    "logging_strategy": "train.logging_steps",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_r": "model.lora.r",
    "lora_rank": "model.lora.r",
    "lora_target_modules": "model.lora.target_modules",
    "loss_type": "algorithm.name",
    "lr": "train.learning_rate",
    "lr_scheduler_type": "train.lr_scheduler",
    "max_new_tokens": "eval.sampling.max_completion_length",
    "max_seq_length": "train.max_length",
    "max_train_steps": "train.max_steps",
    "method": "algorithm.name",
    "metric_for_best_model": "eval.best_metric",
    "model_name": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "model_path": "model.name_or_path",
    "num_iterations": "train.epochs_per_round",
    "num_ppo_epochs": "train.epochs_per_round",
    "num_train_epochs": "train.num_epochs",
    "optimizer": "train.optim",
    "peft_config": "model.lora",
    "per_device_eval_batch_size": "train.micro_batch_size",
    "per_device_train_batch_size": "train.batch_size",
    "precompute_ref_log_probs": "models.reference.precompute",
    "ref_model": "models.reference",
    "report_to": "track",
    "reward_funcs": "rewards",
    "run_name": "track.wandb.name",
    "torch_dtype": "model.dtype",
    "train_dataset": "data",
    "use_peft": "model.lora",
    "wandb_project": "track.wandb.project",
    "warmup_ratio": "train.warmup_steps",
    "weight_decay_rate": "train.weight_decay",
}
"""Other suites' key → ours, as a path from the root of the recipe."""


def advise(block: str, key: str, homes: Mapping[str, list[str]]) -> str | None:
    """What to write instead of `key` in the block `block`; None = no better idea than its nearest sibling.

    `homes` maps every key of the schema to the blocks that have it.
    """
    if key in RENAMED:
        target = RENAMED[key]
        parent, _, name = target.rpartition(".")
        return f"did you mean {name!r}?" if parent == block else f"alignkit calls it `{target}`"
    elsewhere = [home for home in homes.get(key, ()) if home != block]
    if not elsewhere:
        return None
    shown = " or ".join(f"`{home}`" if home else "the root of the recipe" for home in elsewhere[:3])
    return f"`{key}` belongs {'at' if shown.startswith('the root') else 'under'} {shown}"


def key_homes(config_type: type[Config], chosen: Mapping[type[Config], type[Config]]) -> dict[str, list[str]]:
    """Every key of a schema → the dotted blocks it stands in; `chosen` replaces base configs by what a name picked."""
    homes: dict[str, list[str]] = {}
    for block, key in _walk(config_type, "", chosen):
        homes.setdefault(key, []).append(block)
    return homes


def _walk(
    config_type: type[Config], block: str, chosen: Mapping[type[Config], type[Config]]
) -> Iterator[tuple[str, str]]:
    for name, info in chosen.get(config_type, config_type).model_fields.items():
        key = info.alias or name
        yield block, key
        for inner in _configs(info.annotation):
            yield from _walk(inner, f"{block}.{key}" if block else key, chosen)


def _configs(annotation: object) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for argument in get_args(annotation):
        yield from _configs(argument)
