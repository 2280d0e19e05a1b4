"""RPO: closed forms, numbers by hand, golden numbers of the authors' two programs, invariants."""

import math

import pytest
import torch
from pydantic import ValidationError

from alignkit import load_recipe
from alignkit.algorithms.dpo import DPO, DPOConfig
from alignkit.algorithms.rpo import RPO, RPOConfig
from alignkit.core import RecipeError, register
from alignkit.core.contracts import Algorithm
from alignkit.dist.world import LocalWorld
from alignkit.testing import Bench, check_layouts, check_micro_batches, check_world_size, gradient_step
from tests.algorithms.fakes import averages, pair_batch, reduce_terms, sums_batch
from tests.shared import golden_case

NORMALIZATIONS = ["sum", "seq_mean", "token_mean"]
SUMMED = ["paper_summed", "larger_eta", "eta_zero_is_dpo", "with_label_smoothing"]
AVERAGED = ["author_mean_nll", "author_mean_nll_b"]


def rpo(normalization: str, eta: float, **keys) -> RPO:
    return RPO(RPOConfig(name="rpo", sft_normalization=normalization, eta=eta, **keys))


def evaluated(algorithm: Algorithm, policy: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor):
    """Loss, gradient, metrics and terms of pairs given by token log-probabilities [2U, T]."""
    policy = policy.clone().requires_grad_()
    out, batch = pair_batch(policy, reference, mask)
    batch = algorithm.annotate(batch, LocalWorld())
    terms, metrics = algorithm.loss(out, batch)
    loss = reduce_terms(terms, batch)
    loss.backward()
    return (
        loss,
        policy.grad,
        averages(metrics),
        {name: reduce_terms({name: term}, batch) for name, term in terms.items()},
    )


@pytest.fixture
def pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four pairs of answers of 1 to 6 tokens: policy, reference, mask."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-3 * torch.rand(8, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(6) < torch.tensor([6, 2, 1, 4, 3, 3, 5, 6])[:, None]
    return policy * mask, reference * mask, mask


def test_it_is_registered_under_its_name():
    assert register.algorithm.get("rpo").target is RPO
    assert RPO.config_type is RPOConfig


def test_two_pairs_by_hand():
    # chosen answers of 1 and 3 tokens; margins β·((−2 + 1) − (−1 + 1)) = −0.5 and β·((−6 + 9) − (−2 + 1)) = 2
    policy = torch.tensor([[-2.0, 0, 0], [-1, 0, 0], [-1, -2, -3], [-2, 0, 0]], dtype=torch.float64)
    reference = torch.tensor([[-1.0, 0, 0], [-1, 0, 0], [-3, -3, -3], [-1, 0, 0]], dtype=torch.float64)
    mask = torch.tensor([[1, 0, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]])
    preference = (math.log1p(math.exp(0.5)) + math.log1p(math.exp(-2))) / 2
    imitation = {"sum": 0.5 * (2 + 6) / 2, "seq_mean": (2 + 2) / 2, "token_mean": (2 + 6) / 4}
    slopes = {"sum": [0.5 / 2, 0.5 / 2], "seq_mean": [1 / 2, 1 / 6], "token_mean": [1 / 4, 1 / 4]}
    first, second = (0.5 / (1 + math.exp(m)) for m in (-0.5, 2))
    for normalization in NORMALIZATIONS:
        loss, gradient, logged, _ = evaluated(rpo(normalization, 0.3, beta=0.5), policy, reference, mask)
        assert loss.item() == pytest.approx(preference + 0.3 * imitation[normalization], rel=1e-12)
        assert logged["rpo/sft_term"] == pytest.approx(0.3 * imitation[normalization], rel=1e-12)
        a, b = (0.3 * slope for slope in slopes[normalization])
        assert gradient[0, 0].item() == pytest.approx(-first / 2 - a, rel=1e-12)
        assert gradient[2].tolist() == pytest.approx([-second / 2 - b] * 3, rel=1e-12)
        assert gradient[[1, 3], 0].tolist() == pytest.approx([first / 2, second / 2], rel=1e-12)
        share = (a + 3 * b) / (a + 3 * b + first / 2 + 3 * second / 2)
        assert logged["rpo/grad_share_sft"] == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_policy_at_the_reference_has_its_closed_form(normalization, pairs):
    policy, _, mask = pairs
    algorithm = rpo(normalization, 0.2, beta=0.7, label_smoothing=0.1)
    _, _, logged, terms = evaluated(algorithm, policy, policy, mask)
    assert algorithm.at_reference() == {"loss/preference": math.log(2), "rewards/margins": 0.0}
    assert terms["preference"].item() == pytest.approx(math.log(2), abs=1e-15)
    assert logged["rewards/margins"] == 0.0


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_without_its_imitation_term_it_is_dpo_to_the_last_bit(normalization, pairs):
    dpo = DPO(DPOConfig(name="dpo", beta=0.3, label_smoothing=0.1))
    ours = evaluated(rpo(normalization, 0.0, beta=0.3, label_smoothing=0.1), *pairs)
    theirs = evaluated(dpo, *pairs)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert {name: ours[2][name] for name in theirs[2]} == theirs[2]
    assert (ours[2]["rpo/sft_term"], ours[2]["rpo/grad_share_sft"]) == (0.0, 0.0)


