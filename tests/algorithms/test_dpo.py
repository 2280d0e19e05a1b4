"""DPO and its variants: closed forms, numbers by hand, golden numbers of two published implementations, invariants."""

import math

import pytest
import torch
from pydantic import ValidationError

from alignkit import ops
from alignkit.algorithms.dpo import DPO, LOSSES, WPO, DPOConfig
from alignkit.core import Completion, DataError, Forward, Group, register
from alignkit.dist.world import LocalWorld
from alignkit.recipe import load_recipe
from alignkit.testing import Bench, check_micro_batches, gradient_step, toy_rows
from tests.algorithms.fakes import averages, pair_batch, reduce_terms, sums_batch
from tests.shared import golden_case

PAIR_LOSSES = sorted(LOSSES)
DIFFERENCE_LOSSES = [name for name in PAIR_LOSSES if LOSSES[name].of_difference]
SMOOTHING = {"robust": 0.1, "exo_pair": 0.1}

GOLDEN = [
    "sigmoid",
    "hinge",
    "ipo",
    "nca_pair",
    "bco_pair",
    "apo_zero",
    "apo_down",
    "sigmoid_norm",
    "exo_pair",
    "robust",
    "sppo_hard",
    "discopop",
    "sigmoid_forward_kl",
    "sigmoid_js",
    "hinge_js",
    "sigmoid_alpha_f32",
    "sigmoid_alpha_one_f32",
    "sigmoid_ld",
    "sigmoid_plus_sft",
    "sigmoid_bco_sft_mpo",
    "sigmoid__extreme_log_ratios",
    "hinge__extreme_log_ratios",
    "nca_pair__extreme_log_ratios",
    "bco_pair__extreme_log_ratios",
    "apo_zero__extreme_log_ratios",
    "apo_down__extreme_log_ratios",
    "robust__extreme_log_ratios",
    "sigmoid__empty_chosen_completion",
    "ipo__empty_chosen_completion",
    "sigmoid_norm__empty_chosen_completion",
    "sigmoid__single_pair",
    "sigmoid__policy_equals_reference",
]
GOLDEN_SFT = ["sft", "sft__empty_chosen_completion"]
DIVERGENCES = {"js_divergence": "js", "alpha_divergence": "alpha"}


def dpo(**keys) -> DPO:
    return DPO(DPOConfig(name="dpo", **keys))


def pair_values(algorithm: DPO, *sums: list[float]) -> torch.Tensor:
    """[U] losses of pairs, from their summed log-probabilities."""
    _, out, batch = sums_batch(*sums)
    (term,) = algorithm.loss(out, batch)[0].values()
    return term.value


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
            "nll_loss": 2.0,
        }
    )


