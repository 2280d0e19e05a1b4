"""BCO: golden numbers of a published implementation step by step, identities, the shift and its state, the weights."""

import math

import pytest
import torch
from pydantic import ValidationError

from alignkit.algorithms.bco import BCO, BCOConfig, bco_loss
from alignkit.core import Batch, Completion, DataError, Forward, Group, register
from alignkit.dist.world import LocalWorld
from tests.algorithms.fakes import averages, reduce_terms
from tests.shared import golden_case

PARAMETERS = {"beta", "match_underlying_distribution", "min_density_ratio", "max_density_ratio"}


def bco(**keys) -> BCO:
    return BCO(BCOConfig(name="bco", **keys))


def step(algorithm: BCO, ratios, labels, *, held_out=False, reference=None, weights=None):
    """Loss by row and as a whole, gradient by row and metrics of one step, of answers one token long."""
    policy = torch.tensor(ratios, dtype=torch.float64)[:, None].requires_grad_()
    columns = {
        "mask": torch.ones_like(policy, dtype=torch.bool),
        "row": torch.ones(len(ratios), dtype=torch.bool),
        "unit": torch.ones(len(ratios), dtype=torch.bool),
        "label": torch.tensor(labels, dtype=torch.float64),
        "policy.logps": policy.detach(),
        "reference.logps": torch.tensor(reference or [0.0] * len(ratios), dtype=torch.float64)[:, None],
    }
    if weights is not None:
        columns["density_ratio"] = torch.tensor(weights, dtype=torch.float64)
    batch = Batch(inputs={}, columns=columns, k=1)
    batch = (algorithm.annotate_held_out if held_out else algorithm.annotate)(batch, LocalWorld())
    terms, metrics = algorithm.loss(Forward(logps=policy), batch)
    loss = reduce_terms(terms, batch)
    loss.backward()
    logged = averages({name: metric for name, metric in metrics.items() if float(metric.count)})
    return terms["policy"].value.tolist(), loss.item(), policy.grad.flatten().tolist(), logged


def test_it_is_registered_under_its_name():
    assert register.algorithm.get("bco").target is BCO
    assert BCO.config_type is BCOConfig


def test_policy_at_the_reference_has_its_closed_form():
    algorithm = bco(beta=0.3)
    _, loss, gradient, metrics = step(algorithm, [-3.0, -7.0, -2.0], [1, 0, 1], reference=[-3.0, -7.0, -2.0])
    logged = {"loss": loss, **metrics}
    assert {name: logged[name] for name in algorithm.at_reference()} == pytest.approx(algorithm.at_reference())
    assert gradient == pytest.approx([-0.3 / 2 / 3, 0.3 / 2 / 3, -0.3 / 2 / 3])
    assert (logged["delta"], logged["rewards/accuracies"]) == (0.0, 0.0)


def test_two_steps_by_hand():
    algorithm = bco(beta=0.5)
    _, loss, _, metrics = step(algorithm, [4.0, -2.0], [1, 0])  # rewards 2, −1: δ = 0.5
    assert loss == pytest.approx(math.log1p(math.exp(-1.5)), rel=1e-12)
    assert (metrics["delta"], metrics["rewards/accuracies"], metrics["rewards/margins"]) == (0.5, 1.0, 3.0)
    assert metrics["reward_std"] == pytest.approx(math.sqrt(4.5))
    _, _, _, metrics = step(algorithm, [-4.0], [1])  # −2: δ = (2 − 1 − 2)/3
    assert metrics["delta"] == pytest.approx(-1 / 3)
    assert metrics["reward_std"] == pytest.approx(math.sqrt(13 / 3))
    assert metrics["rewards/accuracies"] == 0.0


def test_a_constant_on_all_ratios_changes_nothing():
    first, second = bco(), bco()
    for ratios in ([4.0, -2.0, 1.0], [0.5, 3.0, -1.0]):
        before = step(first, ratios, [1, 0, 1])
        after = step(second, [x + 7 for x in ratios], [1, 0, 1])
        assert after[1] == pytest.approx(before[1], rel=1e-12)


