"""PRO: numbers by hand, golden numbers of the authors' code, reductions, short lists, order and ties."""

import math

import pytest
import torch
from pydantic import ValidationError

from alignkit.algorithms.dpo import DPO, DPOConfig
from alignkit.algorithms.pro import PRO, PROConfig, rank_losses
from alignkit.core import Batch, Completion, DataError, Forward, Group, register
from alignkit.plan import check
from alignkit.testing import Bench, check_layouts, check_micro_batches, check_order, check_overfits, check_world_size
from tests.algorithms.fakes import averages, pair_batch, reduce_terms
from tests.shared import golden_case

GOLDEN = ["two_responses", "three_responses", "five_responses", "no_sft", "tied_rewards", "large_reward_gaps"]


def pro(**keys) -> PRO:
    return PRO(PROConfig(name="pro", **keys))


def list_batch(logps: torch.Tensor, mask: torch.Tensor, scores: torch.Tensor, imitated: int = 0):
    """From [U, K, T] token log-probabilities and [U, K] scores; a prompt token is put before each row."""
    units, k, width = mask.shape

    def with_prompt(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(x[:, :1]), x], 1)

    marks = torch.zeros(units, k)
    marks[:, imitated] = 1
    columns = {
        "mask": with_prompt(mask.bool().reshape(-1, width)),
        "row": torch.ones(units * k, dtype=torch.bool),
        "unit": torch.ones(units, dtype=torch.bool),
        "score": scores.reshape(-1),
        "imitated": marks.reshape(-1),
    }
    tokens = torch.zeros(columns["mask"].shape, dtype=torch.long)
    inputs = {"tokens": tokens, "attention": torch.ones_like(tokens)}
    return Forward(logps=with_prompt(logps.reshape(-1, width))), Batch(inputs=inputs, columns=columns, k=k)


def evaluated(algorithm: PRO, logps: torch.Tensor, mask: torch.Tensor, scores: torch.Tensor, imitated: int = 0):
    """Loss, gradient [U, K, T] and metrics."""
    logps = logps.clone().requires_grad_()
    out, batch = list_batch(logps, mask, scores, imitated)
    terms, metrics = algorithm.loss(out, batch)
    loss = reduce_terms(terms, batch)
    loss.backward()
    logged = {name: value for name, value in metrics.items() if float(value.count)}
    return loss, logps.grad, averages(logged), {name: reduce_terms({name: term}, batch) for name, term in terms.items()}


def single(values: list[list[float]]) -> torch.Tensor:
    """[U, K] → answers of one token, [U, K, 1] in float64."""
    return torch.tensor(values, dtype=torch.float64)[..., None]