def test_the_sum_is_over_the_completion_only():
    policy = torch.tensor([[-1.0, -2.0, -9.0], [-4.0, -9.0, -9.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    out, batch = pair_batch(policy, torch.zeros_like(policy), mask)
    terms, metrics = dpo(beta=1.0).loss(out, batch)
    assert terms["sigmoid"].value.item() == pytest.approx(math.log1p(math.exp(-1.0)))
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


def swapped(chosen, rejected, ref_chosen, ref_rejected):
    """The same pairs the other way round."""
    return rejected, chosen, ref_rejected, ref_chosen


def test_swapping_chosen_and_rejected_turns_the_margin():
    algorithm = dpo(beta=0.7)
    chosen, rejected, ref_chosen, ref_rejected = (torch.tensor(x, dtype=torch.float64) for x in SUMS)
    margin = 0.7 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    # log σ(m) − log σ(−m) = m
    torch.testing.assert_close(pair_values(algorithm, *swapped(*SUMS)) - pair_values(algorithm, *SUMS), margin)


@pytest.mark.parametrize("name", DIFFERENCE_LOSSES)
def test_losses_of_a_difference_read_nothing_else(name):
    """Δ = (3, 1), (2, 0) and (−1, −3): one difference."""
    pairs = ([-1.0, -2.0, -5.0], [-4.0, -5.0, -8.0], [-4.0, -4.0, -4.0], [-5.0, -5.0, -5.0])
    values = pair_values(variant(name), *pairs)
    torch.testing.assert_close(values, values[:1].expand(3))


def test_conservative_dpo_is_the_mix_of_both_directions():
    mixed = pair_values(dpo(beta=0.7, label_smoothing=0.3), *SUMS)
    straight, turned = pair_values(dpo(beta=0.7), *SUMS), pair_values(dpo(beta=0.7), *swapped(*SUMS))
    torch.testing.assert_close(mixed, 0.7 * straight + 0.3 * turned)


def test_turned_pairs_cancel_in_the_robust_loss():
    """(1 − ε) of a right pair and ε of the turned one give plain DPO's loss of the right one."""
    robust = dpo(beta=0.7, loss_type="robust", label_smoothing=0.3)
    mean = 0.7 * pair_values(robust, *SUMS) + 0.3 * pair_values(robust, *swapped(*SUMS))
    torch.testing.assert_close(mean, pair_values(dpo(beta=0.7), *SUMS))


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


def golden_batch(case, dtype):
    """Rows side by side (theirs: all chosen, then all rejected), the policy leaf, and a way to compare with theirs."""
    pairs = case["inputs"]["num_pairs"]
    side_by_side = torch.arange(2 * pairs).reshape(2, pairs).T.flatten()

    def stacked(values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)[side_by_side].to(dtype)

    policy = stacked(case["inputs"]["policy_token_logps"]).requires_grad_()
    reference, mask = stacked(case["inputs"]["ref_token_logps"]), stacked(case["inputs"]["completion_mask"])
    return policy, *pair_batch(policy, reference, mask), stacked


def golden_keys(params) -> dict:
    """Their parameters as keys of `algorithm`; those that would do nothing are left out."""
    keys = {"beta": params["beta"], "loss_type": params["loss_types"], "loss_weights": params["loss_weights"]}
    if params["label_smoothing"]:
        keys["label_smoothing"] = params["label_smoothing"]
    return {
        **keys,
        "ld_alpha": params["ld_alpha"],
        "f_divergence_type": DIVERGENCES.get(params["f_divergence_type"], params["f_divergence_type"]),
        "f_alpha": params["f_alpha_divergence_coef"],
        "discopop_tau": params["discopop_tau"],
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers_from_token_log_probabilities(name, dtype, tolerance):
    case = golden_case("dpo.json", name)
    if case["params"]["dtype"] == "float32":
        tolerance = 1e-5
    elif name == "exo_pair":  # theirs keeps ε in float32
        tolerance = max(tolerance, 1e-6)
    policy, out, batch, stacked = golden_batch(case, dtype)
    algorithm = dpo(**golden_keys(case["params"]))
    batch = algorithm.annotate(batch, LocalWorld())
    terms, metrics = algorithm.loss(out, batch)
    loss = reduce_terms(terms, batch)
    loss.backward()

    expected, close = case["outputs"], {"rtol": tolerance, "atol": tolerance}
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, torch.tensor(expected["loss"], dtype=dtype), **close)
    torch.testing.assert_close(policy.grad, stacked(expected["grad_policy_token_logps"]), **close)
    if "per_sample_loss" in expected:
        (term,) = terms.values()
        torch.testing.assert_close(term.value, torch.tensor(expected["per_sample_loss"], dtype=dtype), **close)
    logged = averages(metrics)
    assert {key: logged[key] for key in expected["metrics"]} == pytest.approx(
        expected["metrics"], rel=tolerance, abs=tolerance
    )


@pytest.mark.parametrize("name", GOLDEN_SFT)
def test_golden_numbers_of_the_likelihood_term(name):
    """Alone it compares nothing, so a recipe cannot ask for it; mixed with a loss of weight 0 it stands alone."""
    case = golden_case("dpo.json", name)
    policy, out, batch, stacked = golden_batch(case, torch.float64)
    algorithm = dpo(loss_type=["sigmoid", "sft"], loss_weights=[0.0, 1.0])
    batch = algorithm.annotate(batch, LocalWorld())
    loss = reduce_terms(algorithm.loss(out, batch)[0], batch)
    loss.backward()
    assert loss.item() == pytest.approx(case["outputs"]["loss"], rel=1e-9)
    torch.testing.assert_close(policy.grad, stacked(case["outputs"]["grad_policy_token_logps"]))


def logits_that_agree(log_sum_squares: torch.Tensor, size: int = 8) -> torch.Tensor:
    """[…] → […, size]: of distributions, one likelier symbol and all others alike, whose Σ p² is as given."""
    others = size - 1
    likely = (1 + (1 - size * (1 - others * log_sum_squares.exp())).sqrt()) / size
    return torch.cat([likely[..., None], ((1 - likely) / others)[..., None].expand(*likely.shape, others)], -1).log()


def wpo(**keys) -> WPO:
    return WPO(DPOConfig(name="wpo", **keys))


def test_golden_numbers_of_weights_by_likelihood():
    case = golden_case("dpo.json", "sigmoid_wpo")
    policy, out, batch, stacked = golden_batch(case, torch.float64)
    squares = torch.zeros_like(out.logps.detach())
    squares[:, 1:] = stacked(case["inputs"]["log_sum_sq_probs"])
    out = Forward(logps=out.logps, logits=logits_that_agree(squares))
    torch.testing.assert_close(ops.log_sum_squares(out.logits), squares)
    terms, metrics = wpo(beta=case["params"]["beta"]).loss(out, batch)
    reduce_terms(terms, batch).backward()
    assert terms["sigmoid"].value.tolist() == pytest.approx(case["outputs"]["per_sample_loss"], rel=1e-9)
    torch.testing.assert_close(policy.grad, stacked(case["outputs"]["grad_policy_token_logps"]))
    logged = averages(metrics)
    assert {key: logged[key] for key in case["outputs"]["metrics"]} == pytest.approx(case["outputs"]["metrics"])


def test_weights_by_likelihood_by_hand():
    """Two even symbols: Σ p² is ½, and a token of probability ½ weighs 1. The likelihood term is not weighed."""
    policy = torch.tensor([[0.5, 0.5], [0.25, 1.0]], dtype=torch.float64).log()
    out, batch = pair_batch(policy, torch.zeros_like(policy), torch.tensor([[1, 1], [1, 0]]))
    out = Forward(logps=out.logps, logits=torch.zeros(2, 3, 2, dtype=torch.float64))
    keys = {"loss_type": ["sigmoid", "sft"], "beta": 1.0}
    batch = wpo(**keys).annotate(batch, LocalWorld())
    terms, metrics = wpo(**keys).loss(out, batch)
    plain, _ = dpo(**keys).loss(out, batch)
    assert averages(metrics)["wpo/weight"] == pytest.approx(0.5)
    torch.testing.assert_close(terms["sigmoid"].value, 0.5 * plain["sigmoid"].value)
    torch.testing.assert_close(terms["sft"].value, plain["sft"].value)
    assert wpo().at_reference() == {"rewards/margins": 0.0}, "the loss depends on how likely the answers are"


@pytest.mark.parametrize("name", ["dpo", "cdpo", "ipo_summed", "reference_free"])
def test_golden_numbers_of_the_authors_code(name):
    case = golden_case("dpo_original.json", name)
    inputs, expected = case["inputs"], case["outputs"]
    sides = [inputs[f"{model}_{side}_logps"] for model in ("policy", "ref") for side in ("chosen", "rejected")]
    if name == "reference_free":  # a reference to which all answers are equally likely
        sides[2:] = [[0.0] * len(side) for side in sides[2:]]
    policy, out, batch = sums_batch(*sides)
    keys = {key: case["params"][key] for key in ("beta", "label_smoothing") if key in case["params"]}
    algorithm = dpo(**keys, loss_type="ipo_sum" if case["params"].get("ipo") else "sigmoid")
    terms, metrics = algorithm.loss(out, batch)
    loss = reduce_terms(terms, batch)
    loss.backward()

    assert loss.item() == pytest.approx(expected["loss"], rel=1e-9)
    (term,) = terms.values()
    assert term.value.tolist() == pytest.approx(expected["per_sample_loss"], rel=1e-9)
    chosen, rejected = policy.grad.reshape(-1, 2).T.tolist()
    assert chosen == pytest.approx(expected["grad_policy_chosen_logps"], rel=1e-9)
    assert rejected == pytest.approx(expected["grad_policy_rejected_logps"], rel=1e-9)
    for side in ("chosen", "rejected"):
        rewards = expected[f"{side}_rewards"]
        if name == "reference_free":  # theirs still shows rewards against the reference
            rewards = [case["params"]["beta"] * x for x in inputs[f"policy_{side}_logps"]]
        assert averages(metrics)[f"rewards/{side}"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-9)


def variant(name: str, **keys) -> DPO:
    """A loss type, with smoothing where it needs some."""
    smoothing = {"label_smoothing": SMOOTHING[name]} if name in SMOOTHING else {}
    return dpo(loss_type=name, **{**smoothing, **keys})


@pytest.mark.parametrize("beta", [0.05, 0.7])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_every_variant_at_the_reference_has_its_closed_form(name, beta):
    algorithm = variant(name, beta=beta)
    _, out, batch = sums_batch([-3.0, -7.0], [-5.0, -1.0], [-3.0, -7.0], [-5.0, -1.0])
    terms, metrics = algorithm.loss(out, batch)
    logged = {"loss": reduce_terms(terms, batch).item(), **averages(metrics)}
    assert {key: logged[key] for key in algorithm.at_reference()} == pytest.approx(algorithm.at_reference(), rel=1e-12)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_every_variant_by_finite_differences(name):
    algorithm = variant(name, beta=0.4)
    _, _, batch = sums_batch(*SUMS)

    def value(policy):
        return algorithm.loss(pair_batch(policy, batch["reference.logps"][:, 1:], torch.ones(6, 1))[0], batch)[0][
            name
        ].value

    policy = torch.tensor(SUMS[:2], dtype=torch.float64).T.reshape(-1, 1).requires_grad_()
    assert torch.autograd.gradcheck(value, policy)


# one pair with Δ_w = 2, Δ_l = −1, one token each, β = 0.5: h = 3, βh = 1.5
HALF, ONE = 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-1.0))
HIT = 1 / (1 + math.exp(-1.5))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sigmoid", -math.log(HIT)),
        ("robust", (-0.9 * math.log(HIT) + 0.1 * math.log(1 - HIT)) / 0.8),
        ("hinge", 0.0),
        ("ipo", 4.0),
        ("ipo_sum", 4.0),
        ("exo_pair", HIT * math.log(HIT / 0.9) + (1 - HIT) * math.log((1 - HIT) / 0.1)),
        ("nca_pair", -math.log(ONE) - 0.5 * math.log(1 - ONE) - 0.5 * math.log(HALF)),
        ("bco_pair", -math.log(ONE) - math.log(HALF)),
        ("sppo_hard", 1.0),
        ("apo_zero", 1 - ONE + (1 - HALF)),
        ("apo_down", ONE + 1 - HIT),
        ("discopop", math.exp(-1.5)),  # the gate, σ(30), is 1
        ("sigmoid_norm", -math.log(HIT)),
    ],
)
def test_every_variant_by_hand(name, expected):
    assert loss_of(variant(name, beta=0.5), [-2.0], [-6.0], [-4.0], [-5.0]) == pytest.approx(expected, abs=1e-9)


