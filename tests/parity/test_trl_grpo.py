"""GRPO's loss and gradient on the answers of TRL's own trainer: two rounds of two steps each, so that ratios move."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit import load_recipe
from alignkit.assemble import assemble
from alignkit.core.types import Completion, Group
from alignkit.dist.engine import DistEngine
from tests.acceptance import toys
from tests.parity import sides
from tests.parity.flat_script import tiny_grpo

pytestmark = pytest.mark.xdist_group("trl")

PROMPTS, GENERATIONS, LONGEST, ROUNDS, PASSES = 4, 4, 10, 2, 2
RATE, TOLERANCE = 3e-3, 1e-5
OURS: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo"},
    "dapo": {
        "name": "dapo",
        "epsilon_high": 0.2,
        "dynamic_sampling": False,
        "overlong_filter": False,
        "overlong_cache": 0,
    },
    "dr_grpo": {"name": "dr_grpo"},
    "bnpo": {"name": "bnpo"},
}
"""TRL's loss type → our keys."""
CASES = [*((kind, beta, False) for kind in OURS for beta in (0.0, 0.04)), ("grpo", 0.04, True)]
"""Loss type, β, and whether its term counts by the ratio."""


def upper_share(completions: list[str], **_: Any) -> list[float]:
    """The reward: upper-case letters as a share of the longest possible answer."""
    return [sum(letter.isupper() for letter in text) / LONGEST for text in completions]


