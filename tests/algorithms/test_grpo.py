"""GRPO and its relatives: golden numbers through the class, advantages by hand, invariants, refills, long answers."""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from alignkit import load_recipe, ops
from alignkit.algorithms.grpo import GRPO, OLD, REFERENCE, WEIGHT, GRPOConfig
from alignkit.core import Batch, Completion, Forward, Group, RecipeError, Terms, register
from alignkit.core.config import CombineConfig
from alignkit.core.contracts import RolloutFacts
from alignkit.core.rng import generator
from alignkit.core.types import Score
from alignkit.data.stream import Stream
from alignkit.dist.world import LocalWorld
from alignkit.loop.rollouts import Rollouts
from tests.algorithms.fakes import averages, reduce_terms
from tests.shared import golden_case, shared_path

NAMES = (
    *("grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "cispo", "bnpo", "sapo"),
    *("luspo", "opo", "gmpo", "vespo"),
)
NAN = float("nan")
LONGEST = 6


def made(name: str, *, combine: CombineConfig | None = None, weights: dict[str, float] | None = None, **keys) -> GRPO:
    """A method by its registered name, its own keys changed; the limit of length is 6 tokens."""
    preset = register.algorithm.get(name).preset
    algorithm = GRPO(GRPOConfig.model_validate({**preset, "name": name, **keys}))
    algorithm.take_facts(RolloutFacts(4, LONGEST, weights or {"r": 1.0}, combine or CombineConfig()))
    return algorithm


def answers(
    lengths: list[int],
    reward: list[float],
    group: list[int] | None = None,
    *,
    logps: Tensor | None = None,
    ended: list[int] | None = None,
    **columns: list[float] | Tensor,
) -> tuple[Tensor, Batch]:
    """Answers of these lengths behind one token of prompt. The policy is the old one unless `logps` [N, L] differ."""
    mask = (torch.arange(1, LONGEST + 2) <= torch.tensor(lengths)[:, None]) & (torch.arange(LONGEST + 1) > -1)
    mask = torch.cat([torch.zeros(len(lengths), 1, dtype=torch.bool), mask[:, :LONGEST]], 1)
    draw = generator(0, "log-probabilities")
    old = torch.tensor([[-3 * draw.random() for _ in row] for row in mask.tolist()], dtype=torch.float64)
    old = old.where(mask, 0.0)
    policy = (old if logps is None else logps).clone().requires_grad_()
    every = torch.ones(len(lengths), dtype=torch.bool)
    found = {name: x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for name, x in columns.items()}
    return policy, Batch(
        inputs={},
        columns={
            "mask": mask,
            "row": every,
            "unit": every,
            OLD: old,
            REFERENCE: old,
            WEIGHT: torch.ones_like(old),
            "reward": torch.tensor(reward, dtype=torch.float64),
            "group": torch.tensor([0] * len(lengths) if group is None else group, dtype=torch.float64),
            "ended": torch.tensor([1] * len(lengths) if ended is None else ended, dtype=torch.float64),
            **found,
        },
        k=1,
    )


def learned(algorithm: GRPO, policy: Tensor, batch: Batch) -> tuple[float, Tensor, dict[str, float], Batch]:
    """Loss, gradient by token, metrics and the annotated batch."""
    batch = algorithm.annotate(batch, LocalWorld())
    terms, metrics = algorithm.loss(Forward(logps=policy), batch)
    loss = reduce_terms(terms, batch)
    (gradient,) = torch.autograd.grad(loss, policy)
    logged = {k: float(m.sum) / (float(m.count) if m.how == "mean" else 1) for k, m in metrics.items() if m.count}
    return loss.item(), gradient, logged, batch


def advantages(algorithm: GRPO, batch: Batch) -> list[float]:
    """Of each answer, on its first token."""
    return algorithm.annotate(batch, LocalWorld())["advantage"][:, 1].tolist()


def moved(lengths: list[int], by: float = 0.5) -> Tensor:
    """Log-probabilities of a policy that has left the old one."""
    old, _ = answers(lengths, [0.0] * len(lengths))
    draw = generator(1, "moved")
    return old.detach() + torch.tensor([[draw.gauss(0, by) for _ in row] for row in old.tolist()], dtype=torch.float64)


def test_what_each_name_stands_for():
    assert all(register.algorithm.get(name).target is GRPO for name in NAMES)
    differ = {name: dict(register.algorithm.get(name).preset) for name in NAMES}
    assert differ["grpo"] == {}
    assert GRPOConfig(name="grpo").beta == 0.04
    assert all(keys["beta"] == 0 for name, keys in differ.items() if name != "grpo")
    assert differ["dapo"].keys() == {
        *("epsilon_high", "aggregation", "beta", "dynamic_sampling", "overlong_filter", "overlong_cache")
    }
    assert (differ["rloo"]["kl_coef"], differ["gspo"]["epsilon_high"]) == (0.03, 4e-4)


# golden numbers


SHAPE = {"grpo": "seq_mean", "sapo": "seq_mean", "dr_grpo": "fixed", "luspo": "seq_sum"}
LOSSES = [
    *(f"{kind}{more}" for kind in ("grpo", "bnpo", "dr_grpo", "dapo") for more in ("", "_clip_higher", "_kl")),
    *("grpo_kl_bias_corrected", "dr_grpo_long_budget", "dapo_global_token_count", "gspo", "cispo", "two_sided_delta"),
    *("sapo", "vespo", "luspo", "grpo__empty_completion", "dapo__empty_completion", "grpo__zero_advantage"),
    *("grpo__extreme_ratios", "gspo__extreme_ratios", "cispo__extreme_ratios", "grpo__token_level_advantages"),
]


def golden_batch(inputs: dict[str, Any], mask: str) -> tuple[Tensor, Batch]:
    def numbers(name: str) -> Tensor:
        return torch.tensor(inputs[name], dtype=torch.float64)

    policy, trained = numbers("new_token_logps").requires_grad_(), numbers(mask).bool()
    given = numbers("advantages")
    columns = {"mask": trained, "row": torch.ones(len(trained), dtype=torch.bool), WEIGHT: torch.ones_like(policy)}
    columns["advantage"] = (given[:, None] if given.ndim == 1 else given).expand_as(policy).where(trained, 0.0)
    columns[OLD] = numbers("old_token_logps") if "old_token_logps" in inputs else torch.zeros_like(policy)
    columns[REFERENCE] = numbers("ref_token_logps") if "ref_token_logps" in inputs else torch.zeros_like(policy)
    return policy, Batch(inputs={}, columns=columns, k=1)


def divided(terms: Terms, batch: Batch, tokens: float) -> Tensor:
    """As the trainer does where the whole optimizer batch has so many tokens."""
    count = {"mask": tokens, "row": float(batch["row"].sum())}
    shares = [t.weight * t.value.where(batch[t.over], 0.0).sum() / count[t.over] for t in terms.values()]
    return torch.stack(shares).sum()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_a_published_implementation(name):
    case = golden_case("grpo_loss.json", name)
    params, kind = case["params"], case["params"]["loss_type"]
    keys = {
        "beta": params["beta"],
        "kl_is_correction": params["use_bias_correction_kl"],
        "epsilon_low": params["epsilon_low"],
        "epsilon_high": params["epsilon_high"],
        "delta": params["delta"],
        "ratio": params["importance_sampling_level"],
        "surrogate": kind if kind in ("cispo", "sapo", "vespo") else "clip",
        "aggregation": SHAPE.get(kind, "token_mean"),
        "tau_negative": torch.tensor(1.05).item(),  # made in float32 there
    }
    if kind == "cispo":
        keys["clip_max"] = params["clip_max"]
    algorithm = GRPO(GRPOConfig(name="grpo", **keys))
    algorithm.take_facts(RolloutFacts(4, params["max_completion_length"], {}, CombineConfig()))
    policy, batch = golden_batch(case["inputs"], "completion_mask")
    terms, metrics = algorithm.loss(Forward(logps=policy), batch)
    tokens = float(batch["mask"].sum()) if kind == "bnpo" else params["global_token_count"]
    loss = divided(terms, batch, tokens)
    loss.backward()
    meta = json.loads(shared_path("golden", "grpo_loss.json").read_text())["meta"]
    close = {"rtol": meta["rtol"], "atol": meta["atol"]}
    for found, expected in ((loss.detach(), "loss"), (policy.grad, "grad_new_token_logps")):
        torch.testing.assert_close(found, torch.tensor(case["outputs"][expected], dtype=torch.float64), **close)
    logged = averages(metrics)
    theirs = {"cispo_clip_ratio": "clip_ratio/high_mean"}
    for key, value in case["outputs"]["metrics"].items():
        corrected = key == "kl" and params["use_bias_correction_kl"]  # there logged with its factor
        if theirs.get(key, key) in logged and not corrected:
            assert logged[theirs.get(key, key)] == pytest.approx(value, rel=1e-6, abs=1e-7), key


@pytest.mark.parametrize("name", ["loss_symmetric", "loss_asymmetric"])
def test_loss_of_whole_answers_is_that_of_a_published_implementation(name):
    case = golden_case("rloo.json", name)
    bounds = {key: case["params"][key] for key in ("epsilon_low", "epsilon_high")}
    policy, batch = golden_batch(case["inputs"], "completion_mask")
    old = torch.zeros_like(policy)
    old[:, 0] = torch.tensor(case["inputs"]["old_seq_logps"])  # only the sum is known; every answer has a first token
    batch = batch.with_columns({OLD: old.detach()})
    terms, _ = made("rloo", **bounds, kl_coef=0.0).loss(Forward(logps=policy), batch)
    loss = reduce_terms(terms, batch)
    loss.backward()
    assert loss.item() == pytest.approx(case["outputs"]["loss"], rel=1e-6)
    expected = torch.tensor(case["outputs"]["grad_new_token_logps"], dtype=torch.float64)
    torch.testing.assert_close(policy.grad, expected, rtol=1e-6, atol=1e-7)


def test_geometric_means_are_those_of_a_published_implementation():
    case = golden_case("policy_losses_verl.json", "geo_mean")
    low, high = (case["params"][f"clip_ratio_{side}"] or case["params"]["clip_ratio"] for side in ("low", "high"))
    policy, batch = golden_batch(case["inputs"], "response_mask")
    terms, _ = made("gmpo", epsilon_low=low, epsilon_high=high).loss(Forward(logps=policy), batch)
    loss = reduce_terms(terms, batch)
    loss.backward()
    assert loss.item() == pytest.approx(case["outputs"]["loss"], rel=1e-7)
    expected = torch.tensor(case["outputs"]["grad_new_token_logps"], dtype=torch.float64)
    torch.testing.assert_close(policy.grad, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("group", {}),
        ("batch", {"advantage": "batch_std"}),
        ("none", {"advantage": "group"}),
        ("zero_std_group", {}),
        ("missing_scores", {}),
        ("gdpo_normalize_then_sum", {}),
    ],
)
def test_advantages_are_those_of_a_published_implementation(name, keys):
    case = golden_case("grpo_advantages.json", name)
    given = [[float(x) for x in row] for row in case["inputs"]["rewards_per_func"]]
    rewards, weights = torch.tensor(given, dtype=torch.float64), case["params"]["reward_weights"]
    apart = name.startswith("gdpo")
    objectives = {f"objective.{i}": column for i, column in enumerate(rewards.unbind(1))}
    algorithm = made(
        "grpo",
        **keys,
        combine=CombineConfig(level="advantage" if apart else "reward"),
        weights={str(i): weight for i, weight in enumerate(weights)},
    )
    summed = ops.weighted_rewards(rewards, torch.tensor(weights, dtype=torch.float64))
    group = [i // case["params"]["num_generations"] for i in range(len(rewards))]
    _, batch = answers([2] * len(rewards), summed.tolist(), group, **objectives)
    assert advantages(algorithm, batch) == pytest.approx(case["outputs"]["advantages"], rel=1e-6, abs=1e-7)


# by hand


def test_one_group_by_hand():
    """Rewards 3, 1, 2: mean 2, deviation 1. The loss is over answers, of the mean over tokens of −A."""
    policy, batch = answers([1, 2, 3], [3.0, 1.0, 2.0])
    loss, gradient, metrics, batch = learned(made("grpo", advantage_eps=0.0), policy, batch)
    assert batch["advantage"][:, 1].tolist() == [1.0, -1.0, 0.0]
    assert batch["advantage"][1].tolist() == [0.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0]
    assert loss == pytest.approx(0.0)
    assert gradient[0, 1].item() == pytest.approx(-1 / 3)
    assert gradient[1, 1:3].tolist() == pytest.approx([1 / 6, 1 / 6])
    assert gradient[2].abs().max() == 0
    assert (metrics["ratio/mean"], metrics["clip_ratio/region_mean"], metrics["kl"]) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dr_grpo", [1.0, -1.0, 0.0]),
        ("rloo", [1.5, -1.5, 0.0]),
        ("opo", [3 - 11 / 6, 1 - 11 / 6, 2 - 11 / 6]),  # the baseline is (1·3 + 2·1 + 3·2) / 6
        ("reinforce_pp_baseline", [1.0 * 6**0.5, 0.0, -1.0]),
    ],
)
def test_other_advantages_by_hand(name, expected):
    _, batch = answers([1, 2, 3], [3.0, 1.0, 2.0])
    found = advantages(made(name, kl_coef=0.0), batch)
    if name == "reinforce_pp_baseline":  # 1, −1, −1, 0, 0, 0 over six tokens: mean −1/6, variance 17/30
        expected = [(x + 1 / 6) / (17 / 30) ** 0.5 for x in (1.0, -1.0, 0.0)]
    assert found == pytest.approx(expected)


