"""CREAM: golden numbers of the authors' code, how C is made, identities, and the real loop."""

import math

import pytest
import torch
from pydantic import ValidationError

from alignkit import testing
from alignkit.algorithms.cream import CREAM, CREAMConfig, consistency, cream_loss
from alignkit.algorithms.dpo import DPO, DPOConfig
from alignkit.core import Completion, DataError, Forward, Group, RecipeError
from alignkit.core.config import CombineConfig
from alignkit.core.contracts import RolloutFacts
from alignkit.core.types import Score
from alignkit.dist.world import LocalWorld
from tests.algorithms.fakes import averages, reduce_terms, sums_batch
from tests.algorithms.rounds import on_ranks
from tests.shared import golden_case

ALONE, NAN = LocalWorld(), float("nan")


def cream(**keys) -> CREAM:
    algorithm = CREAM(CREAMConfig(name="cream", **keys))
    algorithm.take_facts(RolloutFacts(3, 8, {"implicit": 1.0}, CombineConfig()))
    return algorithm


def group(now, before, name="g", ended=None):
    """A prompt whose answers have one token each, its number."""
    answers = [
        Completion(
            str(i),
            [i + 2],
            logps=[-1.0],
            scores={
                "implicit": Score(x, not math.isnan(x)),
                "implicit/previous": Score(y, not math.isnan(y)),
            },
            reward=x,
            version=0,
            ended=ended[i] if ended else True,
        )
        for i, (x, y) in enumerate(zip(now, before, strict=True))
    ]
    return Group(name, [], [1], answers)


def answers_of(unit):
    return [row.tokens[-1] - 2 for row in unit]


LOSSES = ["sample_level", "dataset_level", "consistency_one_is_dpo", "consistency_half_is_symmetric", "plain_dpo"]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_losses(name, dtype):
    case = golden_case("cream.json", name)
    given = {key: torch.tensor(x, dtype=dtype) for key, x in case["inputs"].items()}
    chosen, rejected = (given[f"policy_{side}_logps"].requires_grad_() for side in ("chosen", "rejected"))
    refs = given["ref_chosen_logps"], given["ref_rejected_logps"]
    loss = cream_loss(chosen, rejected, *refs, given["consistency"], case["params"]["beta"]).mean()
    loss.backward()
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    expected = case["outputs"]
    torch.testing.assert_close(loss.detach(), torch.tensor(expected["loss"], dtype=dtype), **close)
    for leaf, side in ((chosen, "chosen"), (rejected, "rejected")):
        told = torch.tensor(expected[f"grad_policy_{side}_logps"], dtype=dtype)
        torch.testing.assert_close(leaf.grad, told, **close)


@pytest.mark.parametrize("name", ["sample_level", "dataset_level"])
def test_golden_losses_through_the_class(name):
    case = golden_case("cream.json", name)
    given = case["inputs"]
    sides = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    policy, out, batch = sums_batch(*(given[side] for side in sides))
    rows = torch.tensor(given["consistency"], dtype=torch.float64).repeat_interleave(2)
    algorithm = cream(beta=case["params"]["beta"], method="dynamic")
    batch = algorithm.annotate(batch.with_columns({"consistency": rows}), ALONE)
    terms, metrics = algorithm.loss(out, batch)
    loss = reduce_terms(terms, batch)
    loss.backward()
    assert loss.item() == pytest.approx(case["outputs"]["loss"], abs=1e-9)
    assert policy.grad[::2, 0].tolist() == pytest.approx(case["outputs"]["grad_policy_chosen_logps"], abs=1e-9)
    assert averages(metrics)["rewards/accuracies"] == pytest.approx(case["outputs"]["reward_accuracy"])


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("consistency_kendall", {"consistency": "kendall", "ties": "ordinal"}),
        ("consistency_spearman", {"consistency": "spearman"}),
        ("consistency_toporder", {"consistency": "top_order", "toporder_compat": True}),
    ],
)
def test_golden_consistency(name, keys):
    case = golden_case("cream.json", name)
    config = CREAMConfig(name="cream", **keys)
    given, expected = case["inputs"], case["outputs"]
    found = {
        prompt: consistency(
            torch.tensor(now, dtype=torch.float64),
            torch.tensor(given["rewards_previous"][prompt], dtype=torch.float64),
            config,
        )
        for prompt, now in given["rewards_current"].items()
    }
    told = next(x for x in expected.values() if isinstance(x, dict))
    assert found == pytest.approx(told, abs=1e-9)


