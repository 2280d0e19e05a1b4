"""DPO: closed forms, numbers by hand, golden numbers of two published implementations, invariants."""

import math

import pytest
import torch
from pydantic import ValidationError

from alignkit.algorithms.dpo import DPO, DPOConfig, dpo_loss
from alignkit.core import Completion, Group, register
from tests.algorithms.fakes import averages, pair_batch, reduce_terms, sums_batch
from tests.shared import golden_case

GOLDEN = [
    "sigmoid",
    "sigmoid__extreme_log_ratios",
    "sigmoid__empty_chosen_completion",
    "sigmoid__single_pair",
    "sigmoid__policy_equals_reference",
]


def dpo(**keys) -> DPO:
    return DPO(DPOConfig(name="dpo", **keys))


def loss_of(algorithm: DPO, *sums: list[float]) -> float:
    _, out, batch = sums_batch(*sums)
    return reduce_terms(algorithm.loss(out, batch)[0], batch).item()


def test_it_is_registered_under_its_name():
    assert register.algorithm.get("dpo").target is DPO
    assert DPO.config_type is DPOConfig


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_policy_at_the_reference_has_its_closed_form(beta, label_smoothing):
    algorithm = dpo(beta=beta, label_smoothing=label_smoothing)
    policy, out, batch = sums_batch([-3.0, -7.0, -2.0], [-5.0, -1.0, -2.0], [-3.0, -7.0, -2.0], [-5.0, -1.0, -2.0])
    terms, metrics = algorithm.loss(out, batch)
    loss = reduce_terms(terms, batch)
    loss.backward()
    logged = {"loss": loss.item(), **averages(metrics)}
    assert {name: logged[name] for name in algorithm.at_reference()} == pytest.approx(
        algorithm.at_reference(), abs=1e-15
    )
    # β/2 per pair, divided by three pairs; smoothing takes its share from both sides
    slope = beta * (0.5 - label_smoothing) / 3
    assert policy.grad.flatten().tolist() == pytest.approx([-slope, slope] * 3)
    assert logged["rewards/accuracies"] == 0.0, "a tie is not a hit"


def test_one_pair_by_hand():
    # β·h = 0.5·((−2 + 4) − (−6 + 5)) = 1.5
    policy, out, batch = sums_batch([-2.0], [-6.0], [-4.0], [-5.0])
    terms, metrics = dpo(beta=0.5).loss(out, batch)
    loss = reduce_terms(terms, batch)
    loss.backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.5)), rel=1e-12)
    slope = 0.5 / (1 + math.exp(1.5))
    assert policy.grad.flatten().tolist() == pytest.approx([-slope, slope], rel=1e-12)
    assert averages(metrics) == pytest.approx(
        {
            "rewards/chosen": 1.0,
            "rewards/rejected": -0.5,
            "rewards/margins": 1.5,
            "rewards/accuracies": 1.0,
            "logps/chosen": -2.0,
            "logps/rejected": -6.0,
            "completions/mean_length": 1.0,
        }
    )


def test_the_sum_is_over_the_completion_only():
    policy = torch.tensor([[-1.0, -2.0, -9.0], [-4.0, -9.0, -9.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    out, batch = pair_batch(policy, torch.zeros_like(policy), mask)
    terms, metrics = dpo(beta=1.0).loss(out, batch)
    assert terms["policy"].value.item() == pytest.approx(math.log1p(math.exp(-1.0)))
    assert averages(metrics)["completions/mean_length"] == 1.5


def test_padding_units_count_for_nothing():
    _, out, batch = sums_batch([-2.0, -50.0], [-6.0, -1.0], [-4.0, 0.0], [-5.0, 0.0])
    padded = batch.with_columns({"unit": torch.tensor([True, False]), "row": torch.tensor([True, True, False, False])})
    terms, metrics = dpo(beta=0.5).loss(out, padded)
    assert reduce_terms(terms, padded).item() == pytest.approx(math.log1p(math.exp(-1.5)))
    assert averages(metrics)["rewards/margins"] == pytest.approx(1.5)


SUMS = ([-2.0, -9.0, -4.5], [-6.0, -3.0, -4.0], [-4.0, -8.0, -5.0], [-5.0, -4.0, -5.0])


def test_a_constant_on_both_references_changes_nothing():
    chosen, rejected, ref_chosen, ref_rejected = SUMS
    moved = loss_of(dpo(), chosen, rejected, [x + 3 for x in ref_chosen], [x + 3 for x in ref_rejected])
    assert moved == pytest.approx(loss_of(dpo(), *SUMS), rel=1e-12)


def test_swapping_chosen_and_rejected_turns_the_margin():
    chosen, rejected, ref_chosen, ref_rejected = (torch.tensor(x, dtype=torch.float64) for x in SUMS)
    straight = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.7)
    swapped = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, 0.7)
    margin = 0.7 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    torch.testing.assert_close(swapped - straight, margin)  # log σ(m) − log σ(−m) = m


def test_conservative_dpo_is_the_mix_of_both_directions():
    chosen, rejected, ref_chosen, ref_rejected = (torch.tensor(x, dtype=torch.float64) for x in SUMS)
    mixed = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.7, 0.3)
    straight = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.7)
    swapped = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, 0.7)
    torch.testing.assert_close(mixed, 0.7 * straight + 0.3 * swapped)