def test_returns_of_tokens_by_hand():
    """Two answers of 2 tokens, κ = 0.5, k1 of 1 on the first answer's first token, γ = 0.5."""
    _, batch = answers([2, 2], [4.0, 2.0], [0, 1])
    reference = batch[OLD].clone()
    reference[0, 1] -= 1
    algorithm = made("reinforce_pp", kl_coef=0.5, gamma=0.5)
    found = algorithm.annotate(batch.with_columns({REFERENCE: reference}), LocalWorld())["advantage"]
    returns = torch.tensor([-0.5 + 0.5 * 4, 4.0, 0.5 * 2, 2.0], dtype=torch.float64)
    white = (returns - returns.mean()) / returns.std()
    assert found[:, 1:3].flatten().tolist() == pytest.approx(white.tolist(), abs=1e-6)


def test_the_divergence_is_taken_off_the_reward_of_an_answer():
    _, batch = answers([1, 2], [1.0, 1.0])
    reference = batch[OLD] - 0.5 * batch["mask"]
    found = advantages(made("rloo", kl_coef=0.1), batch.with_columns({REFERENCE: reference}))
    assert found == pytest.approx([0.05, -0.05])  # 1 − 0.1·0.5 against 1 − 0.1·1


def test_a_token_of_another_writer_counts_as_much_as_its_weight():
    policy, batch = answers([1, 1], [1.0, 0.0])
    heavy = batch[WEIGHT].clone()
    heavy[0] = 2.0
    _, plain, _, _ = learned(made("dr_grpo"), policy, batch)
    _, gradient, _, _ = learned(made("dr_grpo"), policy, batch.with_columns({WEIGHT: heavy}))
    assert gradient[0].tolist() == pytest.approx((2 * plain[0]).tolist())
    assert gradient[1].tolist() == plain[1].tolist()


