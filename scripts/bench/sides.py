"""The two sides: each turns a job into a trainer that stops at the gate before its first step and after every one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from bench.gate import Evidence, Gate, Stopped, rows_of
from bench.job import BETA, MAX_GRAD_NORM, Job
from bench.workloads import even_share

Side = Callable[[Job, Gate], Evidence]


def alignkit_side(job: Job, gate: Gate) -> Evidence:
    """`alignkit train`: only where its trainer stops is ours."""
    import_shared(job)
    from alignkit import load_recipe, run

    gate.imported()
    evidence, assemble = Evidence(), run.assemble

    def gated(*arguments: Any) -> Any:
        assembled = assemble(*arguments)
        gate.model_built()
        trainer = assembled.trainer
        collect, train, due = trainer.rollouts.collect, trainer.run, trainer.due

        def observed(version: int) -> Any:
            groups, metrics = collect(version)
            if job.samples:
                evidence.batches.append([(tuple(g.prompt),) for g in groups])
                evidence.lengths.append([len(c.tokens) for g in groups for c in g.completions])
            else:
                evidence.batches.append(
                    [
                        (tuple(g.prompt), *(tuple(c.tokens) for c in sorted(g.completions, key=lambda c: -c.reward)))
                        for g in groups
                    ]
                )
            return groups, metrics

        def begun() -> None:
            gate.passed()
            train()

        def stepped() -> None:
            due()
            gate.passed()

        trainer.rollouts.collect, trainer.run, trainer.due = observed, begun, stepped
        return assembled

    run.assemble = gated
    output = job.output_folder("alignkit")
    recipe = {
        "seed": job.seed,
        "output_dir": str(output),
        "model": {
            "name_or_path": str(job.model_folder),
            "dtype": "bfloat16" if job.device == "cuda" else "float32",
            "layout": job.layout,
        },
        "data": [{"path": str(job.rows_file)}],
        "algorithm": {"name": job.algorithm, "beta": BETA},
        **(written_by_ourselves(job) if job.samples else {}),
        "train": {
            "num_epochs": 1,
            "batch_size": job.batch_size,
            "learning_rate": job.learning_rate,
            "lr_scheduler": "constant",
            "max_grad_norm": MAX_GRAD_NORM,
            "max_length": job.max_length,
            "save_steps": 0,
        },
    }
    with suppress(Stopped):
        run.train(load_recipe(recipe), report=False)
        raise RuntimeError("alignkit trained to its end and never stopped at the gate")
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "loss" in record]
    evidence.losses, evidence.grad_norms = ([step[name] for step in steps] for name in ("loss", "grad_norm"))
    evidence.facts = {"threads": threads()}
    if job.samples:
        apart = [step["sampling/sampling_logp_difference/max"] for step in steps]
        evidence.facts["sampling_logp_difference"] = max(apart)
    return evidence


def written_by_ourselves(job: Job) -> dict[str, Any]:
    """What a recipe says of completions that the run writes itself; the loss is what TRL's is by default."""
    return {
        "algorithm": {"name": job.algorithm, "beta": 0.0, "aggregation": "token_mean"},
        "rewards": [{"name": f"{even_share.__module__}:{even_share.__name__}"}],
        "rollout": {"num_generations": job.samples, "max_completion_length": job.longest},
    }


