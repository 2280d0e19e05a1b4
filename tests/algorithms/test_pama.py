"""PAMA: what several rewards agree on, by hand and at its limits, and recipes that ask for what it cannot do."""

import pytest
import torch
from torch import Tensor

from alignkit.algorithms.grpo import GRPO, GRPOConfig
from alignkit.algorithms.pama import Pama
from alignkit.core import Batch, RecipeError
from alignkit.core.config import CombineConfig
from alignkit.core.contracts import RolloutFacts
from alignkit.core.types import Forward
from alignkit.dist.world import LocalWorld
from alignkit.recipe import load_recipe
from tests.algorithms.fakes import averages, reduce_terms

NAN = float("nan")
LENGTH = 3


def rewarded(columns: dict[str, list[float]], group: list[int]) -> Batch:
    """Answers of three tokens each, with a prompt token before them."""
    rows = len(group)
    mask = torch.ones(rows, LENGTH + 1, dtype=torch.bool)
    mask[:, 0] = False
    full = {name: torch.zeros(rows, LENGTH + 1) for name in ("policy.logps", "reference.logps")}
    return Batch(
        {"tokens": torch.zeros(rows, LENGTH + 1, dtype=torch.long), "attention": torch.ones_like(mask)},
        {
            "mask": mask,
            "row": torch.ones(rows, dtype=torch.bool),
            "unit": torch.ones(rows, dtype=torch.bool),
            "group": torch.tensor(group, dtype=torch.float32),
            "ended": torch.ones(rows),
            "reward": torch.zeros(rows),
            "behaviour.weight": torch.ones(rows, LENGTH + 1),
            **full,
            **{f"objective.{name}": torch.tensor(values) for name, values in columns.items()},
        },
        1,
    )


def merged(columns, group, weights=None, algorithm=None, **combine):
    """The annotated batch, and the algorithm that made it."""
    made = algorithm or GRPO(GRPOConfig(name="grpo", advantage_eps=0.0))
    weights = dict.fromkeys(columns, 1.0) if weights is None else weights
    combine = CombineConfig(**{"level": "advantage", "mode": "pama", **combine})
    made.take_facts(RolloutFacts(4, 8, weights, combine))
    return made, made.annotate(rewarded(columns, group), LocalWorld())


def advantages(*arguments, **keys) -> Tensor:
    return merged(*arguments, **keys)[1]["advantage"][:, 1]


TWO = {"a": [0.0, 1.0, 2.0, 3.0], "b": [1.0, 0.0, 3.0, 2.0]}
ONE_GROUP = [0, 0, 0, 0]
STD = (5 / 3) ** 0.5


def test_the_least_of_what_is_above_0_by_hand():
    # each (r − 1.5) / 1.29: a −1.5 −.5 .5 1.5, b −.5 −1.5 1.5 .5
    assert advantages(TWO, ONE_GROUP).tolist() == pytest.approx([0, 0, 0.5 / STD, 0.5 / STD])
    signed = advantages(TWO, ONE_GROUP, noon=False)
    assert signed.tolist() == pytest.approx([-0.5 / STD, -0.5 / STD, 0.5 / STD, 0.5 / STD])


def test_a_scale_and_a_copy_of_a_reward_change_nothing():
    found = advantages(TWO, ONE_GROUP)
    torch.testing.assert_close(advantages({**TWO, "a": [20 * x for x in TWO["a"]]}, ONE_GROUP), found)
    torch.testing.assert_close(advantages({**TWO, "c": TWO["b"]}, ONE_GROUP), found)
    torch.testing.assert_close(advantages({"b": TWO["b"], "a": TWO["a"]}, ONE_GROUP), found)


def test_one_reward_is_what_of_grpo_is_above_0():
    alone = advantages({"a": TWO["a"]}, ONE_GROUP)
    assert alone.tolist() == pytest.approx([0, 0, 0.5 / STD, 1.5 / STD])


def test_a_reward_that_is_logged_only_has_no_say():
    weights = {"a": 1.0, "b": 1.0, "c": 0.0}
    found = advantages({**TWO, "c": [9.0, 9.0, 0.0, 0.0]}, ONE_GROUP, weights)
    torch.testing.assert_close(found, advantages(TWO, ONE_GROUP))


def test_a_reward_with_nothing_to_say_of_an_answer_does_not_hold_it_back():
    silent = {**TWO, "c": [0.0, 1.0, NAN, NAN]}
    torch.testing.assert_close(advantages(silent, ONE_GROUP)[2:], advantages(TWO, ONE_GROUP)[2:])