# invariants


ROUND = ([3, 1, 4, 2, 5, 6, 1, 2], [0.3, 0.9, 0.1, 0.4, 1.0, 0.0, 0.0, 0.7], [0, 0, 0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_advantages_of_a_group_sum_to_nothing(name):
    _, batch = answers(*ROUND)
    found = advantages(made(name, kl_coef=0.0), batch)
    assert sum(found[:4]) == pytest.approx(0, abs=1e-12)
    assert sum(found[4:]) == pytest.approx(0, abs=1e-12)
    assert max(map(abs, found)) > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_equal_rewards_teach_nothing(name):
    policy, batch = answers(ROUND[0], [0.7] * 8, ROUND[2], logps=moved(ROUND[0]))
    _, gradient, _, _ = learned(made(name, beta=0.0, kl_coef=0.0, overlong_cache=0.0), policy, batch)
    assert gradient.abs().max() < 1e-12


def test_scale_and_shift_of_rewards_cancel():
    _, batch = answers(*ROUND)
    _, other = answers(ROUND[0], [5 * r - 2 for r in ROUND[1]], ROUND[2])
    first, second = (advantages(made("grpo", advantage_eps=1e-12), b) for b in (batch, other))
    assert first == pytest.approx(second, rel=1e-9)


def test_leaving_one_out_is_a_larger_group_advantage():
    _, batch = answers(*ROUND)
    group = advantages(made("dr_grpo"), batch)
    assert advantages(made("rloo", kl_coef=0.0), batch) == pytest.approx([4 / 3 * a for a in group])


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "sapo", "dapo", "gmpo", "vespo", "bnpo"])
def test_on_policy_answers_of_one_length_pull_alike(name):
    policy, batch = answers([3] * 8, *ROUND[1:])
    keys: dict[str, Any] = {"beta": 0.0, "overlong_cache": 0.0}
    _, expected, _, _ = learned(made("grpo", beta=0.0), policy, batch)
    _, gradient, _, _ = learned(made(name, **keys), policy, batch)
    torch.testing.assert_close(gradient, expected)
    assert expected.abs().max() > 0.01