def test_consistency_by_hand():
    kendall, top = CREAMConfig(name="cream"), CREAMConfig(name="cream", consistency="top_order")
    now = torch.tensor([3.0, 1.0, 2.0])
    assert consistency(now, now, kendall) == consistency(now, now.exp(), kendall) == 1
    assert consistency(now, -now, kendall) == 0
    assert consistency(now[:2], now[:2].flip(0), kendall) == 0  # two answers agree or do not
    assert consistency(now, torch.tensor([3.0, 2.0, 1.0]), kendall) == pytest.approx((1 / 3 + 1) / 2)
    assert consistency(now, torch.tensor([1.0, 1.0, 1.0]), kendall) == 0.5  # says nothing
    assert consistency(now, torch.tensor([9.0, 0.0, 8.0]), top) == 1
    assert consistency(now, torch.tensor([9.0, 8.0, 0.0]), top) == 0


def test_a_pair_is_the_best_and_the_worst_of_what_was_scored():
    pair = cream().build([group([0.0, 2.0, -1.0], [0.0, 1.0, 2.0])])[0]
    assert answers_of(pair) == [1, 2]
    assert not pair[0].token  # what the writer said of its tokens is not asked
    assert [answers_of(u) for u in cream().build([group([0.0, NAN, -1.0], [0.0, 1.0, 2.0])])] == [[0, 2]]
    assert cream().build([group([1.0, 1.0, 1.0], [0.0, 1.0, 2.0])]) == []  # nothing to choose
    assert cream().build([group([NAN, NAN, 1.0], [0.0, 1.0, 2.0])]) == []
    assert cream(min_gap=0.5).build([group([0.0, 0.5, 0.2], [0.0, 1.0, 2.0])]) == []
    cut = group([3.0, 2.5, 0.0], [0.0, 0.0, 0.0], ended=[False, True, True])
    assert answers_of(cream().build([cut])[0]) == [0, 2]
    assert answers_of(cream(missing_eos_penalty=1.0).build([cut])[0]) == [1, 2]


def test_a_chosen_answer_that_is_too_long_is_no_lesson():
    long = group([1.0, 0.0], [1.0, 0.0])
    long.completions[0].tokens = [2, 2, 2]
    assert cream(max_length_ratio=2.0).build([long]) == []
    assert len(cream(max_length_ratio=3.0).build([long])) == 1


def annotated(units, algorithm, world=ALONE):
    rows = torch.tensor([row.scalar["consistency"] for unit in units for row in unit])
    _, _, batch = sums_batch(*([0.0] * len(units) for _ in range(4)))
    return algorithm.annotate(batch.with_columns({"consistency": rows}), world)


def test_one_c_for_the_round_is_the_mean_over_all_processes():
    agree, reverse, unknown = ([3.0, 1.0], [3.0, 1.0]), ([3.0, 1.0], [1.0, 3.0]), ([3.0, 1.0], [NAN, NAN])
    algorithm = cream()
    shares = [[group(*agree), group(*unknown)], [group(*agree), group(*reverse)]]
    found = on_ranks(lambda groups, world: annotated(algorithm.build(groups), algorithm, world)["agreed"], shares)
    assert [x.tolist() for x in found] == [pytest.approx([2 / 3, 2 / 3])] * 2
    own = cream(method="dynamic")
    both = [group(*agree), group(*reverse), group(*unknown)]
    assert annotated(own.build(both), own)["agreed"].tolist() == pytest.approx([1, 0, 0.5])
    floored = cream(method="dynamic", floor_c=0.5)
    assert annotated(floored.build(both), floored)["agreed"].tolist() == pytest.approx([1, 0.5, 0.5])
    assert len(cream(missing="drop").build(both)) == 2
    fixed = cream(fixed_consistency=0.75)
    assert annotated(fixed.build(both), fixed)["agreed"].tolist() == [0.75] * 3