@pytest.mark.parametrize("solver", ["diagonal", "min_norm"])
def test_a_wish_divides(solver):
    """Of two rewards that disagree, the one that weighs more ends up with more of the advantage."""
    columns, group = {"a": [1.0, 0.0, 0.0, 0.0], "b": [0.0, 1.0, 0.0, 0.0]}, ONE_GROUP
    even, wished = (
        advantages(columns, group, {"a": weight, "b": 1.0}, solver=solver, noon=False) for weight in (1.0, 3.0)
    )
    assert even[0] == pytest.approx(float(even[1]))
    assert wished[0] > wished[1]


def test_weights_and_parts_are_logged():
    made, batch = merged(TWO, ONE_GROUP)
    terms, metrics = made.loss(Forward(torch.zeros(4, LENGTH + 1)), batch)
    logged = averages(metrics)
    assert (logged["objectives/a/reward"], logged["objectives/b/reward"]) == (1.5, 1.5)
    assert logged["objectives/a/weight"] + logged["objectives/b/weight"] == pytest.approx(1)
    assert logged["pama/frac_zero"] == 0.5
    assert logged["pama/a_min"] == pytest.approx(2 * 0.5 / STD / 4)
    assert logged["pama/a_max"] == pytest.approx(2 * 1.5 / STD / 4)
    assert reduce_terms(terms, batch).item() == pytest.approx(-0.25 / STD)
    _, metrics = (pair := merged(TWO, ONE_GROUP, solver="min_norm", noon=False))[0].loss(
        Forward(torch.zeros(4, LENGTH + 1)), pair[1]
    )
    assert averages(metrics)["objectives/a/weight"] == pytest.approx(0.5)


def test_an_answer_well_above_its_old_likelihood_has_no_gradient():
    made, batch = merged(TWO, ONE_GROUP)
    logps = torch.full((4, LENGTH + 1), 0.5).requires_grad_()
    made.config = GRPOConfig(name="grpo", beta=0)
    reduce_terms(made.loss(Forward(logps.where(batch["mask"], 0.0)), batch)[0], batch).backward()
    assert logps.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("keys", "weights", "combine", "message"),
    [
        ({"kl_coef": 0.1}, {"a": 1.0}, {}, "algorithm.kl_coef"),
        ({"overlong_cache": 0.2}, {"a": 1.0}, {"mode": "sum"}, "algorithm.overlong_cache"),
        ({"advantage": "opo"}, {"a": 1.0}, {"mode": "sum"}, "advantage: opo is of one reward"),
        ({"advantage": "reinforce_pp"}, {"a": 1.0}, {"mode": "sum"}, "advantage: reinforce_pp is of one"),
        ({}, {"a": 1.0, "b": 2.0}, {}, "set solver: min_norm"),
        ({}, {"a": 1.0, "b": -1.0}, {"solver": "min_norm"}, "cannot work against a reward"),
    ],
)
def test_what_cannot_be_merged_is_refused(keys, weights, combine, message):
    made = GRPO(GRPOConfig(name="grpo", **keys))
    with pytest.raises(RecipeError, match=message):
        made.take_facts(RolloutFacts(4, 8, weights, CombineConfig(**{"level": "advantage", "mode": "pama", **combine})))
    made.take_facts(RolloutFacts(4, 8, weights, CombineConfig()))


@pytest.mark.parametrize(("name", "mode"), [("pama", "pama"), ("mo_grpo", "sum")])
def test_a_recipe_without_its_combination_is_refused(name, mode, tmp_path):
    def read(combine: str):
        text = [f"output_dir: {tmp_path}/run", "model: {name_or_path: M}", "data: [{path: p.jsonl}]", combine]
        more = [f"algorithm: {{name: {name}}}", "rewards: [{name: word_valence}]", "train: {batch_size: 32}"]
        (tmp_path / "recipe.yaml").write_text("\n".join([*text, *more]))
        return load_recipe(tmp_path / "recipe.yaml")

    with pytest.raises(RecipeError, match=rf"combine.level  it is reward, which is not {name}; set level: advantage"):
        read("")
    assert read(f"combine: {{level: advantage, mode: {mode}}}").algorithm.name == name


def test_it_is_grpo_otherwise():
    assert Pama.config_type is GRPOConfig
    torch.testing.assert_close(
        advantages(TWO, ONE_GROUP, algorithm=Pama(GRPOConfig(name="pama"))),
        advantages(TWO, ONE_GROUP, algorithm=GRPO(GRPOConfig(name="grpo"))),
    )