def test_in_a_run_too(tmp_path):
    steps = []
    for name, keys in (("dpo", {}), ("rpo", {"sft_normalization": "sum", "eta": 0.0})):
        bench = Bench(name, folder=tmp_path / name, config={"beta": 0.1, **keys})
        steps.append(gradient_step(bench.recipe("step"))[0])
    assert all(torch.equal(steps[0][name], gradient) for name, gradient in steps[1].items())


def test_the_summed_term_moves_the_slope_of_the_chosen_sum_alone(pairs):
    _, plain, _, _ = evaluated(rpo("sum", 0.0, beta=0.3), *pairs)
    _, gradient, _, _ = evaluated(rpo("sum", 0.7, beta=0.3), *pairs)
    expected = torch.zeros_like(plain)
    expected[::2] = -0.3 * 0.7 / 4 * pairs[2][::2].double()
    torch.testing.assert_close(gradient - plain, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_loss_is_linear_in_eta(normalization, pairs):
    none, half, full = (evaluated(rpo(normalization, eta, beta=0.3), *pairs)[0].item() for eta in (0.0, 0.4, 0.8))
    assert half == pytest.approx((none + full) / 2, rel=1e-12)


def test_both_means_agree_where_chosen_answers_are_equally_long(pairs):
    policy, reference, mask = pairs
    mask = mask.clone()
    mask[::2] = torch.arange(6) < 3
    rows, tokens = (evaluated(rpo(n, 0.4), policy, reference, mask) for n in ("seq_mean", "token_mean"))
    torch.testing.assert_close(rows[0], tokens[0])
    torch.testing.assert_close(rows[1], tokens[1])
    assert rows[2] == pytest.approx(tokens[2])


def test_pairs_that_are_right_by_far_are_only_imitated():
    _, out, batch = sums_batch([-2.0], [-900.0], [-2.0], [-5.0])
    algorithm = rpo("seq_mean", 0.4, beta=1.0)
    terms, metrics = algorithm.loss(out, algorithm.annotate(batch, LocalWorld()))
    assert reduce_terms(terms, batch).item() == pytest.approx(0.8, rel=1e-12)
    assert averages(metrics)["rpo/grad_share_sft"] == pytest.approx(1.0)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradient_by_finite_differences(normalization, pairs):
    _, reference, mask = pairs
    algorithm = rpo(normalization, 0.4, beta=0.3, label_smoothing=0.2)

    def loss(policy):
        out, batch = pair_batch(policy, reference, mask)
        batch = algorithm.annotate(batch, LocalWorld())
        return reduce_terms(algorithm.loss(out, batch)[0], batch)

    assert torch.autograd.gradcheck(loss, pairs[0].clone().requires_grad_())


@pytest.mark.parametrize("normalization", ["sum", "token_mean"])
def test_every_normalization_keeps_the_contract(normalization, tmp_path):
    bench = Bench("rpo", folder=tmp_path, config={"sft_normalization": normalization, "eta": 0.2})
    check_micro_batches(bench)
    check_layouts(bench)


@pytest.mark.distributed
def test_the_token_mean_is_over_all_processes(tmp_path):
    check_world_size(Bench("rpo", folder=tmp_path, config={"sft_normalization": "token_mean", "eta": 0.2}), 2)


def test_defaults_belong_to_the_normalization():
    def read(**keys) -> tuple[float, float, str]:
        config = RPOConfig(name="rpo", **keys)
        return config.beta, config.eta, config.sft_normalization

    assert read() == read(sft_normalization="seq_mean") == (0.5, 0.2, "seq_mean")
    assert read(sft_normalization="token_mean") == (0.5, 0.2, "token_mean")
    assert read(sft_normalization="sum") == (0.05, 0.005, "sum")
    assert read(sft_normalization="sum", eta=0.1, beta=0.3) == (0.3, 0.1, "sum")


def test_eta_is_refused_without_its_normalization():
    recipe = {
        "output_dir": "runs/x",
        "model": {"name_or_path": "owner/model"},
        "data": [{"path": "owner/pairs"}],
        "algorithm": {"name": "rpo", "eta": 0.005},
    }
    with pytest.raises(RecipeError, match="`eta` has another scale under each `sft_normalization`"):
        load_recipe(recipe)


@pytest.mark.parametrize(
    ("key", "value"), [("beta", 0.0), ("eta", -0.1), ("label_smoothing", 0.6), ("sft_normalization", "mean")]
)
def test_config_bounds(key, value):
    with pytest.raises(ValidationError, match=key):
        RPOConfig(**{"name": "rpo", "sft_normalization": "sum", key: value})


def golden_sums(case: dict, dtype: torch.dtype) -> list[torch.Tensor]:
    inputs = case["inputs"]
    sums = [inputs[f"{model}_{side}_logps"] for model in ("policy", "ref") for side in ("chosen", "rejected")]
    return [torch.tensor(values, dtype=torch.float64).to(dtype) for values in sums]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", SUMMED)
def test_golden_numbers_of_the_summed_term(name, dtype, tolerance):
    case = golden_case("rpo.json", name)
    chosen, rejected, ref_chosen, ref_rejected = golden_sums(case, dtype)
    params, expected = case["params"], case["outputs"]
    algorithm = rpo("sum", params["eta"], beta=params["beta"], label_smoothing=params["label_smoothing"])
    policy = torch.stack([chosen, rejected], 1).reshape(-1, 1)
    reference = torch.stack([ref_chosen, ref_rejected], 1).reshape(-1, 1)
    loss, gradient, logged, _ = evaluated(algorithm, policy, reference, torch.ones_like(policy))

    close = {"rtol": tolerance, "atol": tolerance}
    out, batch = pair_batch(policy, reference, torch.ones_like(policy))
    terms, _ = algorithm.loss(out, algorithm.annotate(batch, LocalWorld()))
    each = torch.stack([term.weight * term.value for term in terms.values()]).sum(0)
    torch.testing.assert_close(each, torch.tensor(expected["per_sample_loss"], dtype=dtype), **close)
    torch.testing.assert_close(loss, torch.tensor(expected["loss"], dtype=dtype), **close)
    for side, found in zip(("chosen", "rejected"), gradient.reshape(-1, 2).unbind(1), strict=True):
        torch.testing.assert_close(found, torch.tensor(expected[f"grad_policy_{side}_logps"], dtype=dtype), **close)
        mean = sum(expected[f"{side}_rewards"]) / len(expected[f"{side}_rewards"])
        assert logged[f"rewards/{side}"] == pytest.approx(mean, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", AVERAGED)
def test_golden_numbers_of_the_averaged_term(name, dtype, tolerance):
    case = golden_case("rpo.json", name)
    chosen, rejected, ref_chosen, ref_rejected = golden_sums(case, dtype)
    lengths, expected = torch.tensor(case["inputs"]["chosen_lengths"]), case["outputs"]
    mask = torch.zeros(2 * len(lengths), int(lengths.max()), dtype=torch.bool)
    mask[::2], mask[1::2, 0] = torch.arange(mask.shape[1]) < lengths[:, None], True
    counts = torch.stack([lengths, torch.ones_like(lengths)], 1).reshape(-1, 1)
    policy, reference = (
        torch.stack(pair, 1).reshape(-1, 1) / counts * mask for pair in ((chosen, rejected), (ref_chosen, ref_rejected))
    )
    params = case["params"]
    loss, gradient, _, terms = evaluated(
        rpo("seq_mean", params["eta"], beta=params["beta"]), policy.to(dtype), reference.to(dtype), mask
    )
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(loss, torch.tensor(expected["loss"], dtype=dtype), **close)
    torch.testing.assert_close(terms["preference"], torch.tensor(expected["preference_loss"], dtype=dtype), **close)
    weighted = params["eta"] * expected["nll"]
    torch.testing.assert_close(terms["sft"], torch.tensor(weighted, dtype=dtype), **close)
    # the slope of a sum is that of each of its tokens
    for side, found in zip(("chosen", "rejected"), gradient[:, 0].reshape(-1, 2).unbind(1), strict=True):
        torch.testing.assert_close(found, torch.tensor(expected[f"grad_policy_{side}_logps"], dtype=dtype), **close)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_golden_numbers_of_the_token_mean(dtype, tolerance):
    case = golden_case("dpo.json", "sigmoid_plus_sft")
    inputs, params, expected = case["inputs"], case["params"], case["outputs"]
    # theirs: all chosen, then all rejected; ours: chosen and rejected of a pair side by side
    side_by_side = torch.arange(2 * inputs["num_pairs"]).reshape(2, -1).T.flatten()

    def stacked(values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)[side_by_side].to(dtype)

    loss, gradient, logged, _ = evaluated(
        rpo("token_mean", params["loss_weights"][1], beta=params["beta"]),
        stacked(inputs["policy_token_logps"]),
        stacked(inputs["ref_token_logps"]),
        stacked(inputs["completion_mask"]).bool(),
    )
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(loss, torch.tensor(expected["loss"], dtype=dtype), **close)
    torch.testing.assert_close(gradient, stacked(expected["grad_policy_token_logps"]), **close)
    found = {name: logged[name] for name in expected["metrics"]}
    assert found == pytest.approx(expected["metrics"], rel=tolerance, abs=tolerance)