def test_order_matters_between_steps_and_not_within_one():
    one, other, turned = bco(), bco(), bco()
    steps = [([4.0, -2.0], [1, 0]), ([-3.0, 9.0], [0, 1])]
    losses = [step(one, *given)[1] for given in steps]
    within = [step(other, ratios[::-1], labels[::-1])[1] for ratios, labels in steps]
    assert within == pytest.approx(losses, rel=1e-12)
    assert [step(turned, *given)[1] for given in steps[::-1]][::-1] != pytest.approx(losses, rel=1e-3)


def test_the_paper_s_shift_is_halfway_between_the_classes():
    algorithm = bco(beta=1.0, delta_mode="class_balanced", delta_ema=0.5)
    assert step(algorithm, [4.0], [1])[3]["delta"] == 4.0, "the mean of the one class that was seen"
    assert step(algorithm, [-2.0, -4.0], [0, 0])[3]["delta"] == pytest.approx((4 - 3) / 2)
    assert step(algorithm, [2.0, -1.0], [1, 0])[3]["delta"] == pytest.approx((3 - 2) / 2)
    assert bco(delta_mode="class_balanced").config.delta_ema is None


def test_equal_classes_make_both_shifts_of_a_first_step_one():
    given = ([4.0, -2.0, 1.0, -1.0], [1, 0, 1, 0])
    both = [bco(delta_mode=mode, delta_ema=ema) for mode, ema in (("running", None), ("class_balanced", 0.0))]
    deltas = [step(algorithm, *given)[3]["delta"] for algorithm in both]
    assert deltas == pytest.approx([0.05, 0.05])
    lagging, current = (step(algorithm, [-2.0, -4.0], [1, 0])[3]["delta"] for algorithm in both)
    assert (lagging, current) == pytest.approx(((0.05 * 4 - 0.6) / 6, -0.3)), "all six rewards, or the last two"


def test_a_decayed_running_mean_forgets():
    algorithm = bco(beta=1.0, delta_ema=0.5)
    assert [step(algorithm, [x], [1])[3]["delta"] for x in (4.0, 0.0, 0.0)] == [4.0, 2.0, 1.0]


def test_measuring_leaves_the_shift_alone():
    algorithm = bco(beta=1.0)
    step(algorithm, [4.0, -2.0], [1, 0])
    before = algorithm.state_dict()
    assert step(algorithm, [9.0, 9.0], [1, 0], held_out=True)[3]["delta"] == 1.0
    assert algorithm.state_dict() == before


def test_state_continues_elsewhere():
    one, other = bco(delta_mode="class_balanced"), bco(delta_mode="class_balanced")
    step(one, [4.0, -2.0], [1, 0])
    other.load_state_dict(one.state_dict())
    assert step(other, [1.0, 3.0], [1, 0]) == step(one, [1.0, 3.0], [1, 0])


def test_gradient_by_finite_differences():
    ratio = torch.tensor([0.3, -2.0, 4.0], dtype=torch.float64, requires_grad=True)
    label, delta = torch.tensor([True, False, True]), torch.tensor(0.2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: bco_loss(x, label, delta, 0.7), ratio)


def prompts(*texts: str, label: bool) -> list[Group]:
    return [Group(text, [], [3 + ord(c) for c in text], [Completion("", [1])], {"label": label}) for text in texts]


GOOD, BAD = prompts("abcd", "cdef", "bdce", "afcd", label=True), prompts("cdgh", "efhg", "cfde", "ghgh", label=False)


def test_bad_answers_to_prompts_of_good_ones_count_more():
    algorithm = bco(match_underlying_distribution=True)
    algorithm.prepare([*GOOD, *BAD])
    weights = {unit[0].group: unit[0].scalar["density_ratio"] for unit in algorithm.build(BAD)}
    assert weights["cfde"] > 1.2 * weights["cdgh"] > 1.2 * 0.5
    assert weights["ghgh"] == 0.5, "the lower bound"


def lengths(texts: list[str]) -> list[list[float]]:
    """An encoder that sees nothing."""
    return [[0.0] for _ in texts]


def test_a_classifier_that_cannot_tell_equals_plain():
    algorithm = bco(match_underlying_distribution=True, encoder=f"{__name__}:lengths")
    algorithm.prepare([*GOOD, *BAD])
    assert algorithm.density_ratios(BAD) == pytest.approx([1.0] * 4)
    given = ([4.0, -2.0], [1, 0])
    assert step(algorithm, *given, weights=[1.0, 1.0])[:3] == step(bco(), *given)[:3]


