"""AOT: golden numbers, a sort by hand, and partners that do not depend on how a batch is spread over processes."""

import math

import pytest
import torch
from pydantic import ValidationError

from alignkit import ops
from alignkit.algorithms.aot import AOT, AOTConfig, partners
from alignkit.algorithms.dpo import DPO, DPOConfig
from alignkit.core import register
from alignkit.dist.world import LocalWorld
from tests.algorithms.fakes import averages, pair_batch, reduce_terms, sums_batch
from tests.shared import golden_case

SUMS = ([-2.0, -9.0, -4.5], [-6.0, -3.0, -4.0], [-4.0, -8.0, -5.0], [-5.0, -4.0, -5.0])


def aot(**keys) -> AOT:
    return AOT(AOTConfig(name="aot", **keys))


def annotated(algorithm: AOT, out, batch, world=None):
    return algorithm.annotate(batch.with_columns({"policy.logps": out.logps.detach()}), world or LocalWorld())


def loss_of(algorithm: AOT, *sums: list[float]) -> float:
    _, out, batch = sums_batch(*sums)
    batch = annotated(algorithm, out, batch)
    return reduce_terms(algorithm.loss(out, batch)[0], batch).item()


def test_both_names_are_one_class():
    assert register.algorithm.get("aot").target is register.algorithm.get("aot_unpaired").target is AOT
    assert register.algorithm.get("aot_unpaired").preset == {"paired": False}
    assert register.algorithm.get("alignkit.algorithms.aot:AOT").preset == {}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "aot_smoothed", "aot_unpaired_smoothed"])
def test_golden_numbers(name, dtype, tolerance):
    case = golden_case("dpo.json", name)
    inputs, expected, params = case["inputs"], case["outputs"], case["params"]
    side_by_side = torch.arange(2 * inputs["num_pairs"]).reshape(2, -1).T.flatten()

    def stacked(values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)[side_by_side].to(dtype)

    policy = stacked(inputs["policy_token_logps"]).requires_grad_()
    out, batch = pair_batch(policy, stacked(inputs["ref_token_logps"]), stacked(inputs["completion_mask"]))
    algorithm = aot(
        beta=params["beta"], label_smoothing=params["label_smoothing"], paired=params["loss_types"] == ["aot"]
    )
    batch = annotated(algorithm, out, batch)
    terms, metrics = algorithm.loss(out, batch)
    loss = reduce_terms(terms, batch)
    loss.backward()
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(loss, torch.tensor(expected["loss"], dtype=dtype), **close)
    torch.testing.assert_close(policy.grad, stacked(expected["grad_policy_token_logps"]), **close)
    logged = averages(metrics)
    assert {key: logged[key] for key in expected["metrics"]} == pytest.approx(
        expected["metrics"], rel=tolerance, abs=tolerance
    )


def test_a_sort_by_hand():
    # differences of the policy 4, −6, −0.5 and of the reference 1, −4, 0: sorted, u = −2, −0.5, 3
    expected = sum(math.log1p(math.exp(-u)) for u in (-2.0, -0.5, 3.0)) / 3
    assert loss_of(aot(beta=1.0), *SUMS) == pytest.approx(expected, rel=1e-12)
    # log-ratios of chosen 2, −1, 0.5 and of rejected −1, 1, 1: sorted, u = 0, −0.5, 1
    expected = sum(math.log1p(math.exp(-u)) for u in (0.0, -0.5, 1.0)) / 3
    assert loss_of(aot(beta=1.0, paired=False), *SUMS) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("paired", [True, False])
def test_a_single_pair_is_dpo(paired):
    sums = [[-2.0], [-6.0], [-4.0], [-5.0]]
    _, out, batch = sums_batch(*sums)
    plain = reduce_terms(DPO(DPOConfig(name="dpo", beta=0.5)).loss(out, batch)[0], batch).item()
    assert loss_of(aot(beta=0.5, paired=paired), *sums) == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize("paired", [True, False])
def test_policy_at_the_reference_has_its_closed_form(paired):
    algorithm = aot(paired=paired)
    policy, out, batch = sums_batch([-3.0, -7.0, -2.0], [-5.0, -1.0, -2.0], [-3.0, -7.0, -2.0], [-5.0, -1.0, -2.0])
    batch = annotated(algorithm, out, batch)
    terms, metrics = algorithm.loss(out, batch)
    loss = reduce_terms(terms, batch)
    loss.backward()
    logged = {"loss": loss.item(), **averages(metrics)}
    assert {key: logged[key] for key in algorithm.at_reference()} == pytest.approx(algorithm.at_reference())
    assert policy.grad.flatten().tolist() == pytest.approx([-0.05 / 3, 0.05 / 3] * 3)


@pytest.mark.parametrize("paired", [True, False])
def test_the_order_of_pairs_changes_nothing(paired):
    turned = [[side[i] for i in (2, 0, 1)] for side in SUMS]
    assert loss_of(aot(paired=paired), *turned) == pytest.approx(loss_of(aot(paired=paired), *SUMS), rel=1e-12)


@pytest.mark.parametrize("paired", [True, False])
def test_a_micro_batch_gives_its_share_of_the_gradient(paired):
    algorithm = aot(beta=0.7, paired=paired)
    policy, out, batch = sums_batch(*SUMS)
    batch = annotated(algorithm, out, batch)
    reduce_terms(algorithm.loss(out, batch)[0], batch).backward()
    whole = policy.grad.clone()
    policy.grad = None
    for i in range(3):
        only = batch["unit"] & (torch.arange(3) == i)
        terms = algorithm.loss(out, batch.with_columns({"unit": only}))[0]
        (terms["policy"].value.where(only, 0.0).sum() / 3).backward(retain_graph=True)
    torch.testing.assert_close(policy.grad, whole)


class OneOfSeveral(LocalWorld):
    """The view of one rank, with what the others would send."""

    def __init__(self, rank: int, shares: list[tuple[list[float], list[float]]]) -> None:
        self.rank, self.size, self._shares = rank, len(shares), shares

    def gather(self, obj):
        assert obj == self._shares[self.rank]
        return self._shares


def test_partners_are_found_over_all_ranks_and_idle_ones():
    mine, others = torch.tensor([3.0, 1.0, 2.0, 5.0]), torch.tensor([0.0, 40.0, 20.0, 30.0])
    assert ops.same_rank(mine, others).tolist() == [30.0, 0.0, 20.0, 40.0]
    shares = [([3.0, 1.0], [0.0, 40.0]), ([], []), ([2.0, 5.0], [20.0, 30.0])]
    expected = [[30.0, 0.0], [0.0], [20.0, 40.0]]
    for rank, (a, b) in enumerate(shares):
        unit = torch.ones(len(a), dtype=torch.bool) if a else torch.zeros(1, dtype=torch.bool)
        found = partners(torch.tensor(a or [9.0]), torch.tensor(b or [9.0]), unit, OneOfSeveral(rank, shares))
        assert found.tolist() == expected[rank]


@pytest.mark.parametrize("keys", [{"beta": 0.0}, {"label_smoothing": 0.6}])
def test_config_bounds(keys):
    with pytest.raises(ValidationError):
        aot(**keys)
