"""SELM: the five properties of its loss, what becomes a pair, and what is refused."""

import math

import pytest
import torch
from pydantic import ValidationError

from alignkit.algorithms.dpo import DPO, DPOConfig
from alignkit.algorithms.selm import SELM, SELMConfig
from alignkit.core import Completion, DataError, Forward, Group
from alignkit.core.config import CombineConfig
from alignkit.core.contracts import RolloutFacts
from alignkit.data.collate import collate
from tests.algorithms.fakes import averages, reduce_terms

NAN = float("nan")
LENGTHS = [[3, 5, 4], [2, 2, 6], [1, 4, 1]]
"""Tokens of (best, worst, sample) for each of three prompts."""


def selm(**keys) -> SELM:
    return SELM(SELMConfig(name="selm", **keys))


def group(*rewards: float, written: int = 1, same: tuple[int, int] | None = None) -> Group:
    """Answers of different tokens, the first `written` of them the policy's; `same`: one that is equal to another."""
    answers = [Completion("", [10 + i, 2], reward=reward) for i, reward in enumerate(rewards)]
    for answer in answers[:written]:
        answer.version, answer.logps = 0, [-1.0, -1.0]
    if same is not None:
        answers[same[0]].tokens = list(answers[same[1]].tokens)
    return Group("g", [], [7, 8], answers)


def batch_of(seed: int = 0):
    """Three prompts with random log-probabilities: (leaf of the policy, batch)."""
    groups = []
    for i, (best, worst, sample) in enumerate(LENGTHS):
        told = ((sample, 0.5), (best, 1.0), (worst, 0.0))
        answers = [Completion("", [20 + j] * n, reward=reward) for j, (n, reward) in enumerate(told)]
        groups.append(Group(f"g{i}", [], [7, 8], answers))
    batch = collate(selm().build(groups))
    draw = torch.Generator().manual_seed(seed)
    numbers = -torch.rand(2, *batch["mask"].shape, generator=draw, dtype=torch.float64).where(batch["mask"], 0.0)
    return numbers[0].requires_grad_(), batch.with_columns({"reference.logps": numbers[1]})


def step(algorithm, policy, batch):
    """Loss, gradient and metrics."""
    policy = policy.detach().requires_grad_()
    terms, metrics = algorithm.loss(Forward(policy), batch)
    loss = reduce_terms(terms, batch)
    loss.backward()
    return loss.item(), policy.grad, averages(metrics)


@pytest.mark.parametrize("keys", [{}, {"loss_type": ["sigmoid", "hinge"], "label_smoothing": 0.1, "ld_alpha": 0.5}])
def test_without_optimism_it_is_dpo_bit_for_bit(keys):
    policy, batch = batch_of()
    loss, gradient, metrics = step(selm(alpha=0.0, **keys), policy, batch)
    pairs = torch.tensor([0, 1, 3, 4, 6, 7])
    expected = step(DPO(DPOConfig(name="dpo", beta=0.01, **keys)), policy[pairs], batch.keep_rows(0, 1))
    assert loss == expected[0]
    assert gradient[pairs].equal(expected[1])
    assert not gradient[[2, 5, 8]].any()
    lengths = "completions/mean_length"
    assert {name: metrics[name] for name in expected[2] if name != lengths} == {
        name: value for name, value in expected[2].items() if name != lengths
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_a_sample_is_lowered_by_its_weight_whatever_the_pair(seed):
    policy, batch = batch_of(seed)
    _, gradient, _ = step(selm(alpha=0.3, beta=0.5), policy, batch)
    samples = batch.keep_rows(2)["mask"]
    expected = (0.3 * 0.5 / len(LENGTHS)) * samples.double()
    torch.testing.assert_close(gradient[[2, 5, 8]], expected, rtol=1e-12, atol=0)


def test_how_likely_the_sample_was_changes_the_loss_and_no_gradient():
    policy, batch = batch_of()
    algorithm = selm(alpha=0.3, beta=0.5)
    loss, gradient, _ = step(algorithm, policy, batch)
    moved = batch["reference.logps"].clone()
    moved[[2, 5, 8], 2] += 0.7  # the first token of every sample
    other, same, _ = step(algorithm, policy, batch.with_columns({"reference.logps": moved}))
    assert other == pytest.approx(loss - 0.3 * 0.5 * 0.7)
    torch.testing.assert_close(same, gradient, rtol=0, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.001, 5.0])
def test_where_nothing_has_moved_the_loss_is_ln_2(alpha):
    policy, batch = batch_of()
    algorithm = selm(alpha=alpha, beta=2.0)
    loss, _, metrics = step(algorithm, policy, batch.with_columns({"reference.logps": policy.detach()}))
    assert algorithm.at_reference() == {"loss": math.log(2), "rewards/margins": 0.0}
    assert loss == pytest.approx(math.log(2), abs=1e-15)
    assert metrics["selm/optimism"] == metrics["kl"] == metrics["rewards/margins"] == 0.0


