"""MM-DPO: numbers by hand, DPO as a limit, what β may be, ranked rows as pairs, statistics of a batch."""

import math

import pytest
import torch
from pydantic import ValidationError

from alignkit.algorithms.dpo import DPO, DPOConfig
from alignkit.algorithms.mm_dpo import MMDPO, MMDPOConfig, scaled_beta, scaling_factor, spread_factor
from alignkit.core import Completion, DataError, Group, Score, register
from alignkit.core.contracts import Algorithm
from alignkit.dist.world import LocalWorld
from alignkit.plan import check
from alignkit.testing import (
    Bench,
    check_layouts,
    check_micro_batches,
    check_resume,
    check_world_size,
    gradient_step,
    read_metrics,
    train,
)
from tests.algorithms.fakes import averages, pair_batch, reduce_terms

MODES = ["margin", "implicit_batch"]


def mm_dpo(**keys) -> MMDPO:
    return MMDPO(MMDPOConfig(name="mm_dpo", **keys))


def evaluated(
    algorithm: Algorithm,
    policy: torch.Tensor,
    reference: torch.Tensor,
    mask: torch.Tensor,
    factors: list[float] | None = None,
):
    """Loss, gradient and metrics of pairs given by token log-probabilities [2U, T] and factors [U]."""
    policy = policy.clone().requires_grad_()
    out, batch = pair_batch(policy, reference, mask)
    columns = {"policy.logps": out.logps.detach()}
    if factors is not None:
        columns["factor"] = torch.tensor([x for factor in factors for x in (factor, 0.0)], dtype=torch.float64)
    batch = algorithm.annotate(batch.with_columns(columns), LocalWorld())
    terms, metrics = algorithm.loss(out, batch)
    loss = reduce_terms(terms, batch)
    loss.backward()
    return loss, policy.grad, averages({name: m for name, m in metrics.items() if float(m.count)})


@pytest.fixture
def pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Six pairs of answers of 1 to 5 tokens: policy, reference, mask."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-3 * torch.rand(12, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(5) < torch.randint(1, 6, (12, 1), generator=generator)
    return policy * mask, reference * mask, mask


FACTORS = [0.0, 0.1, 0.4, 0.7, 0.9, 0.99]


def test_it_is_registered_under_its_name():
    assert register.algorithm.get("mm_dpo").target is MMDPO
    assert MMDPO.config_type is MMDPOConfig


def test_two_pairs_by_hand():
    # h = (−1 + 2) − (−3 + 3) = 1 and (−2 + 1) − (−1 + 3) = −3; β = 0.1·(1 + ½·0.4) and 0.1·(1 + ½·0.8)
    policy = torch.tensor([[-1.0], [-3.0], [-2.0], [-1.0]], dtype=torch.float64)
    reference = torch.tensor([[-2.0], [-3.0], [-1.0], [-3.0]], dtype=torch.float64)
    mask = torch.ones(4, 1)
    loss, gradient, logged = evaluated(mm_dpo(gamma=0.25), policy, reference, mask, [0.4, 0.8])
    expected = (math.log1p(math.exp(-0.12)) + math.log1p(math.exp(0.42))) / 2 + 0.25 * (1 + 2) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    slopes = [0.12 / (1 + math.exp(0.12)) / 2, 0.14 / (1 + math.exp(-0.42)) / 2]
    assert gradient.flatten().tolist() == pytest.approx(
        [-slopes[0] - 0.125, slopes[0], -slopes[1] - 0.125, slopes[1]], rel=1e-12
    )
    assert logged["mm_dpo/beta_mean"] == pytest.approx(0.13, rel=1e-12)
    assert logged["mm_dpo/beta_p95"] == pytest.approx(0.14, rel=1e-12)
    assert logged["nll_loss"] == pytest.approx(1.5)
    assert logged["rewards/margins"] == pytest.approx((0.12 - 0.42) / 2, rel=1e-12)
    by_margin = {name: value for name, value in logged.items() if name.startswith("mm_dpo/") and "beta" not in name}
    assert by_margin == pytest.approx(
        {
            "mm_dpo/saturated": 0.0,
            "mm_dpo/share_small": 0.0,
            "mm_dpo/share_middle": 0.5,
            "mm_dpo/share_large": 0.5,
            "mm_dpo/accuracy_middle": 1.0,
            "mm_dpo/accuracy_large": 0.0,
            "mm_dpo/margin_middle": 0.12,
            "mm_dpo/margin_large": -0.42,
        }
    )


def test_as_a_weight_by_hand():
    policy = torch.tensor([[-1.0], [-3.0]], dtype=torch.float64)
    loss, gradient, logged = evaluated(mm_dpo(as_weight=True), policy, policy + 1, torch.ones(2, 1), [0.6])
    assert loss.item() == pytest.approx(1.3 * math.log(2), rel=1e-12)
    assert gradient.flatten().tolist() == pytest.approx([-1.3 * 0.05, 1.3 * 0.05], rel=1e-12)
    assert logged["mm_dpo/beta_mean"] == pytest.approx(0.13)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("as_weight", [False, True])