def test_the_table_by_hand_is_whole():
    (marker,) = [mark for mark in test_every_variant_by_hand.pytestmark if mark.name == "parametrize"]
    assert {name for name, _ in marker.args[1]} == set(PAIR_LOSSES)


def test_robust_without_noise_is_dpo_and_even_smoothing_is_even():
    assert loss_of(variant("robust", label_smoothing=0.0), *SUMS) == pytest.approx(loss_of(dpo(), *SUMS), rel=1e-12)
    chosen, rejected, ref_chosen, ref_rejected = SUMS
    even = dpo(label_smoothing=0.5)
    assert loss_of(even, *SUMS) == pytest.approx(loss_of(even, rejected, chosen, ref_rejected, ref_chosen), rel=1e-12)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_which_variants_know_the_reference_but_by_a_difference(name):
    chosen, rejected, ref_chosen, ref_rejected = SUMS
    moved = loss_of(variant(name), chosen, rejected, [x + 3 for x in ref_chosen], [x + 3 for x in ref_rejected])
    assert (moved == pytest.approx(loss_of(variant(name), *SUMS), rel=1e-9)) is LOSSES[name].of_difference


@pytest.mark.parametrize(("name", "short"), [("sigmoid_norm", "sigmoid"), ("ipo", "ipo_sum")])
def test_normalised_losses_are_the_plain_ones_for_answers_of_one_token(name, short):
    assert loss_of(variant(name), *SUMS) == pytest.approx(loss_of(variant(short), *SUMS), rel=1e-12)