@dataclass
class Steps:
    """What each step had: the answers by prompt, the loss and the gradient of every weight."""

    answers: list[dict[tuple[int, ...], list[list[int]]]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return toys.write_model(tmp_path_factory.mktemp("model"), sides.SEED)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def trl_steps(kind: str, beta: float, corrected: bool, model_folder: Path, folder: Path) -> Steps:
    """Each round's answers are written by TRL, and learned from twice."""
    from trl import GRPOConfig, GRPOTrainer

    steps = Steps()

    class Recording(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            rows: dict[tuple[int, ...], list[list[int]]] = {}
            for side in zip(
                *(inputs[f"{x}_{y}"] for x in ("prompt", "completion") for y in ("ids", "mask")), strict=True
            ):
                prompt, there, answer, written = side
                rows.setdefault(tuple(prompt[there.bool()].tolist()), []).append(answer[written.bool()].tolist())
            steps.answers.append(rows)
            loss = super()._compute_loss(model, inputs)
            steps.losses.append(loss.item())
            return loss

        def training_step(self, model, *others):
            loss = super().training_step(model, *others)
            steps.gradients.append(gradients(model))
            return loss

    keys = {
        "loss_type": kind,
        "beta": beta,
        "use_bias_correction_kl": corrected,
        "num_generations": GENERATIONS,
        "num_iterations": PASSES,
        "max_completion_length": LONGEST,
        "scale_rewards": "none" if kind == "dr_grpo" else "group",
        "epsilon": 0.2,
        "temperature": 1.0,
        "per_device_train_batch_size": PROMPTS * GENERATIONS,
        "max_steps": ROUNDS * PASSES,
        "learning_rate": RATE,
        "max_grad_norm": 0.0,
        "seed": sides.SEED,
        "train_sampling_strategy": "random",
    }
    prompts = toys.style_prompts(sides.SEED, "parity", ROUNDS * PROMPTS)
    sides.trl_steps(
        Recording,
        GRPOConfig,
        folder,
        [{"prompt": prompt} for prompt in prompts],
        AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(model_folder),
        trainer_keys={"reward_funcs": upper_share},
        **keys,
    )
    return steps


@dataclass
class Replay:
    """An engine that gives answers which somebody wrote before, a round after another."""

    rounds: list[dict[tuple[int, ...], list[list[int]]]]
    decode: Any

    def fill(self, groups: list[Group], n: int) -> list[Group]:
        answers = self.rounds.pop(0)
        assert [len(written) for written in answers.values()] == [n] * len(groups)
        return [
            replace(group, prompt=list(prompt), completions=[Completion(self.decode(ids), ids) for ids in written])
            for group, (prompt, written) in zip(groups, answers.items(), strict=True)
        ]

    def sync(self, version: int) -> None:
        del version


def our_steps(algorithm: dict[str, Any], model_folder: Path, folder: Path, answers: list[Any]) -> Steps:
    """Our loop on those answers, scored and learned from by itself."""
    prompts = [{"prompt": prompt} for prompt in toys.style_prompts(sides.SEED, "others", ROUNDS * PROMPTS)]
    recipe = load_recipe(
        {
            "output_dir": str(folder / "run"),
            "model": {"name_or_path": str(model_folder), "dtype": "float32"},
            "data": [{"path": str(toys.write_rows(folder / "rows.jsonl", prompts))}],
            "algorithm": {**algorithm, "prompts_per_round": PROMPTS},
            "rewards": [{"name": f"{__name__}:upper_share"}],
            "rollout": {"num_generations": GENERATIONS, "max_completion_length": LONGEST},
            "train": {
                "batch_size": PROMPTS * GENERATIONS,
                "epochs_per_round": PASSES,
                "learning_rate": RATE,
                "lr_scheduler": "constant",
                "max_grad_norm": 0.0,
                "max_length": 64,
                "save_steps": 0,
            },
        }
    )
    Path(recipe.output_dir).mkdir()
    run = assemble(recipe, DistEngine(torch.float32), Console(quiet=True))
    trainer, steps = run.trainer, Steps()

    def decode(ids: list[int]) -> str:
        return run.renderer.tokenizer.decode(ids, skip_special_tokens=True)

    trainer.rollouts.engine = Replay(answers[::PASSES], decode)
    move = trainer.dist.step

    def step() -> None:
        steps.gradients.append(gradients(trainer.policy.bare))
        move()

    trainer.dist.step = step  # type: ignore[method-assign]
    trainer.run()
    run.close()
    steps.losses = [record["loss"] for record in sides.records(Path(recipe.output_dir))]
    return steps


@pytest.mark.parametrize(("kind", "beta", "corrected"), CASES)
def test_loss_and_gradient_on_its_own_answers(kind, beta, corrected, model_folder, tmp_path):
    theirs = trl_steps(kind, beta, corrected, model_folder, tmp_path / "trl")
    keys = {**OURS[kind], "beta": beta, "kl_is_correction": corrected}
    ours = our_steps(keys, model_folder, tmp_path, theirs.answers)
    assert len(theirs.losses) == len(ours.losses) == ROUNDS * PASSES
    lengths = {len(answer) for rows in theirs.answers for written in rows.values() for answer in written}
    assert len(lengths) > 1, "with one length all means would be one"
    assert abs(theirs.losses[1] - theirs.losses[0]) > 10 * TOLERANCE, "the second pass must leave the old policy"
    assert ours.losses == pytest.approx(theirs.losses, rel=0, abs=TOLERANCE)
    for mine, other in zip(ours.gradients, theirs.gradients, strict=True):
        assert mine.keys() == other.keys()
        for name, expected in other.items():
            torch.testing.assert_close(
                mine[name], expected, rtol=0, atol=TOLERANCE, msg=lambda text, n=name: f"{n}: {text}"
            )
    assert max(float(x.abs().max()) for x in theirs.gradients[-1].values()) > 1e-3


def test_the_flat_script_agrees_with_trl(model_folder, tmp_path):
    theirs = trl_steps("grpo", 0.04, False, model_folder, tmp_path / "trl")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    learner = tiny_grpo.Learner(model, tiny_grpo.Settings(passes=PASSES, lr=RATE, max_grad_norm=float("inf")))
    losses = []
    for rows in theirs.answers[::PASSES]:
        answers = [tiny_grpo.Answer(list(prompt), ids) for prompt, written in rows.items() for ids in written]
        texts = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in written] for written in rows.values()]
        losses += learner.learn(answers, [upper_share(some) for some in texts])
    assert losses == pytest.approx(theirs.losses, rel=0, abs=TOLERANCE)
