"""KTO: golden numbers of two published implementations, numbers by hand, identities, and who is scored with whom."""

import math

import pytest
import torch
from pydantic import ValidationError

from alignkit import ops
from alignkit.algorithms.kto import KTO, KTOConfig, advise_weights, kto_loss
from alignkit.core import Completion, DataError, Forward, Group, register
from alignkit.data.stream import with_partners
from alignkit.dist.world import LocalWorld
from tests.algorithms.fakes import averages, pair_batch, reduce_terms
from tests.shared import golden_case

GOLDEN = [
    "mixed",
    "weighted",
    "kl_clamped_at_zero",
    "all_desirable",
    "all_undesirable",
    "extreme_log_ratios",
    "empty_completion",
    "apo_zero_unpaired",
]
GOLDEN_AUTHORS = ["mixed", "all_desirable", "humanline", "zero_kl_entries"]


def config(**keys) -> KTOConfig:
    return KTOConfig(name="kto", **keys)


def kto(**keys) -> KTO:
    return KTO(config(**keys))


def annotated(algorithm: KTO, own, own_reference, mask, label, other, other_reference, other_mask):
    """The forward and the batch that the loss sees, of [N, T] tensors: own answers and mismatched ones."""

    def side_by_side(a, b):
        return torch.stack([a, b], dim=1).flatten(0, 1)

    policy, reference = side_by_side(torch.zeros_like(own), other), side_by_side(own_reference, other_reference)
    columns, batch = pair_batch(policy, reference, side_by_side(mask, other_mask))
    labels = torch.stack([label, torch.zeros_like(label)], dim=1).flatten()
    batch = batch.with_columns({"policy.logps": columns.logps.detach(), "label": labels})
    batch = algorithm.annotate(batch, LocalWorld())
    return Forward(logps=torch.cat([torch.zeros_like(own[:, :1]), own], dim=1)), batch


def of_sums(algorithm: KTO, ratios: list[float], labels: list[int], drifts: list[float]):
    """Answers one token long with these log-ratios, and these of the mismatched ones; the policy leaf comes first."""
    own = torch.tensor(ratios, dtype=torch.float64)[:, None].requires_grad_()
    other = torch.tensor(drifts, dtype=torch.float64)[:, None]
    zero, ones = torch.zeros_like(other), torch.ones_like(other)
    label = torch.tensor(labels, dtype=torch.float64)
    return own, *annotated(algorithm, own, zero, ones, label, other, zero, ones)


def step(algorithm: KTO, ratios: list[float], labels: list[int], drifts: list[float]):
    """Loss, gradient by row and metrics of one step."""
    own, out, batch = of_sums(algorithm, ratios, labels, drifts)
    terms, metrics = algorithm.loss(out, batch)
    loss = reduce_terms(terms, batch)
    loss.backward()
    logged = {name: float(m.sum) / float(m.count) for name, m in metrics.items() if float(m.count)}
    return loss.item(), own.grad.flatten().tolist(), logged


def test_it_is_registered_under_its_name():
    assert register.algorithm.get("kto").target is KTO
    assert KTO.config_type is KTOConfig


@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_policy_at_the_reference_has_its_closed_form(weight):
    algorithm = kto(beta=0.3, desirable_weight=weight, undesirable_weight=weight)
    loss, gradient, metrics = step(algorithm, [0.0] * 4, [1, 0, 1, 1], [0.0] * 4)
    logged = {"loss": loss, **metrics}
    assert {name: logged[name] for name in algorithm.at_reference()} == pytest.approx(algorithm.at_reference())
    slope = weight * 0.3 / 4 / 4
    assert gradient == pytest.approx([-slope, slope, -slope, -slope])


def test_class_weights_that_make_up_for_counts_balance_the_gradient():
    algorithm = kto(desirable_weight=1.0, undesirable_weight=3.0)
    _, gradient, _ = step(algorithm, [0.0] * 4, [1, 0, 1, 1], [0.0] * 4)
    assert sum(gradient) == pytest.approx(0.0, abs=1e-15)
    assert algorithm.at_reference() == {"rewards/margins": 0.0}


def test_two_answers_by_hand():
    # z0 = (3 + 1)/2 = 2; good: β(4 − 2) = 1; bad: β(2 + 2) = 2
    loss, gradient, metrics = step(kto(beta=0.5, undesirable_weight=2.0), [4.0, -2.0], [1, 0], [3.0, 1.0])
    good, bad = 1 / (1 + math.exp(1.0)), 1 / (1 + math.exp(2.0))
    assert loss == pytest.approx((good + 2 * bad) / 2, rel=1e-12)
    slopes = [-0.5 * good * (1 - good) / 2, 2 * 0.5 * bad * (1 - bad) / 2]
    assert gradient == pytest.approx(slopes, rel=1e-12)
    assert metrics == pytest.approx(
        {
            "kl": 2.0,
            "rewards/chosen": 2.0,
            "rewards/rejected": -1.0,
            "rewards/margins": 3.0,
            "logps/chosen": 4.0,
            "logps/rejected": -2.0,
            "completions/mean_length": 1.0,
            "saturated": 0.0,
        }
    )