def test_means_over_tokens_and_over_a_fixed_length_differ_by_their_ratio():
    policy, batch = answers(*ROUND, logps=moved(ROUND[0]))
    fixed, _, _, _ = learned(made("dr_grpo"), policy, batch)
    tokens, _, _, _ = learned(made("bnpo", advantage="group"), policy, batch)
    assert fixed * len(ROUND[0]) * LONGEST / sum(ROUND[0]) == pytest.approx(tokens)
    assert abs(tokens) > 1e-3


def test_means_over_tokens_are_those_over_answers_of_one_length():
    policy, batch = answers([3] * 8, *ROUND[1:], logps=moved([3] * 8))
    first, second = (learned(made(name, beta=0.0), policy, batch)[:2] for name in ("grpo", "bnpo"))
    assert first[0] == pytest.approx(second[0])
    torch.testing.assert_close(first[1], second[1])


@pytest.mark.parametrize("name", NAMES)
def test_order_does_not_matter(name):
    policy, batch = answers(*ROUND, logps=moved(ROUND[0], 0.1))
    order = torch.tensor([4, 0, 7, 2, 6, 1, 3, 5])
    other = Batch({}, {key: x[order] for key, x in batch.columns.items()}, 1)
    shuffled = policy.detach()[order].requires_grad_()
    loss, gradient, _, _ = learned(made(name), policy, batch)
    again, turned, _, _ = learned(made(name), shuffled, other)
    assert again == pytest.approx(loss, abs=1e-9)
    torch.testing.assert_close(turned, gradient[order], rtol=1e-6, atol=1e-9)