def test_gradient_by_finite_differences():
    sums = [torch.tensor(x, dtype=torch.float64, requires_grad=i < 2) for i, x in enumerate(SUMS)]
    assert torch.autograd.gradcheck(lambda w, l, rw, rl: dpo_loss(w, l, rw, rl, 0.3, 0.1), sums)  # noqa: E741


def test_build_takes_the_best_and_the_worst_of_a_group():
    rewards = [0.2, 0.9, 0.9, -1.0, 0.5, -1.0]
    group = Group("g", [], [7, 8], [Completion(str(i), [10 + i, 2], reward=r) for i, r in enumerate(rewards)])
    ((chosen, rejected),) = dpo().build([group])
    assert chosen.tokens == [7, 8, 11, 2]
    assert chosen.trained == [False, False, True, True]
    assert rejected.tokens == [7, 8, 15, 2], (
        "of two equally bad ones the later, so that a tie never pairs one with itself"
    )


@pytest.mark.parametrize(
    ("key", "value"), [("beta", 0.0), ("beta", -1.0), ("label_smoothing", 0.51), ("label_smoothing", -0.1), ("bta", 1)]
)
def test_config_bounds(key, value):
    with pytest.raises(ValidationError, match=key):
        dpo(**{key: value})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers_from_token_log_probabilities(name, dtype, tolerance):
    case = golden_case("dpo.json", name)
    pairs = case["inputs"]["num_pairs"]
    # theirs: all chosen, then all rejected; ours: chosen and rejected of a pair side by side
    side_by_side = torch.arange(2 * pairs).reshape(2, pairs).T.flatten()

    def stacked(values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)[side_by_side].to(dtype)

    policy = stacked(case["inputs"]["policy_token_logps"]).requires_grad_()
    out, batch = pair_batch(
        policy, stacked(case["inputs"]["ref_token_logps"]), stacked(case["inputs"]["completion_mask"])
    )
    terms, metrics = dpo(beta=case["params"]["beta"]).loss(out, batch)
    loss = reduce_terms(terms, batch)
    loss.backward()

    expected, close = case["outputs"], {"rtol": tolerance, "atol": tolerance}
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, torch.tensor(expected["loss"], dtype=dtype), **close)
    torch.testing.assert_close(terms["policy"].value, torch.tensor(expected["per_sample_loss"], dtype=dtype), **close)
    torch.testing.assert_close(policy.grad, stacked(expected["grad_policy_token_logps"]), **close)
    logged = averages(metrics)
    assert {key: logged[key] for key in expected["metrics"]} == pytest.approx(
        expected["metrics"], rel=tolerance, abs=tolerance
    )


@pytest.mark.parametrize("name", ["dpo", "cdpo"])
def test_golden_numbers_of_the_authors_code(name):
    case = golden_case("dpo_original.json", name)
    inputs, expected = case["inputs"], case["outputs"]
    sides = [inputs[f"{model}_{side}_logps"] for model in ("policy", "ref") for side in ("chosen", "rejected")]
    policy, out, batch = sums_batch(*sides)
    algorithm = dpo(**{key: case["params"][key] for key in ("beta", "label_smoothing") if key in case["params"]})
    terms, metrics = algorithm.loss(out, batch)
    loss = reduce_terms(terms, batch)
    loss.backward()

    assert loss.item() == pytest.approx(expected["loss"], rel=1e-9)
    assert terms["policy"].value.tolist() == pytest.approx(expected["per_sample_loss"], rel=1e-9)
    chosen, rejected = policy.grad.reshape(-1, 2).T.tolist()
    assert chosen == pytest.approx(expected["grad_policy_chosen_logps"], rel=1e-9)
    assert rejected == pytest.approx(expected["grad_policy_rejected_logps"], rel=1e-9)
    mean_chosen = sum(expected["chosen_rewards"]) / len(expected["chosen_rewards"])
    assert averages(metrics)["rewards/chosen"] == pytest.approx(mean_chosen, rel=1e-9)