TWO_TOKENS = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, 0.0, 0.0]], dtype=torch.float64)
TWO_MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


def test_length_normalisation_by_hand():
    out, batch = pair_batch(TWO_TOKENS, torch.zeros_like(TWO_TOKENS), TWO_MASK)
    terms, _ = variant("ipo", beta=0.25).loss(out, batch)  # −7/3 + 8 − 2
    assert terms["ipo"].value.item() == pytest.approx((8 - 7 / 3 - 2) ** 2)


def test_tokens_beyond_the_shorter_answer_by_hand():
    out, batch = pair_batch(TWO_TOKENS, torch.zeros_like(TWO_TOKENS), TWO_MASK)
    for alpha, chosen in [(1.0, -7.0), (0.5, -4.0), (0.0, -1.0)]:
        terms, metrics = dpo(beta=1.0, ld_alpha=alpha).loss(out, batch)
        assert terms["sigmoid"].value.item() == pytest.approx(math.log1p(math.exp(-(chosen + 8))))
        assert averages(metrics)["logps/chosen"] == pytest.approx(chosen)


@pytest.mark.parametrize(
    ("divergence", "slope"), [("reverse_kl", 1.0), ("forward_kl", 1.0), ("js", 0.5), ("alpha", 1.0)]
)
def test_divergences_touch_zero_with_their_slope(divergence, slope):
    delta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    score = ops.divergence_score(delta, divergence, 0.5)
    score.backward()
    assert score.item() == pytest.approx(0.0, abs=1e-15)
    assert delta.grad.item() == pytest.approx(slope)