def test_at_the_reference_there_is_no_divergence():
    policy, batch = answers(ROUND[0], [0.5] * 8, ROUND[2])
    loss, gradient, metrics, _ = learned(made("grpo", beta=1.0), policy, batch)
    assert (loss, metrics["kl"]) == (0.0, 0.0)
    assert gradient.abs().max() == 0
    assert made("grpo").at_reference() == made("rloo").at_reference() == {"kl": 0.0}
    assert made("dapo").at_reference() == {}


def test_the_divergence_is_pulled_back():
    policy, batch = answers([1], [0.5], logps=torch.full((1, LONGEST + 1), -1.0, dtype=torch.float64))
    batch = batch.with_columns({OLD: policy.detach(), REFERENCE: policy.detach() - 1.0})
    loss, gradient, metrics, _ = learned(made("grpo", beta=0.5), policy, batch)
    k3 = torch.tensor(-1.0).exp().item() - 1 + 1
    assert metrics["kl"] == pytest.approx(k3)
    assert loss == pytest.approx(0.5 * k3)
    assert gradient[0, 1].item() == pytest.approx(0.5 * (1 - torch.tensor(-1.0).exp().item()))


@pytest.mark.parametrize(("name", "share"), [("grpo", 2 / 5), ("gspo", 1 / 2), ("rloo", 1 / 2)])
def test_the_clip_is_counted_where_it_works(name, share):
    """Two tokens of the good answer of 4 are above 1.2, and so is its geometric mean."""
    policy, batch = answers([4, 1], [1.0, 0.0])
    policy = policy.detach() + torch.tensor([[0, 0.9, 0.9, 0, 0, 0, 0], [0.0] * 7], dtype=torch.float64)
    _, _, metrics, _ = learned(made(name, kl_coef=0.0, epsilon_high=0.2), policy.requires_grad_(), batch)
    assert metrics["clip_ratio/high_mean"] == metrics["clip_ratio/region_mean"] == pytest.approx(share)
    assert metrics["clip_ratio/low_mean"] == 0
    assert metrics["ratio/max"] == pytest.approx(torch.tensor(0.9).exp().item())


