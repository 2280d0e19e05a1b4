"""The learning-rate curve, by hand, and which weights decay."""

import pytest
import torch

from alignkit.loop.config import TrainConfig
from alignkit.loop.optim import build_optimizer, build_scheduler, learning_rate_factor


@pytest.mark.parametrize(
    ("scheduler", "warmup", "factors"),
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("constant", 2, [0, 0.5, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25, 0]),
        ("linear", 2, [0, 0.5, 1, 0.5, 0]),
        ("cosine", 0, [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0]),
        ("cosine", 2, [0, 0.5, 1, 0.5, 0]),
    ],
)
def test_factor_over_four_steps_and_the_one_after(scheduler: str, warmup: int, factors: list[float]) -> None:
    config = TrainConfig.model_validate({"lr_scheduler": scheduler, "warmup_steps": warmup})
    assert [learning_rate_factor(step, config, 4) for step in range(5)] == pytest.approx(factors, abs=1e-12)


def test_factor_stays_at_its_end_beyond_the_last_step() -> None:
    for scheduler in ("linear", "cosine"):
        config = TrainConfig.model_validate({"lr_scheduler": scheduler})
        assert learning_rate_factor(9, config, 4) == pytest.approx(0, abs=1e-12)


def test_warm_up_longer_than_the_run() -> None:
    config = TrainConfig(warmup_steps=8)
    assert [learning_rate_factor(step, config, 4) for step in (0, 4, 8)] == [0, 0.5, 1]


def test_scheduler_multiplies_the_recipes_rate() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    config = TrainConfig(learning_rate=0.1, lr_scheduler="linear", warmup_steps=1)
    optimizer = build_optimizer([weight], config)
    scheduler = build_scheduler(optimizer, config, 3)
    rates = []
    for _ in range(3):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0, 0.1, 0.05])


def test_norms_and_biases_do_not_decay() -> None:
    layer = torch.nn.Linear(3, 2)
    groups = build_optimizer(layer.parameters(), TrainConfig(weight_decay=0.1)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {id(layer.weight): 0.1, id(layer.bias): 0.0}