def test_divergences_by_hand():
    delta = torch.tensor([math.log(4)], dtype=torch.float64)
    for divergence, alpha, expected in [
        ("forward_kl", 0.5, 0.75),
        ("js", 0.5, math.log(1.6)),
        ("alpha", 0.5, 1.0),
        ("alpha", 2.0, 3.0),
        ("alpha", 1.0, math.log(4)),
    ]:
        assert ops.divergence_score(delta, divergence, alpha).item() == pytest.approx(expected)
    close = ops.divergence_score(delta, "alpha", 1 + 1e-5)
    assert close.item() == pytest.approx(math.log(4), rel=1e-4)


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha"])
def test_divergences_stay_finite_however_far(divergence):
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    score = ops.divergence_score(far, divergence, -1.0)
    score.sum().backward()
    assert torch.isfinite(score).all()
    assert torch.isfinite(far.grad).all()


def test_discopop_stays_finite_however_far():
    margin = torch.tensor([-1e4, -100.0, 100.0, 1e4], requires_grad=True)
    value = ops.discopop_pair(margin, 0.05)
    value.sum().backward()
    assert value.tolist() == pytest.approx([1e4, 100.0, 0.0, 0.0])
    assert margin.grad.tolist() == pytest.approx([-1.0, -1.0, 0.0, 0.0])


def test_a_mixture_is_linear_in_its_weights():
    parts = {name: loss_of(variant(name), *SUMS) for name in ("sigmoid", "hinge", "apo_zero")}
    mixed = loss_of(dpo(loss_type=list(parts), loss_weights=[0.5, 2.0, 0.25]), *SUMS)
    assert mixed == pytest.approx(0.5 * parts["sigmoid"] + 2 * parts["hinge"] + 0.25 * parts["apo_zero"])
    assert loss_of(dpo(loss_type=list(parts)), *SUMS) == pytest.approx(sum(parts.values()))