def test_what_has_no_clip_counts_none():
    policy, batch = answers(*ROUND, logps=moved(ROUND[0]))
    for name in ("sapo", "vespo"):
        assert not [key for key in learned(made(name), policy, batch)[2] if key.startswith("clip")]
    _, _, metrics, _ = learned(made("cispo", clip_max=1.1), policy, batch)
    assert metrics["clip_ratio/low_mean"] == 0 < metrics["clip_ratio/high_mean"]


def test_bounds_of_geometric_means_are_of_logarithms():
    policy, batch = answers([1, 1], [1.0, 0.0])
    policy = policy.detach() + torch.tensor([[0.0, 0.39], [0.0, -0.41]]).repeat(1, 4)[:, :7]
    _, _, metrics, _ = learned(made("gmpo"), policy.requires_grad_(), batch)
    assert (metrics["clip_ratio/low_mean"], metrics["clip_ratio/high_mean"]) == (0.5, 0.0)


# rows without a score, alone, or too long


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_without_a_score_changes_no_other(name):
    lengths, reward, group = ROUND
    algorithm = made(name, beta=0.0, advantage_eps=0.0)
    _, batch = answers(lengths, reward, group)
    _, more = answers([*lengths, 4], [*reward, NAN], [*group, 0])
    found = algorithm.annotate(more, LocalWorld())["advantage"]
    assert found[-1].abs().max() == 0
    torch.testing.assert_close(found[:-1], algorithm.annotate(batch, LocalWorld())["advantage"])
    if name == "grpo":
        assert found[:-1].abs().max() > 0.5


def test_a_lone_answer_teaches_nothing_and_a_batch_of_none_neither():
    for name in NAMES:
        _, batch = answers([2, 3], [1.0, 0.0], [0, 1])
        if name not in ("reinforce_pp", "reinforce_pp_baseline"):
            assert advantages(made(name, kl_coef=0.0), batch) == [0.0, 0.0]
        nothing = {key: torch.zeros(2, dtype=torch.bool) for key in ("row", "unit")}
        nothing["mask"] = torch.zeros_like(batch["mask"])
        assert made(name).annotate(batch.with_columns(nothing), LocalWorld())["advantage"].abs().max() == 0


def test_answers_that_were_cut_off_are_not_learned_from():
    lengths, reward, group = ROUND
    policy, batch = answers(lengths, reward, group, ended=[1, 1, 0, 1, 1, 0, 1, 1])
    _, gradient, _, found = learned(made("grpo", beta=1.0, overlong_filter=True), policy, batch)
    assert gradient[2].abs().max() == gradient[5].abs().max() == 0
    assert gradient[0].abs().max() > 0
    assert found["mask"].sum() == sum(lengths) - 4 - 6
    assert found["row"].sum() == 8
    _, all_ended = answers(*ROUND)
    assert found["advantage"][0, 1] == made("grpo").annotate(all_ended, LocalWorld())["advantage"][0, 1]


@pytest.mark.parametrize(("cache", "tokens"), [(0.5, 3), (2, 2)])
def test_long_answers_lose_reward_before_the_limit(cache, tokens):
    _, batch = answers([2, 5, 6], [1.0, 1.0, 1.0])
    taken = [0.0, (LONGEST - tokens - 5) / tokens, -1.0]
    mean = sum(taken) / 3
    assert advantages(made("dr_grpo", overlong_cache=cache), batch) == pytest.approx([x - mean for x in taken])