def test_identities_of_the_loss():
    h = torch.linspace(-30, 30, 13, dtype=torch.float64)
    zero = torch.zeros_like(h)

    def loss(h, c, beta=0.3):
        return cream_loss(h, zero, zero, zero, torch.full_like(h, c), beta)

    torch.testing.assert_close(loss(h, 0.5), loss(-h, 0.5))
    torch.testing.assert_close(loss(h, 0.2), loss(-h, 0.8))
    best = torch.tensor([math.log(0.8 / 0.2) / 0.3], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    loss(best, 0.8).sum().backward()
    assert best.grad.abs().item() < 1e-12


def test_what_cannot_be_is_refused():
    with pytest.raises(RecipeError, match="2 rewards have a weight"):
        CREAM(CREAMConfig(name="cream")).take_facts(RolloutFacts(3, 8, {"a": 1.0, "b": 1.0}, CombineConfig()))
    alone = group([1.0, 0.0], [1.0, 0.0])
    for answer in alone.completions:
        del answer.scores["implicit/previous"]
    with pytest.raises(DataError, match="'implicit' does not tell"):
        cream().build([alone])
    assert len(cream(fixed_consistency=1.0).build([alone])) == 1
    with pytest.raises(ValidationError, match="give prompts_per_round"):
        CREAMConfig(name="cream", rounds=None)


def test_with_certain_labels_it_is_dpo_to_the_last_bit():
    logps = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)) * 30
    _, out, batch = sums_batch(*logps.double().tolist())
    out, batch = Forward(out.logps.float()), batch.with_columns({"reference.logps": batch["reference.logps"].float()})
    dpo = DPO(DPOConfig(name="dpo"))
    expected = dpo.loss(out, dpo.annotate(batch, ALONE))[0]["sigmoid"].value
    batch = batch.with_columns({"consistency": torch.ones(2000)})
    certain = cream(method="dynamic")
    assert torch.equal(certain.loss(out, certain.annotate(batch, ALONE))[0]["policy"].value, expected)


def test_with_certain_labels_it_is_self_rewarding(tmp_path):
    """Weights and losses of whole runs, round after round."""
    found = {}
    for name, keys in (("cream", {"fixed_consistency": 1.0}), ("self_rewarding", {})):
        bench = testing.Bench(name, folder=tmp_path / name, config=keys)
        run = testing.train(bench.recipe("run", max_steps=4, num_epochs=4), quiet=True, report=False).folder
        found[name] = testing.digest(run), [record["loss"] for record in testing.read_metrics(run)]
    assert found["cream"] == found["self_rewarding"]


def test_its_models_move_once_a_round(tmp_path):
    """The reference is the policy of the round's beginning, `previous` that of the round before, `base` the start."""
    bench = testing.Bench("cream", folder=tmp_path)
    recipe = bench.recipe("run", max_steps=6, num_epochs=6, epochs_per_round=2)
    recipe = recipe.model_copy(update={"rewards": [], "algorithm": recipe.algorithm.model_copy(update={"rounds": 3})})
    run = testing.train(recipe, quiet=True, report=False).folder
    records = testing.read_metrics(run)
    assert [record["rewards/margins"] for record in records][::2] == pytest.approx([0.0] * 3, abs=1e-5)
    assert all(abs(record["rewards/margins"]) > 1e-6 for record in records[1::2])
    told = [record for record in records if "cream/consistency" in record]
    assert told[0]["cream/consistency"] == pytest.approx(1.0)  # the start is both judges
    assert records[4]["cream/consistency"] < 1.0


def test_a_row_knows_its_consistency():
    unit = cream().build([group([0.0, 2.0, -1.0], [0.0, 2.0, -1.0])])[0]
    assert [row.scalar["consistency"] for row in unit] == [1.0, 1.0]
    assert unit[0].tokens == [1, 3]