def test_moving_every_ratio_and_the_reference_point_changes_nothing():
    before = step(kto(), [4.0, -2.0, 1.0], [1, 0, 1], [3.0, 1.0, 2.0])
    after = step(kto(), [7.0, 1.0, 4.0], [1, 0, 1], [6.0, 4.0, 5.0])
    assert after[0] == pytest.approx(before[0], rel=1e-12)
    assert after[1] == pytest.approx(before[1], rel=1e-12)


def test_turned_labels_mirror_the_ratios():
    ratios, labels = [4.0, -2.0, 1.0], [1, 0, 1]
    loss, gradient, _ = step(kto(), ratios, labels, [-1.0] * 3)
    turned, mirrored, _ = step(kto(), [-x for x in ratios], [1 - x for x in labels], [-1.0] * 3)
    assert turned == pytest.approx(loss, rel=1e-12)
    assert mirrored == pytest.approx([-x for x in gradient], rel=1e-12)


def test_the_loss_of_a_row_lies_between_nothing_and_its_weight():
    ratios = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4], dtype=torch.float64)
    for label in (True, False):
        value = kto_loss(ratios, torch.full((5,), label), torch.zeros(5), 0.1, 2.0, 2.0)
        assert ((value >= 0) & (value <= 2)).all()


def test_good_answers_alone_still_teach():
    _, gradient, metrics = step(kto(), [0.5, -1.0], [1, 1], [0.0, 0.0])
    assert all(slope < 0 for slope in gradient)
    assert not {"rewards/rejected", "rewards/margins", "logps/rejected"} & metrics.keys()


def test_apo_zero_on_an_unrolled_pair_is_half_of_the_paired_loss():
    chosen, rejected, beta = 1.5, -0.7, 0.4
    loss, _, metrics = step(kto(beta=beta, loss_type="apo_zero_unpaired"), [chosen, rejected], [1, 0], [0.0, 0.0])
    paired = ops.apo_zero_pair(*(torch.tensor([beta * x], dtype=torch.float64) for x in (chosen, rejected)))
    assert loss == pytest.approx(paired.item() / 2, rel=1e-12)
    assert metrics["kl"] == 0.0


def test_gradient_by_finite_differences():
    ratio = torch.tensor([0.3, -2.0, 4.0], dtype=torch.float64, requires_grad=True)
    label, point = torch.tensor([True, False, True]), torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kto_loss(x, label, point, 0.7, 1.3, 0.8), ratio)


def groups(*answers: list[int]) -> list[Group]:
    return [
        Group(f"g{i}", [], [7 + i, 8], [Completion("", tokens)], {"label": bool(i % 2)})
        for i, tokens in enumerate(answers)
    ]


def test_build_puts_the_answer_before_behind_every_prompt():
    units = kto().build(with_partners(groups([10, 2], [11, 2], [12, 2]), 64))
    assert [[row.tokens for row in unit] for unit in units] == [
        [[7, 8, 10, 2], [7, 8, 12, 2]],
        [[8, 8, 11, 2], [8, 8, 10, 2]],
        [[9, 8, 12, 2], [9, 8, 11, 2]],
    ]
    assert [unit[0].scalar["label"] for unit in units] == [0.0, 1.0, 0.0]


def test_a_prompt_without_a_foreign_answer_scores_none():
    same, _, other = kto().build(with_partners(groups([10, 2], [11, 2], [10, 2]), 64))
    assert same[1].tokens == [7, 8]
    assert not any(same[1].trained)
    assert any(other[1].trained)


def test_apo_zero_scores_no_other_answer():
    algorithm = kto(loss_type="apo_zero_unpaired")
    assert not any(any(unit[1].trained) for unit in algorithm.build(with_partners(groups([10, 2], [11, 2]), 64)))