def test_by_hand_with_its_metrics():
    """One prompt, one token each: h = 2, log-ratio of the sample ln ½, so k3 of the divergence is ½ + ln 2 − 1."""
    one = Group("g", [], [7], [Completion("", [i], reward=r) for i, r in ((5, 0.0), (6, 1.0), (5, 0.5))])
    batch = collate(selm().build([one])).with_columns({"reference.logps": torch.zeros(3, 2, dtype=torch.float64)})
    policy = torch.tensor([[0.0, 0.5], [0.0, -1.5], [0.0, -math.log(2)]], dtype=torch.float64)
    pair = math.log1p(math.exp(-1.0))
    loss, _, metrics = step(selm(alpha=0.5, beta=0.5), policy, batch)
    assert loss == pytest.approx(pair - 0.25 * math.log(2))
    assert metrics["selm/optimism"] == pytest.approx(-math.log(2))
    assert metrics["kl"] == pytest.approx(math.log(2) - 0.5)
    assert metrics["selm/optimism_outweighs"] == 0.0
    assert (metrics["selm/frac_sample_chosen"], metrics["selm/frac_sample_rejected"]) == (0.0, 1.0)
    assert metrics["selm/distinct_responses"] == 2.0
    assert step(selm(alpha=5.0, beta=0.5), policy, batch)[2]["selm/optimism_outweighs"] == 1.0


def test_the_clip_ends_the_push_and_nothing_else():
    policy, batch = batch_of()
    policy = policy.detach().clone()
    policy[2] -= batch["mask"][2].double()  # the first sample: four nats less likely
    loss, gradient, metrics = step(selm(alpha=1.0, beta=0.5, optimism_clip=2.0), policy, batch)
    plain, whole, unclipped = step(selm(alpha=1.0, beta=0.5), policy, batch)
    assert not gradient[2].any()
    others = [0, 1, 3, 4, 5, 6, 7, 8]
    assert gradient[others].equal(whole[others])
    assert loss > plain
    assert metrics["selm/optimism"] == unclipped["selm/optimism"]


@pytest.mark.parametrize(
    ("rewards", "written", "expected"),
    [
        ((0.2, 1.0, 0.0), 1, (11, 12, 10)),  # the data's own pair
        ((2.0, 1.0, 0.0), 1, (10, 12, 10)),  # the sample is better than both
        ((-1.0, 0.0, 1.0), 1, (12, 10, 10)),  # the sample is worse, and the judge turns the pair
        ((0.3, 0.9, 0.1, 0.4), 4, (11, 12, 10)),  # no pair in the data
        ((NAN, 1.0, 0.0), 1, (11, 12, 10)),  # nobody judged the sample
        ((0.5, NAN, 0.0), 1, (10, 12, 10)),
        ((0.0, 1.0, 1.0, 0.0), 2, (11, 13, 10)),  # of equal ones the outer
    ],
)
def test_best_and_worst_are_the_pair_and_the_first_sample_is_the_third_row(rewards, written, expected):
    (unit,) = selm().build([group(*rewards, written=written)])
    assert tuple(row.tokens[2] for row in unit) == expected
    assert not any(row.token for row in unit), "nobody knows who the data's answers are by"


@pytest.mark.parametrize("rewards", [(1.0, 1.0, 1.0), (NAN, NAN, 0.0), (NAN, NAN, NAN)])
def test_without_a_difference_there_is_no_unit(rewards):
    assert selm().build([group(*rewards)]) == []


def test_a_sample_that_repeats_the_chosen_answer_counts_as_chosen():
    ((_, _, sample),) = selm().build([group(1.0, 1.0, 0.0, same=(0, 1))])
    assert sample.scalar == {"is_chosen": 1.0, "is_rejected": 0.0, "distinct": 2.0}


def facts(num_generations: int) -> RolloutFacts:
    return RolloutFacts(num_generations, 8, {}, CombineConfig())


def test_a_prompt_with_nothing_to_compare_is_refused():
    alone, pair = Group("lonely", [], [7]), group(1.0, 0.0, written=0)
    algorithm = selm()
    algorithm.take_facts(facts(1))
    algorithm.prepare([pair])
    with pytest.raises(DataError, match=r"row 'lonely' has no answers of its own"):
        algorithm.prepare([pair, alone])
    algorithm.take_facts(facts(2))
    algorithm.prepare([pair, alone])


def test_its_defaults_and_what_does_not_go_together():
    config = SELMConfig(name="selm")
    assert (config.beta, config.alpha, config.optimism_clip, config.rounds) == (0.01, 0.001, None, 3)
    assert SELM.rows_per_unit(config) == 3
    assert SELM.needs.roster == {"reference"}
    with pytest.raises(ValidationError, match="leave `sft` out"):
        selm(loss_type=["sigmoid", "sft"])