def test_a_resumed_run_weighs_as_before():
    algorithm, resumed = (bco(match_underlying_distribution=True) for _ in range(2))
    algorithm.prepare([*GOOD, *BAD])
    resumed.load_state_dict(algorithm.state_dict())
    assert resumed.density_ratios(BAD) == algorithm.density_ratios(BAD)


def test_only_bad_answers_are_weighted():
    ratios, labels = [4.0, -2.0], [1, 0]
    plain, weighted = step(bco(), ratios, labels), step(bco(), ratios, labels, weights=[9.0, 3.0])
    assert weighted[0] == pytest.approx([plain[0][0], 3 * plain[0][1]])
    assert weighted[2] == pytest.approx([plain[2][0], 3 * plain[2][1]])
    assert {weighted[3][f"density_ratio/{name}"] for name in ("mean", "min", "max")} == {3.0}


def flat(texts: list[str]) -> list[float]:
    """An encoder with an answer of the wrong shape."""
    return [0.0 for _ in texts]


def test_an_encoder_with_another_shape_is_refused():
    algorithm = bco(match_underlying_distribution=True, encoder=f"{__name__}:flat")
    with pytest.raises(DataError, match=r"answers 8 prompts with the shape \(8,\); expected \(8, d\)"):
        algorithm.prepare([*GOOD, *BAD])


def test_one_class_has_nothing_to_match():
    with pytest.raises(DataError, match="all labels are the same"):
        bco(match_underlying_distribution=True).prepare(GOOD)


@pytest.mark.parametrize(
    ("key", "value"),
    [("beta", 0.0), ("delta_mode", "mean"), ("delta_ema", 1.0), ("prompt_sample_size", 0)],
)
def test_config_bounds(key, value):
    with pytest.raises(ValidationError, match=key):
        bco(**{key: value})


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"encoder": "a:b"}, "`encoder` is read by `match_underlying_distribution: true` alone"),
        ({"min_density_ratio": 11.0}, "`min_density_ratio` 11 is above `max_density_ratio` 10"),
    ],
)
def test_keys_that_do_not_fit_together(keys, complaint):
    with pytest.raises(ValidationError, match=complaint):
        bco(**keys)


@pytest.mark.parametrize("name", ["running_delta", "underlying_distribution_matching"])
def test_golden_numbers_step_by_step(name):
    """Their moments are kept in float32, hence the tolerance."""
    case = golden_case("bco.json", name)
    algorithm = bco(**{key: value for key, value in case["params"].items() if key in PARAMETERS})
    low, high = algorithm.config.min_density_ratio, algorithm.config.max_density_ratio
    for given in case["steps"]:
        expected = given["outputs"]
        good = len(given["policy_chosen_logps"])
        policy, reference = (given[f"{m}_chosen_logps"] + given[f"{m}_rejected_logps"] for m in ("policy", "ref"))
        labels = [1] * good + [0] * (len(policy) - good)
        chances = given["prob_prompt_is_desirable_for_rejected"]
        weights = None
        if chances is not None:
            weights = [1.0] * good + [min(max(p / (1 - p), low), high) for p in chances]
        held_out = not given["update_running"]
        value, loss, gradient, logged = step(
            algorithm, policy, labels, held_out=held_out, reference=reference, weights=weights
        )
        assert loss == pytest.approx(expected["loss"], rel=1e-5)
        assert value == pytest.approx(expected["losses_chosen_then_rejected"], rel=1e-5)
        gradients = expected["grad_policy_chosen_logps"] + expected["grad_policy_rejected_logps"]
        assert gradient == pytest.approx(gradients, rel=1e-5, abs=1e-6)
        assert logged["delta"] == pytest.approx(expected["delta"], rel=1e-5)
        assert logged["reward_std"] == pytest.approx(expected["running_std"], rel=1e-5)
        assert algorithm.state_dict()["moments"][0] == expected["running_count"]
        for side, rewards in (("chosen", expected["chosen_rewards"]), ("rejected", expected["rejected_rewards"])):
            if rewards:
                assert logged[f"rewards/{side}"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-6)