def trl_side(job: Job, gate: Gate) -> Evidence:
    """TRL's own trainer, at its strongest."""
    import_shared(job)
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    config_type, trainer_type, columns = {
        "dpo": (trl.DPOConfig, trl.DPOTrainer, ("prompt_ids", "chosen_ids", "rejected_ids")),
        "kto": (trl.KTOConfig, trl.KTOTrainer, ("prompt_ids", "completion_ids")),
        "grpo": (trl.GRPOConfig, trl.GRPOTrainer, ()),
    }[job.algorithm]
    rows_given: dict[str, Any] = {
        "beta": BETA,
        "max_length": job.max_length,
        "train_sampling_strategy": "sequential",
        "precompute_ref_log_probs": True,
    }
    rows_written: dict[str, Any] = {
        "beta": 0.0,
        "loss_type": "dapo",
        "epsilon": 0.2,
        "scale_rewards": "group",
        "num_generations": job.samples,
        "max_completion_length": job.longest,
        "steps_per_generation": 1,
        "shuffle_dataset": False,
        "disable_dropout": True,
    }
    heads = watch_head(job.compact)
    gate.imported()
    evidence = Evidence()

    class Stops(TrainerCallback):
        """Before the first step, and where a step's record is logged: behind everything that belongs to it."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            gate.passed()

        def on_log(self, *_: Any, logs: Mapping[str, float], **__: Any) -> None:
            if "loss" in logs:
                evidence.losses.append(logs["loss"])
                evidence.grad_norms.append(logs["grad_norm"])
                gate.passed()

    args = config_type(
        output_dir=str(job.output_folder("trl")),
        seed=job.seed,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
        weight_decay=0.0,
        optim="adamw_torch_fused",
        per_device_train_batch_size=job.batch_size,
        gradient_accumulation_steps=1,
        max_steps=job.rows // job.rows_a_step,
        gradient_checkpointing=False,
        bf16=job.device == "cuda",
        use_cpu=job.device == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **(rows_written if job.samples else rows_given),
    )
    tokenizer = AutoTokenizer.from_pretrained(job.model_folder)
    model = AutoModelForCausalLM.from_pretrained(job.model_folder, dtype=torch.float32).to(job.device)
    gate.model_built()
    rows = [json.loads(line) for line in job.ordered_file.read_text(encoding="utf-8").splitlines()]
    trainer = trainer_type(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Stops()],
        **({"reward_funcs": even_share} if job.samples else {}),
    )
    if job.samples:
        generate = trainer._generate_single_turn

        def generated(prompts: list[list[int]], *others: Any) -> Any:
            answers = generate(prompts, *others)
            evidence.batches.append([(prompt,) for prompt in dict.fromkeys(map(tuple, prompts))])
            evidence.lengths.append([len(answer) for answer in answers[0]])
            return answers

        trainer._generate_single_turn = generated
    else:
        collator = trainer.data_collator

        def collated(examples: list[dict[str, Any]]) -> Any:
            evidence.batches.append(rows_of(examples, columns))
            return collator(examples)

        trainer.data_collator = collated
    with suppress(Stopped):
        trainer.train()
        raise RuntimeError("TRL trained to its end and never stopped at the gate")
    evidence.facts = {
        "threads": threads(),
        "attention": model.config._attn_implementation,
        "optimizer": f"{type(trainer.optimizer.optimizer).__name__} fused={trainer.optimizer.defaults['fused']}",
        "head_scores_completions_only": heads.pop(),
    }
    check_strongest(trainer, evidence.facts, job)
    return evidence


SIDES: Mapping[str, Side] = {"alignkit": alignkit_side, "trl": trl_side}
"""What races on each side."""


def import_shared(job: Job) -> None:
    """What both sides import at some time, imported now; and what must be equal: threads and tokenizer."""
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM  # noqa: F401
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    # For a folder with a Qwen2 model transformers trusts no other tokenizer than Qwen2's; ours is word-level.
    TOKENIZER_MAPPING_NAMES["qwen2"] = "TokenizersBackend"
    torch.set_num_threads(job.threads)


def threads() -> int:
    """Threads of one operation."""
    import torch

    return torch.get_num_threads()


def watch_head(compact: bool | None) -> set[bool]:
    """Set whether TRL's fused head scores completions only (None: as it decides); the answers it gets are collected."""
    from trl.trainer import utils

    answers: set[bool] = set()
    decide = utils._use_triton

    def answer(device: Any) -> bool:
        answers.add(decide(device) if compact is None else compact)
        return next(iter(answers))

    utils._use_triton = answer
    return answers


def check_strongest(trainer: Any, facts: Mapping[str, Any], job: Job) -> None:
    """Raises RuntimeError when TRL ran slower than it can: a ratio against it would flatter."""
    wanted = {
        "SDPA attention": facts["attention"] == "sdpa",
        "a fused optimizer": facts["optimizer"] == "AdamW fused=True",
        "no gradient checkpointing": not trainer.model.is_gradient_checkpointing,
        "a reference that costs nothing": trainer.ref_model is None and (job.samples or trainer.precompute_ref_logps),
        "dropout off": all(m.p == 0 for m in trainer.model.modules() if type(m).__name__ == "Dropout"),
        "a fused head": facts["head_scores_completions_only"]
        in ({True, False} if job.compact is None else {job.compact}),
    }
    missing = [name for name, holds in wanted.items() if not holds]
    if missing:
        raise RuntimeError(f"TRL ran without {', '.join(missing)}")