# dynamic sampling


class ThreadWorld(LocalWorld):
    """A rank among threads."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self.size, self.barrier, self.slots = rank, size, barrier, slots

    def gather(self, obj: Any) -> list[Any]:
        self.slots[self.rank] = obj
        self.barrier.wait(20)
        found = list(self.slots)
        self.barrier.wait(20)
        return found

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self.gather(x)).sum(0)


def on_ranks(size: int, work: Callable[[LocalWorld], Any]) -> list[Any]:
    """What `work` returns on each of so many ranks."""
    barrier, slots, results = threading.Barrier(size), [None] * size, [None] * size

    def one(rank: int) -> None:
        results[rank] = work(ThreadWorld(rank, size, barrier, slots))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class Writer:
    """Writes the same answers to the same prompt."""

    def fill(self, groups: list[Group], n: int) -> list[Group]:
        return [
            Group(g.id, g.messages, g.prompt, [Completion(str(i), [3, 2]) for i in range(n)], g.fields) for g in groups
        ]

    def sync(self, version: int) -> None:
        del version


def rollouts(world: LocalWorld, algorithm: GRPO, is_plain: Callable[[int], bool], prompts: int = 40) -> Rollouts:
    """Rounds of four prompts; all answers to a plain one are equally good."""
    groups = [Group(str(i), [], [1], fields={"number": i}) for i in range(prompts)]

    def score(given: list[Group], version: int) -> list[Group]:
        for group in given:
            for i, completion in enumerate(group.completions):
                completion.reward = 1.0 if is_plain(group.fields["number"]) else float(i)
        return given

    stream = Stream([groups], [1.0], seed=0, groups_per_round=4, rank=world.rank, size=world.size)
    return Rollouts(stream, Writer(), algorithm, world, 2, score)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_groups_without_signal_are_replaced_whatever_the_ranks(size):
    def work(world: LocalWorld) -> tuple[list[str], dict[str, float]]:
        groups, metrics = rollouts(world, made("dapo"), lambda number: number % 3 > 0).collect(0)
        assert all(made("dapo").keeps(group) for group in groups)
        return [group.id for group in groups], {name: float(metric.sum) for name, metric in metrics.items()}

    found = on_ranks(size, work)
    alone, logged = on_ranks(1, work)[0]
    assert len(alone) == 4
    assert {number for ids, _ in found for number in ids} == set(alone)
    for name in ("rollout/dropped_groups", "rollout/drawn_groups"):
        assert sum(metrics[name] for _, metrics in found) == logged[name] > 0


def test_a_round_may_end_short_and_even_empty():
    algorithm = made("dapo", max_refills=2)
    groups, metrics = rollouts(LocalWorld(), algorithm, lambda _: True).collect(0)
    assert groups == []
    assert metrics["rollout/drawn_groups"].sum == metrics["rollout/dropped_groups"].sum == 3 * 4
    groups, _ = rollouts(LocalWorld(), algorithm, lambda number: number != 7, prompts=12).collect(0)
    assert [group.id for group in groups] == ["7"]


def test_without_dynamic_sampling_every_group_is_kept():
    groups, metrics = rollouts(LocalWorld(), made("grpo"), lambda _: True).collect(0)
    assert len(groups) == 4
    assert metrics == {}


def test_rewards_kept_apart_are_signal_even_where_their_sum_is_equal():
    def completion(first: float, second: float) -> Completion:
        return Completion("", [3], scores={"a": Score(first), "b": Score(second)}, reward=first + second)

    group = Group("x", [], [1], [completion(1.0, 0.0), completion(0.0, 1.0)])
    assert not made("dapo").keeps(group)
    keys = {"overlong_cache": 0.0, "combine": CombineConfig(level="advantage")}
    assert made("dapo", **keys, weights={"a": 1.0, "b": 1.0}).keeps(group)
    assert not made("dapo", **keys, weights={"c": 0.0}).keeps(group)


def test_how_much_of_the_batch_has_signal_is_logged():
    policy, batch = answers([1] * 4, [1.0, 0.0, 2.0, 2.0], [0, 0, 1, 1])
    assert learned(made("dapo"), policy, batch)[2]["frac_with_signal"] == 0.5
    assert "frac_with_signal" not in learned(made("grpo"), policy, batch)[2]


@pytest.mark.parametrize("name", ["grpo", "reinforce_pp", "reinforce_pp_baseline", "dapo", "opo"])
def test_credit_does_not_depend_on_the_ranks(name):
    algorithm = made(name, kl_coef=0.02 if "reinforce" in name else 0.0, advantage_eps=1e-4)
    _, batch = answers(*ROUND)
    batch = batch.with_columns({REFERENCE: moved(ROUND[0])})
    halves = [Batch({}, {key: x[part] for key, x in batch.columns.items()}, 1) for part in (slice(4), slice(4, 8))]
    parts = on_ranks(2, lambda world: algorithm.annotate(halves[world.rank], world)["advantage"])
    torch.testing.assert_close(torch.cat(parts), algorithm.annotate(batch, LocalWorld())["advantage"])


# configs


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"advantage": "reinforce_pp", "ratio": "sum"}, "ratio must be token"),
        ({"advantage": "reinforce_pp", "surrogate": "gmpo"}, "not gmpo"),
        ({"surrogate": "vespo", "ratio": "sequence"}, "a ratio of its own"),
        ({"surrogate": "cispo", "delta": 4.0}, "cispo reads neither"),
        ({"surrogate": "sapo", "dual_clip": 3.0}, "sapo reads neither"),
        ({"gamma": 0.9}, "group_std has none"),
        ({"beta": 0.0, "kl_is_correction": True}, "beta is 0"),
    ],
)
def test_keys_that_nothing_reads_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        GRPOConfig(name="grpo", **keys)


@pytest.mark.parametrize("keys", [{"kl_coef": 0.1}, {"overlong_cache": 2}, {"advantage": "reinforce_pp"}])
def test_what_is_of_one_reward_is_refused_beside_several(keys):
    with pytest.raises(RecipeError, match="level: advantage"):
        made("grpo", combine=CombineConfig(level="advantage"), **keys)


def recipe(name: str, generations: int) -> dict[str, Any]:
    return {
        "output_dir": "runs/x",
        "model": {"name_or_path": "M"},
        "data": [{"path": "P.jsonl"}],
        "algorithm": {"name": name},
        "rewards": [{"name": "length"}],
        "rollout": {"num_generations": generations},
        "train": {"max_length": 512},
    }


def test_only_what_compares_answers_needs_several():
    with pytest.raises(RecipeError, match=r"rollout.num_generations .*needs 2 or more"):
        load_recipe(recipe("grpo", 1))
    assert load_recipe(recipe("reinforce_pp", 1)).rollout.num_generations == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_asked_for_where_it_is_read(name):
    algorithm = made(name)
    assert (REFERENCE in algorithm.needs.columns) == (algorithm.config.beta > 0 or algorithm.config.kl_coef > 0)
    assert algorithm.needs.refills == (4 if name == "dapo" else 0)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipes_are_of_their_method(name):
    folders = set()
    for kind in ("stories", "qwen-0.5b", "qwen-0.5b-lora"):
        shipped = load_recipe(f"{name}/{kind}")
        assert shipped.algorithm.name == name
        assert (shipped.model.lora is None) == (not kind.endswith("lora"))
        whole = shipped.train.batch_size // shipped.rollout.num_generations
        asked = shipped.algorithm.prompts_per_round
        assert asked is None or asked == 2 * whole
        folders.add(shipped.output_dir)
    assert folders == {f"runs/{name}-{kind}" for kind in ("stories", "qwen-0.5b", "qwen-0.5b-lora")}


def test_a_process_without_a_completion_adds_nothing_to_the_spread_of_the_batch():
    """Its stand-in for a row comes with the reward 0, which nobody gave."""
    algorithm = made("grpo", advantage="batch_std")
    _, alone = answers([2, 2], [1.0, 3.0])
    _, beside = answers([2, 2, 2], [1.0, 3.0, 0.0], [0, 0, 1], row=torch.tensor([True, True, False]))
    assert advantages(algorithm, beside)[:2] == pytest.approx(advantages(algorithm, alone))
