"""Recomputing activations changes memory and time, never a gradient."""

import pytest

from alignkit.data.collate import collate
from alignkit.testing import gradient_step, relative_difference
from tests.models.workshop import LORA, assembled


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_gradients_are_the_same(workshop, lora):
    found = {
        on: gradient_step(
            workshop.recipe(f"on-{on}-{lora is None}", model={"gradient_checkpointing": on, "lora": lora})
        )
        for on in (False, True)
    }
    assert found[False][0]
    assert relative_difference(found[True][0], found[False][0]) <= 1e-6
    assert found[True][1]["loss"] == pytest.approx(found[False][1]["loss"], abs=1e-6)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("on", [False, True])
def test_layers_run_again_in_the_backward_pass(workshop, lora, on):
    recipe = workshop.recipe("twice", model={"gradient_checkpointing": on, "lora": lora})
    run = assembled(recipe)
    run.close()
    passes = []
    mlp = next(m for name, m in run.trainer.policy.bare.named_modules() if name.endswith("layers.0.mlp"))
    mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    run.trainer.policy.module.train()
    batch = collate(run.trainer.algorithm.build(run.groups))
    run.trainer.policy.forward(batch, frozenset({"logps"})).logps.sum().backward()
    assert len(passes) == (2 if on else 1)