@pytest.fixture
def lists():
    """Three lists of four answers of 1 to 5 tokens: log-probabilities, mask, scores best first."""
    generator = torch.Generator().manual_seed(0)
    logps = -3 * torch.rand(3, 4, 5, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 6, (3, 4, 1), generator=generator)
    scores = 2 * torch.rand(3, 4, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < lengths
    return logps * mask, mask, scores.sort(descending=True).values


def test_it_is_registered_under_its_name():
    assert register.algorithm.get("pro").target is PRO
    assert PRO.config_type is PROConfig


def test_one_list_by_hand():
    # p = −1, −2, −3; r = 2, 1.5, 0: heads with temperatures (2; ½, 2) and (1½; 1½)
    scores = torch.tensor([[2.0, 1.5, 0.0]], dtype=torch.float64)
    logps = single([[-1.0, -2.0, -3.0]])
    loss, gradient, logged, terms = evaluated(pro(rank_eps=0.0), logps, torch.ones_like(logps), scores)
    top, worst = math.exp(-2) + math.exp(-1) + math.exp(-6), math.exp(-3) + math.exp(-4.5)
    first, second = math.log(top) + 2, math.log(worst) + 3
    assert logged["pro/rank_loss_0"] == pytest.approx(first, rel=1e-12)
    assert logged["pro/rank_loss_1"] == pytest.approx(second, rel=1e-12)
    assert terms["sft"].item() == pytest.approx(0.05 * 4 * 1.0, rel=1e-12)
    assert loss.item() == pytest.approx(first + second + 0.2, rel=1e-12)
    slopes = [
        2 * (math.exp(-2) / top - 1) - 0.2,
        0.5 * math.exp(-1) / top + 1.5 * (math.exp(-3) / worst - 1),
        2 * math.exp(-6) / top + 1.5 * math.exp(-4.5) / worst,
    ]
    assert gradient.flatten().tolist() == pytest.approx(slopes, rel=1e-12)
    assert {name: logged[name] for name in logged if not name.startswith("pro/rank")} == pytest.approx(
        {
            "pro/kendall_tau": 1.0,
            "pro/zero_gap_heads": 0.0,
            "rewards/accuracies": 1.0,
            "logps/chosen": -1.0,
            "nll_loss": 1.0,
            "completions/mean_length": 1.0,
        }
    )


def test_two_answers_without_imitation_are_a_pairwise_logistic_loss(lists):
    logps, mask, scores = (x[:, :2] for x in lists)
    loss, *_ = evaluated(pro(rank_eps=0.0, sft_weight=0.0), logps, mask, scores)
    means = (logps.sum(-1) / mask.sum(-1)).T
    expected = -torch.nn.functional.logsigmoid((scores[:, 0] - scores[:, 1]) * (means[0] - means[1]))
    torch.testing.assert_close(loss.detach(), expected.mean())


def test_two_answers_of_a_token_are_dpo_without_a_reference():
    logps = single([[-2.0, -0.5], [-1.0, -3.0]])
    scores = torch.tensor([[0.7, 0.0], [0.9, 0.2]], dtype=torch.float64)
    ours = evaluated(pro(rank_eps=0.0, sft_weight=0.0), logps, torch.ones_like(logps), scores)
    out, batch = pair_batch(logps.reshape(4, 1).requires_grad_(), torch.zeros(4, 1), torch.ones(4, 1))
    terms, _ = DPO(DPOConfig(name="dpo", beta=0.7)).loss(out, batch)
    torch.testing.assert_close(ours[0], reduce_terms(terms, batch), rtol=1e-7, atol=0)


def test_a_constant_on_all_scores_changes_nothing_and_a_factor_is_the_temperature(lists):
    logps, mask, scores = lists
    plain = evaluated(pro(rank_eps=0.0), logps, mask, scores)
    moved = evaluated(pro(rank_eps=0.0), logps, mask, scores + 7.0)
    torch.testing.assert_close(moved[1], plain[1])
    scaled = evaluated(pro(rank_eps=0.0, sft_weight=0.0), logps, mask, 3 * scores)[0]
    # the loss knows T·p only
    other = evaluated(pro(rank_eps=0.0, sft_weight=0.0), 3 * logps, mask, scores)[0]
    torch.testing.assert_close(scaled, other)


def test_losses_are_positive_and_the_worst_answer_is_only_pushed_down(lists):
    logps, mask, scores = lists
    means = (logps.sum(-1) / mask.sum(-1)).requires_grad_()
    value, heads = rank_losses(means, scores, torch.ones_like(scores, dtype=torch.bool), 0.0)
    assert heads.all()
    assert (value >= 0).all()
    for k in range(3):
        (slope,) = torch.autograd.grad(value[:, k].sum(), means, retain_graph=True)
        assert (slope[:, -1] >= 0).all()


def test_equal_scores_push_nothing_and_are_told():
    logps = single([[-1.0, -2.0, -3.0]])
    loss, gradient, logged, _ = evaluated(
        pro(rank_eps=0.0, sft_weight=0.0), logps, torch.ones_like(logps), torch.ones(1, 3, dtype=torch.float64)
    )
    assert loss.item() == pytest.approx(math.log(3) + math.log(2))
    assert gradient.count_nonzero() == 0
    assert logged["pro/zero_gap_heads"] == 1.0
    assert not {"pro/kendall_tau", "rewards/accuracies"} & logged.keys()


def test_metrics_of_the_order():
    # of the first list 2 of 6 pairs are turned; of the second one pair is decided by no score, and none is turned
    scores = torch.tensor([[3.0, 2, 1, 0], [1, 1, 0, 0]], dtype=torch.float64)
    logps = single([[-2.0, -1, -4, -3], [-2.0, -1, -4, -3]])
    logged = evaluated(pro(), logps, torch.ones_like(logps), scores)[2]
    assert logged["pro/kendall_tau"] == pytest.approx(((4 - 2) / 6 + 1) / 2)
    assert logged["rewards/accuracies"] == 0.5
    assert logged["pro/zero_gap_heads"] == pytest.approx(1 / 6)


def test_short_lists_filled_with_empty_rows_are_as_they_were(lists):
    logps, mask, scores = (x[:, :3] for x in lists)
    alone = evaluated(pro(), logps, mask, scores, imitated=1)
    filled = [torch.cat([x, torch.zeros_like(x[:, :2])], 1) for x in (logps, mask, scores)]
    padded = evaluated(pro(), *filled, imitated=1)
    torch.testing.assert_close(padded[0], alone[0])
    torch.testing.assert_close(padded[1][:, :3], alone[1])
    assert padded[1][:, 3:].count_nonzero() == 0
    assert padded[2] == pytest.approx(alone[2])


def test_lists_of_several_lengths_are_each_their_own(lists):
    logps, mask, scores = (x.clone() for x in lists)
    for x in (logps, mask, scores):
        x[0, 2:] = 0
    together = evaluated(pro(), logps, mask, scores)[0].item()
    short = evaluated(pro(), logps[:1, :2], mask[:1, :2], scores[:1, :2])[0].item()
    long = evaluated(pro(), logps[1:], mask[1:], scores[1:])[0].item()
    assert together == pytest.approx((short + 2 * long) / 3, rel=1e-12)


def test_imitation_may_be_averaged(lists):
    logps, mask, scores = lists
    terms = evaluated(pro(sft_normalization="mean", sft_weight=1.0), logps, mask, scores)[3]
    torch.testing.assert_close(terms["sft"].detach(), -9 * (logps[:, 0].sum(-1) / mask[:, 0].sum(-1)).mean())


@pytest.mark.parametrize("rank_eps", [0.0, 1e-10])
def test_gradient_by_finite_differences(lists, rank_eps):
    logps, mask, scores = (x.clone() for x in lists)
    for x in (logps, mask, scores):
        x[0, 2:] = 0

    def loss(x):
        out, batch = list_batch(x, mask, scores)
        return reduce_terms(pro(rank_eps=rank_eps).loss(out, batch)[0], batch)

    assert torch.autograd.gradcheck(loss, logps.requires_grad_())


def group(rewards: list[float], **fields) -> Group:
    return Group("g", [], [7, 8], [Completion(str(i), [10 + i, 2], reward=r) for i, r in enumerate(rewards)], fields)


def kept(unit) -> list[int]:
    """The answers of a unit by their place in the data."""
    return [row.tokens[2] - 10 for row in unit if row.tokens]


def test_build_sorts_and_keeps_the_order_of_equals():
    (unit,) = pro().build([group([0.2, 0.9, 0.5, 0.9])])
    assert kept(unit) == [1, 3, 2, 0]
    assert [row.scalar.get("score") for row in unit] == [0.9, 0.9, 0.5, 0.2, None]
    assert [row.scalar.get("imitated") for row in unit] == [1.0, 0.0, 0.0, 0.0, None]
    assert unit[4].tokens == unit[4].trained == []
    assert {row.group for row in unit} == {"g"}


def test_the_order_of_the_data_is_nothing():
    (unit,) = pro().build([group([0.2, 0.9, 0.5])])
    turned = group([0.2, 0.9, 0.5])
    turned.completions = turned.completions[::-1]
    assert pro().build([turned]) == [unit]


def test_build_thins_long_lists_evenly():
    (unit,) = pro(list_length=3).build([group([float(-i) for i in range(9)])])
    assert kept(unit) == [0, 4, 8]
    (unit,) = pro(list_length=2).build([group([0.0, 2.0, 1.0])])
    assert kept(unit) == [1, 0]


def test_build_scales_then_clips():
    (unit,) = pro(score_scale=10.0, score_clip=3.0).build([group([0.2, 0.9, -0.5])])
    assert [row.scalar["score"] for row in unit[:3]] == [3.0, 2.0, -3.0]


def test_the_imitated_answer_is_named_by_its_rank():
    (unit,) = pro().build([group([0.2, 0.9, 0.5], sft_index=1)])
    assert [row.scalar.get("imitated") for row in unit[:3]] == [0.0, 1.0, 0.0]
    for wrong in (3, -1, "first"):
        with pytest.raises(DataError, match="row 'g': `sft_index` is"):
            pro().build([group([0.2, 0.9, 0.5], sft_index=wrong)])


@pytest.mark.parametrize(
    ("key", "value"),
    [("sft_weight", -1.0), ("rank_eps", -1.0), ("list_length", 1), ("score_scale", 0.0), ("score_clip", 0.0)],
)
def test_config_bounds(key, value):
    with pytest.raises(ValidationError, match=key):
        pro(**{key: value})


def test_the_plan_counts_the_rows_of_a_list(tmp_path):
    bench = Bench("pro", folder=tmp_path, config={"list_length": 3})
    assert any("7 × unit of 3 rows an optimizer step" in line for line in check(bench.recipe("plan")))


@pytest.fixture
def ragged(tmp_path) -> Bench:
    """Lists of 2, 3, 4 and 6 answers that share prompts, worst first."""
    rows = []
    for i, n in enumerate((2, 3, 6, 4, 2, 3, 5)):
        answers = [("abcdefghij"[: 2 + j] if j % 2 else "ABCDEFGHIJ"[j:]) + "xyz"[: i % 3] for j in range(n)]
        scores = [0.5 * j for j in range(n)]
        rows.append({"id": str(i), "prompt": f"prompt {'abc'[i % 3]}", "completions": answers, "scores": scores})
    return Bench("pro", folder=tmp_path, rows=rows)


def test_ragged_lists_keep_the_contract(ragged):
    check_micro_batches(ragged)
    check_order(ragged)
    check_layouts(ragged)
    check_overfits(ragged)


@pytest.mark.distributed
def test_ragged_lists_ignore_world_size(ragged):
    check_world_size(ragged, 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers_of_the_authors_code(name, dtype, tolerance):
    case = golden_case("pro.json", name)
    inputs, expected = case["inputs"], case["outputs"]
    assert set(inputs["sft_index"]) == {0}
    logps, mask, scores = (
        torch.tensor(inputs[key], dtype=torch.float64).to(dtype) for key in ("token_logps", "response_mask", "rewards")
    )
    loss, gradient, logged, terms = evaluated(pro(sft_weight=case["params"]["sft_weight"]), logps, mask, scores)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(loss, torch.tensor(expected["loss"], dtype=dtype), **close)
    torch.testing.assert_close(gradient, torch.tensor(expected["grad_token_logps"], dtype=dtype), **close)
    torch.testing.assert_close(terms["sft"], torch.tensor(expected["sft_loss_scaled"], dtype=dtype), **close)
    found = [logged[f"pro/rank_loss_{k}"] for k in range(len(expected["rank_losses"]))]
    assert found == pytest.approx(expected["rank_losses"], rel=tolerance, abs=tolerance)