def test_answers_left_out_do_not_thin_the_mean():
    own = torch.zeros(3, 1, dtype=torch.float64)
    other, mask = torch.tensor([[3.0], [9.0], [1.0]], dtype=torch.float64), torch.tensor([[1], [0], [1]])
    _, batch = annotated(kto(), own, own, torch.ones_like(mask), torch.ones(3).double(), other * mask, own, mask)
    assert batch["kl"].tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("weights", "good", "bad", "advised"),
    [
        ({}, 398, 689, "desirable_weight to 1.73 … 2.31"),
        ({"undesirable_weight": 2.0}, 300, 300, "desirable_weight to 2 … 2.67"),
        ({}, 90, 10, "undesirable_weight to 6.75 … 9"),
        ({"desirable_weight": 1.73}, 398, 689, None),
        ({"desirable_weight": 2.31}, 398, 689, None),
        ({}, 256, 256, None),
        ({}, 8, 6, None),
        ({}, 0, 5, None),
        ({}, 5, 0, None),
    ],
)
def test_weights_are_advised_by_the_rows_of_each_class(weights, good, bad, advised):
    advice = advise_weights(config(**weights), good, bad)
    assert advice is None if advised is None else f"Set {advised}." in advice


def test_prepare_says_so_once_and_refuses_other_labels():
    unequal = groups([10, 2], [11, 2], [12, 2], [13, 2], [14, 2])
    with pytest.warns(UserWarning, match=r"2 good and 3 bad .* 0\.67 times .* Set desirable_weight to 1\.5 … 2\."):
        kto().prepare(unequal)
    unequal[0].fields["label"] = "bad"
    with pytest.raises(DataError, match="'g0': label is 'bad'"):
        kto().prepare(unequal)


@pytest.mark.parametrize(
    ("key", "value"),
    [("beta", 0.0), ("desirable_weight", 0.0), ("loss_type", "apo"), ("log_epsilon_p", 0.1), ("log_epsilon_r", -0.1)],
)
def test_config_bounds(key, value):
    with pytest.raises(ValidationError, match=key):
        kto(**{key: value})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers_from_token_log_probabilities(name, dtype, tolerance):
    case = golden_case("kto.json", name)
    inputs, expected = case["inputs"], case["outputs"]
    algorithm = kto(**case["params"])

    def tensor(key):
        return torch.tensor(inputs[key], dtype=dtype)

    policy, mask = tensor("policy_token_logps").requires_grad_(), tensor("completion_mask")
    first = torch.zeros_like(mask)  # a sum of theirs is one token of ours
    first[:, 0] = case["params"]["loss_type"] == "kto"
    other, other_reference = (first * tensor(key)[:, None] for key in ("policy_kl_logps", "ref_kl_logps"))
    out, batch = annotated(
        algorithm, policy, tensor("ref_token_logps"), mask, tensor("label"), other, other_reference, first
    )
    terms, metrics = algorithm.loss(out, batch)
    loss = reduce_terms(terms, batch)
    loss.backward()

    close = {"rtol": tolerance, "atol": tolerance}
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, torch.tensor(expected["loss"], dtype=dtype), **close)
    torch.testing.assert_close(terms["policy"].value, torch.tensor(expected["per_sample_loss"], dtype=dtype), **close)
    gradient = torch.tensor(expected["grad_policy_token_logps"], dtype=dtype)
    torch.testing.assert_close(policy.grad, gradient, **close)
    logged = averages({name: metric for name, metric in metrics.items() if float(metric.count)})
    assert {key: logged[key] for key in expected["metrics"]} == pytest.approx(
        expected["metrics"], rel=tolerance, abs=tolerance
    )
    assert ("rewards/margins" in logged) == ("rewards/margins" in expected["metrics"])
    assert logged["kl"] == pytest.approx(expected["kl"], rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", GOLDEN_AUTHORS)
def test_golden_numbers_of_the_authors_code(name):
    """Their statistics pass through float32; their mean leaves out ratios of exactly 0, here rows without a token."""
    case = golden_case("kto_halos.json", name)
    inputs, expected = case["inputs"], case["outputs"]
    params = {key.lower(): value for key, value in case["params"].items()}
    algorithm = kto(**params)

    def tensor(key):
        return torch.tensor(inputs[key], dtype=torch.float64)

    policy, mask, label = tensor("policy_token_logps").requires_grad_(), tensor("completion_mask"), tensor("label")
    other, other_reference = tensor("policy_kl_token_logps"), tensor("ref_kl_token_logps")
    moved = ((other - other_reference) * mask).sum(-1, keepdim=True) != 0
    out, batch = annotated(
        algorithm, policy, tensor("ref_token_logps"), mask, label, other, other_reference, mask * moved
    )
    terms, metrics = algorithm.loss(out, batch)
    loss = reduce_terms(terms, batch)
    loss.backward()

    value = terms["policy"].value
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    grouped = torch.cat([value[label > 0], value[label == 0]]).tolist()
    assert grouped == pytest.approx(expected["losses_desirable_then_undesirable"], rel=1e-5)
    torch.testing.assert_close(
        policy.grad, torch.tensor(expected["grad_policy_token_logps"]).double(), rtol=1e-5, atol=1e-6
    )
    assert averages({"kl": metrics["kl"]})["kl"] == pytest.approx(expected["kl"], rel=1e-5, abs=1e-6)