def test_a_mixture_with_likelihood_promises_only_its_pairs():
    algorithm = dpo(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    assert algorithm.at_reference() == pytest.approx(
        {"loss/sigmoid": math.log(2), "loss/bco_pair": 2 * math.log(2), "rewards/margins": 0.0}
    )
    assert dpo(loss_type=["sigmoid", "hinge"], loss_weights=[1.0, 3.0]).at_reference()["loss"] == math.log(2) + 3


def margin_group(margin) -> Group:
    answers = [Completion("a", [5], reward=1.0), Completion("b", [6], reward=0.0)]
    return Group("g", [], [3], answers, fields={} if margin is None else {"margin": margin})


def test_a_margin_column_is_taken_off_the_difference():
    (unit,) = dpo().build([margin_group("1.5")])
    assert unit[0].scalar == {"margin": 1.5}
    _, out, batch = sums_batch([-2.0], [-6.0], [-4.0], [-5.0])
    batch = batch.with_columns({"margin": torch.tensor([1.0, 0.0])})
    for name, expected in [("sigmoid", math.log1p(math.exp(-0.5))), ("hinge", 0.5), ("ipo", 0.0)]:
        algorithm = variant(name, beta=0.5)
        assert reduce_terms(algorithm.loss(out, batch)[0], batch).item() == pytest.approx(expected, abs=1e-12)


def test_where_rows_ask_for_margins_the_loss_has_no_closed_form():
    algorithm = dpo()
    algorithm.prepare([margin_group(None), margin_group("0")])
    assert algorithm.at_reference()["loss"] == math.log(2)
    algorithm.prepare([margin_group(None), margin_group("1.5")])
    assert algorithm.at_reference() == {"rewards/margins": 0.0}


def test_a_run_whose_rows_ask_for_margins_keeps_the_contract(tmp_path):
    rows = [{**row, "margin": 0.5 * (i % 3)} for i, row in enumerate(toy_rows(DPO, 7))]
    bench = Bench("dpo", rows=rows, folder=tmp_path)
    check_micro_batches(bench)
    # 0.5 and 1 are asked for twice each, 0 three times
    expected = (3 * math.log(2) + 2 * math.log1p(math.exp(0.5)) + 2 * math.log1p(math.exp(1.0))) / 7
    assert gradient_step(bench.recipe("margins"))[1]["loss"] == pytest.approx(expected, abs=1e-6)


def test_a_margin_where_it_has_no_place_is_refused():
    with pytest.raises(DataError, match=r"row 'g' has a `margin`, which apo_zero has no place for"):
        variant("apo_zero").build([margin_group(0.3)])
    with pytest.raises(DataError, match=r"row 'g': margin is 'wide', expected a number"):
        dpo().build([margin_group("wide")])
    assert len(variant("apo_zero").build([margin_group("0"), margin_group(None)])) == 2


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"loss_type": "sft"}, "at least one that compares"),
        ({"loss_type": []}, "at least one that compares"),
        ({"loss_type": ["sigmoid", "sigmoid"]}, "each loss once"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "has 1 entries"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "does nothing to hinge"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "must be below 0.5"),
        ({"loss_type": "sigmiod"}, "sigmoid"),
        ({"ld_alpha": 1.5}, "ld_alpha"),
        *[
            ({"loss_type": ["sigmoid", name], "f_divergence_type": "js"}, f"which {name} does not read")
            for name in PAIR_LOSSES
            if name not in DIFFERENCE_LOSSES
        ],
    ],
)
def test_what_does_not_go_together_is_refused(keys, complaint):
    with pytest.raises(ValidationError, match=complaint):
        dpo(**keys)


def test_exo_without_smoothing_takes_a_little_and_says_so():
    with pytest.warns(UserWarning, match=r"exo_pair has no value at label_smoothing 0; 0\.001 is used"):
        silent = dpo(loss_type="exo_pair")
    assert loss_of(silent, *SUMS) == loss_of(dpo(loss_type="exo_pair", label_smoothing=1e-3), *SUMS)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("cdpo", {"label_smoothing": 0.1}),
        ("robust_dpo", {"loss_type": "robust", "label_smoothing": 0.1}),
        ("hinge", {"loss_type": "hinge"}),
        ("ipo", {"loss_type": "ipo"}),
        ("ipo_sum", {"loss_type": "ipo_sum"}),
        ("exo", {"loss_type": "exo_pair", "label_smoothing": 1e-3}),
        ("nca", {"loss_type": "nca_pair"}),
        ("sppo", {"loss_type": "sppo_hard", "beta": 1e-3}),
        ("apo_zero", {"loss_type": "apo_zero"}),
        ("apo_down", {"loss_type": "apo_down"}),
        ("discopop", {"loss_type": "discopop", "beta": 0.05}),
        ("f_dpo", {"f_divergence_type": "js"}),
        ("dpo_norm", {"loss_type": "sigmoid_norm", "beta": 5.0}),
    ],
)
def test_names_are_defaults_of_the_family(name, keys):
    assert register.algorithm.get("alignkit.algorithms.dpo:DPO").preset == {}, "by its path the class is plain DPO"
    recipe = {
        "output_dir": "x",
        "model": {"name_or_path": "m"},
        "data": [{"path": "p"}],
        "train": {"learning_rate": 1e-6},
    }
    found = load_recipe({**recipe, "algorithm": {"name": name}}).algorithm
    assert register.algorithm.get(name).target is DPO
    assert found == DPOConfig(name=name, **keys)
    assert load_recipe({**recipe, "algorithm": {"name": name, "beta": 0.25}}).algorithm.beta == 0.25