def test_with_w_0_it_is_dpo_to_the_last_bit(mode, as_weight, pairs):
    theirs = evaluated(DPO(DPOConfig(name="dpo", beta=0.3, label_smoothing=0.1)), *pairs)
    ours = mm_dpo(mode=mode, as_weight=as_weight, w=0.0, beta=0.3, label_smoothing=0.1)
    loss, gradient, logged = evaluated(ours, *pairs, FACTORS)
    assert torch.equal(loss, theirs[0])
    assert torch.equal(gradient, theirs[1])
    assert {name: logged[name] for name in theirs[2]} == theirs[2]


def test_in_a_run_too(tmp_path):
    steps = []
    for name, keys in (("dpo", {}), ("mm_dpo", {"w": 0.0})):
        steps.append(gradient_step(Bench(name, folder=tmp_path / name, config=keys).recipe("step"))[0])
    assert all(torch.equal(steps[0][name], gradient) for name, gradient in steps[1].items())


def test_beta_grows_with_the_gap_between_its_bounds():
    gaps = [-5.0, -0.1, 0.0, 0.1, 1.0, 3.0, 6.0, 30.0]
    factors = torch.tensor([scaling_factor(gap, 0.5) for gap in gaps], dtype=torch.float64)
    betas = scaled_beta(factors, 0.1, 0.5).tolist()
    assert betas[:3] == [0.1, 0.1, 0.1]
    assert betas[2:] == sorted(set(betas[2:]))
    assert betas[4] == pytest.approx(0.1 * (1 + 0.5 * (1 - math.exp(-0.5))), rel=1e-12)
    assert betas[-1] == pytest.approx(0.15, rel=1e-6)
    assert max(betas) <= 0.15
    assert scaled_beta(torch.tensor([-100.0]), 0.1, 0.5).item() == pytest.approx(1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_beta_carries_no_gradient(mode, pairs):
    """The slope of a pair is β·σ(−β·h) with β held, also where β was made of the policy's own numbers."""
    policy, reference, mask = pairs
    _, gradient, logged = evaluated(mm_dpo(mode=mode, w=2.0), policy, reference, mask, FACTORS)
    ratios = (policy - reference).sum(1)
    h = ratios[::2] - ratios[1::2]
    factors = FACTORS if mode == "margin" else [spread_factor(h.tolist())] * 6
    beta = 0.1 * (1 + 2.0 * torch.tensor(factors, dtype=torch.float64))
    slope = beta * torch.sigmoid(-beta * h) / 6
    torch.testing.assert_close(gradient[::2], -slope[:, None] * mask[::2], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient[1::2], slope[:, None] * mask[1::2], rtol=1e-6, atol=1e-9)
    assert logged["mm_dpo/beta_mean"] == pytest.approx(beta.mean().item(), rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_pairs_is_nothing(mode, pairs):
    algorithm = mm_dpo(mode=mode, w=2.0, gamma=0.3)
    there = evaluated(algorithm, *pairs, FACTORS)
    turned = [x.reshape(6, 2, -1).flip(0).reshape(12, -1) for x in pairs]
    back = evaluated(algorithm, *turned, FACTORS[::-1])
    torch.testing.assert_close(back[0], there[0], rtol=1e-12, atol=0)
    assert back[2] == pytest.approx(there[2], rel=1e-12)


def test_the_spread_of_a_batch():
    # mean 2; nearest four of five: 1, 2, 0 and −1, mean ½
    assert spread_factor([1.0, 8.0, 0.0, 2.0, -1.0]) == pytest.approx(0.5 - 2)
    assert spread_factor([3.0] * 7) == 0.0
    assert spread_factor([1.0, 8.0, 0.0, 2.0]) == 0.0
    assert spread_factor([]) == 0.0


def test_only_the_batch_mode_asks_for_the_policys_numbers():
    assert mm_dpo().needs is MMDPO.needs
    assert mm_dpo(mode="implicit_batch").needs.columns == {"reference.logps", "policy.logps"}
    assert MMDPO.needs.columns == {"reference.logps"}


def group(rewards: list[float], scores: list[float | None] | None = None, **fields) -> Group:
    found = scores or [None] * len(rewards)
    completions = [
        Completion(str(i), [10 + i, 2], reward=reward, scores={} if score is None else {"score": Score(score)})
        for i, (reward, score) in enumerate(zip(rewards, found, strict=True))
    ]
    return Group("g", [], [7, 8], completions, fields)


def kept(units) -> list[tuple[int, int]]:
    """The answers of pairs by their place in the data."""
    return [(better.tokens[2] - 10, worse.tokens[2] - 10) for better, worse in units]


def factors(units) -> list[float]:
    return [better.scalar["factor"] for better, _ in units]


def test_a_ranked_row_is_all_pairs_of_different_rank():
    strict, tied = group([3.0, 1.0, 4.0, 2.0]), group([3.0, 1.0, 3.0, 1.0])
    assert kept(mm_dpo().build([strict])) == [(2, 0), (2, 3), (2, 1), (0, 3), (0, 1), (3, 1)]
    assert kept(mm_dpo().build([tied])) == [(0, 1), (0, 3), (2, 1), (2, 3)]
    assert [mm_dpo().count_units(one) for one in (strict, tied, group([1.0, 1.0]))] == [6, 4, 0]


def test_ranks_decide_where_the_reward_model_disagrees():
    scored = group([0.0, 5.0, 2.0], [0.0, 5.0, 2.0], ranks=[1, 2, 2])
    units = mm_dpo(k=1.0).build([scored, group([5.0, 2.0], [5.0, 2.0], ranks=[2, 1])])
    assert kept(units) == [(0, 1), (0, 2), (1, 0)]
    assert factors(units) == [0.0, 0.0, 0.0]  # δ below 0 is no gap
    assert factors(mm_dpo(k=1.0).build([group([5.0, 2.0], [5.0, 2.0], ranks=[1, 2])])) == [
        pytest.approx(1 - math.exp(-3))
    ]
    for wrong in ([1, 2], "1,2,3", [1, 2, None]):
        with pytest.raises(DataError, match="row 'g': `ranks` is"):
            mm_dpo().build([group([0.0, 5.0, 2.0], ranks=wrong)])


def test_every_source_of_the_factor_is_one_number():
    by_scores = group([1.0, 0.0], [7.0, 4.0])
    by_margin = group([1.0, 0.0], margin="3")
    ready = group([1.0, 0.0], [9.0, 0.0], ls_factor=1 - math.exp(-1.5))
    neither, half = group([1.0, 0.0]), group([1.0, 0.0], [7.0, None])
    found = factors(mm_dpo(k=0.5).build([by_scores, by_margin, ready, neither, half]))
    assert found == pytest.approx([1 - math.exp(-1.5)] * 3 + [0.0, 0.0], rel=1e-12)
    with pytest.raises(DataError, match="`margin` is 'large', expected a number"):
        mm_dpo().build([group([1.0, 0.0], margin="large")])
    for column in ("margin", "ls_factor"):
        with pytest.raises(DataError, match=f"one `{column}` for 3 completions"):
            mm_dpo().build([group([2.0, 1.0, 0.0], **{column: 1.0})])


@pytest.mark.parametrize(
    ("key", "value"),
    [("beta", 0.0), ("w", -1.0), ("k", 0.0), ("gamma", -1.0), ("label_smoothing", 0.6), ("mode", "implicit")],
)
def test_config_bounds(key, value):
    with pytest.raises(ValidationError, match=key):
        mm_dpo(**{key: value})


@pytest.fixture
def ranked(tmp_path) -> Bench:
    """Lists of 2, 3 and 4 answers, a tie among them: 1 + 3 + 5 + 1 + 3 pairs."""
    rows = []
    for i, n in enumerate((2, 3, 4, 2, 3)):
        answers = ["abcdefghij"[j : j + 3 + i] if j % 2 else "ABCDEFGHIJ"[: 2 + j] for j in range(n)]
        rows.append({"id": str(i), "prompt": f"prompt {'abc'[i % 3]}", "completions": answers, "scores": SCORES[:n]})
    config = {"mode": "implicit_batch", "w": 2.0, "gamma": 0.1}
    return Bench("mm_dpo", folder=tmp_path, rows=rows, config=config)


SCORES = [4.0, 1.0, 2.0, 1.0]


def test_a_run_has_a_step_for_every_batch_of_pairs(ranked):
    run = train(ranked.recipe("whole", batch_size=3, num_epochs=2), quiet=True, report=False)
    # a round of 3 rows and one of 2: ⌈a/3⌉ + ⌈b/3⌉ = 5 whichever rows they are, for a + b = 13
    assert run.steps == read_metrics(run.folder)[-1]["step"] == 10


def test_the_plan_does_not_count_pairs_of_ranked_rows(ranked, tmp_path):
    assert "the number of steps is known once the data is read" in check(ranked.recipe("plan", max_steps=None))[-1]
    pairs = Bench("mm_dpo", folder=tmp_path / "pairs")
    assert "= 1 steps" in check(pairs.recipe("plan", max_steps=None))[-1]


def test_ranked_rows_keep_the_contract(ranked):
    check_micro_batches(ranked)
    check_layouts(ranked)
    check_resume(ranked)


@pytest.mark.distributed
def test_statistics_are_of_all_processes(ranked):
    check_world_size(ranked, 2)
