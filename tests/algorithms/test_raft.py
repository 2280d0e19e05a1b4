"""RAFT and its relatives: who is kept, golden numbers of the authors' code, identities, and the real loop."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from alignkit import testing
from alignkit.algorithms.raft import RAFT, RAFTConfig
from alignkit.core import Completion, Group, RecipeError, register
from alignkit.core.config import CombineConfig
from alignkit.core.contracts import RolloutFacts
from alignkit.data.collate import select_units
from alignkit.dist.world import LocalWorld
from tests.algorithms.fakes import averages, reduce_terms
from tests.algorithms.rounds import on_ranks, round_of, said
from tests.shared import golden_case

ALONE = LocalWorld()
NAN = float("nan")
VARIANTS = ["raft", "raft_pp", "reinforce_rej"]


def raft(**keys) -> RAFT:
    return RAFT(RAFTConfig(name="raft", **keys))


def numbers(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def answers(rewards, group, mask=None, **columns):
    """A round of answers with these rewards, of two tokens each unless the mask says otherwise."""
    count = len(rewards)
    mask = torch.ones(count, 2) if mask is None else mask
    usual = {
        "reward": numbers(*rewards),
        "group": torch.tensor(group).double(),
        "ended": torch.ones(count).double(),
        "empty": torch.zeros(count).double(),
        "policy__logps": -mask.double(),
        "reference__logps": -mask.double(),
        "behaviour__weight": torch.ones_like(mask).double(),
    }
    return round_of(mask, **{**usual, **columns})


def kept(algorithm, batch, world=ALONE):
    """Places of what is kept."""
    return algorithm.annotate(batch, world)["kept"].nonzero().flatten().tolist()


def step(algorithm, batch, move=0.0):
    """Loss, gradient and metrics of a step on what is trained, the policy `move` nats a token from the start."""
    batch = algorithm.annotate(batch, ALONE)
    batch = select_units(batch, batch["unit"].nonzero().flatten().tolist())
    logps = (batch["policy.logps"] + move).where(batch["mask"], 0.0).requires_grad_()
    terms, metrics = algorithm.loss(said(logps[:, 1:]), batch)
    loss = reduce_terms(terms, batch)
    loss.backward()
    return loss.item(), logps.grad, averages(metrics)


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_are_presets(variant):
    entry = register.algorithm.get(variant)
    assert entry.target is RAFT
    config = RAFTConfig(name=variant, **entry.preset)
    assert (config.variant, config.beta) == (variant, 0.0 if variant == "raft" else 0.001)


def test_what_it_asks_for_depends_on_the_config():
    assert raft().needs.columns == frozenset()
    assert raft(beta=0.1).needs.columns == {"reference.logps"}
    assert raft(kl_coef=0.1).needs.columns == {"policy.logps", "reference.logps"}
    assert raft(variant="raft_pp").needs.columns == {"policy.logps", "behaviour.weight"}


def test_a_unit_is_one_answer_and_empty_ones_are_known():
    group = Group("g", [], [7, 8], [Completion("a", [5, 2]), Completion(" ", [6, 2]), Completion("", [2])])
    assert [unit[0].scalar["empty"] for unit in raft().build([group])] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("keys", "count"),
    [
        ({}, 1),
        ({"selection": "top", "alpha": 0.3, "prompts_per_round": 9}, 3),
        ({"selection": "threshold"}, 8),
        ({"variant": "raft_pp"}, 8),
        ({"variant": "reinforce_rej"}, 8),
    ],
)
def test_how_many_answers_train(keys, count):
    assert raft(**keys).count_units(Group("g", [], [1], [Completion("a", [2])] * 8)) == count


REWARDS, GROUP = [0.1, 0.9, 0.9, -1.0, 0.0, -0.5, 0.3, NAN], [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [1, 4, 6]),
        ({"selection": "threshold"}, [0, 1, 2, 6]),
        ({"selection": "top", "alpha": 0.3, "prompts_per_round": 3}, [1, 2]),
        ({"selection": "top", "alpha": 0.1, "prompts_per_round": 3}, [1]),
        ({"selection": "top", "alpha": 1.0, "prompts_per_round": 3}, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_who_is_kept(keys, expected):
    batch = answers(REWARDS, GROUP)
    assert kept(raft(**keys), batch) == expected
    found = raft(**keys).annotate(batch, ALONE)
    assert found["unit"].nonzero().flatten().tolist() == expected
    assert found["kept_share"][0].item() == pytest.approx(len(expected) / 7)
    scored = [r for r in REWARDS if r == r]
    assert found["pooled_reward"][0].item() == pytest.approx(sum(scored) / 7)


@pytest.mark.parametrize("selection", ["local", "top"])
def test_only_the_order_of_rewards_counts(selection):
    algorithm = raft(selection=selection, prompts_per_round=3, alpha=0.3)
    stretched = [r**3 * 7 - 2 for r in REWARDS]
    assert kept(algorithm, answers(REWARDS, GROUP)) == kept(algorithm, answers(stretched, GROUP))


def test_equal_rewards_keep_the_first():
    assert kept(raft(), answers([1.0] * 4, [0, 0, 1, 1])) == [0, 2]


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_cut_off_and_empty_ones_are_wrong_never_kept(variant):
    columns = {"ended": numbers(0.0, 1.0, 1.0, 1.0), "empty": numbers(0.0, 1.0, 0.0, 0.0)}
    batch = answers([0.9, 0.8, 0.1, -1.0], [0] * 4, **columns)
    found = raft(variant=variant).annotate(batch, ALONE)
    if variant == "reinforce_rej":
        assert found["advantage"].tolist() == [0.9, 0.8, 0.1, -1.0]
        return
    assert found["kept"].tolist() == [False, False, True, False]
    assert found["advantage"].tolist() == [0.0, 0.0, 1.0, 0.0]
    kept_too = raft(variant=variant, drop_truncated=False).annotate(batch, ALONE)
    assert kept_too["kept"].tolist() == [True, False, False, False]


def test_an_answer_far_from_the_reference_pays_for_it():
    batch = answers([0.9, 0.8], [0, 0], reference__logps=numbers([-3.0, -3.0], [-1.0, -1.0]))
    assert kept(raft(), batch) == [0]
    assert kept(raft(kl_coef=0.1), batch) == [1]


PARTS = [[0, 1, 4, 5], [2, 3]]
"""Prompts 0 and 2 on one rank, prompt 1 on the other, as they are dealt."""


@pytest.mark.parametrize(
    "rewards", [[0.1, 0.9, 0.9, 0.2, 0.5, NAN], [1.0] * 6, [NAN] * 6, [0.3, NAN, NAN, NAN, NAN, NAN]]
)
@pytest.mark.parametrize("alpha", [0.2, 0.4, 0.7])
def test_the_best_of_all_ranks_are_kept_ties_alike(rewards, alpha):
    algorithm = raft(selection="top", alpha=alpha, prompts_per_round=3)
    whole = algorithm.annotate(answers(rewards, [0, 0, 1, 1, 2, 2]), ALONE)
    shares = [answers([rewards[i] for i in part], [n // 2 for n in range(len(part))]) for part in PARTS]
    for part, found in zip(PARTS, on_ranks(algorithm.annotate, shares), strict=True):
        for name in ("kept", "pooled_reward", "kept_share"):
            torch.testing.assert_close(found[name], whole[name][part])
    usable = sum(r == r for r in rewards)
    assert int(whole["kept"].sum()) == min(usable, max(1, int(usable * alpha)))


def test_kept_answers_are_demonstrations():
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]])
    loss, gradient, metrics = step(raft(), answers([0.2, 0.8, 1.0, 0.0], [0, 0, 1, 1], mask=mask))
    assert loss == pytest.approx(1.0)
    assert gradient[:, 1:].tolist() == [[pytest.approx(-1 / 3), 0.0], [pytest.approx(-1 / 3)] * 2]
    assert metrics["raft/kept_reward"] == pytest.approx(0.9)
    assert metrics["raft/gap"] == pytest.approx(0.4)
    assert metrics["raft/kept"] == 0.5


def test_one_answer_a_prompt_is_demonstrated_whatever_it_earned():
    assert kept(raft(), answers([-1.0, 0.3, 0.0], [0, 1, 2])) == [0, 1, 2]


def test_before_the_first_step_raft_pp_has_the_gradient_of_what_is_kept_by_its_share():
    batch = answers([0.2, 0.8, 1.0, 0.0], [0, 0, 1, 1], mask=torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]]))
    _, chosen, _ = step(raft(), batch)
    _, everything, _ = step(raft(variant="raft_pp"), batch)
    assert not everything[[0, 3]].any()
    torch.testing.assert_close(everything[[1, 2]], chosen * 3 / 7)


def test_a_kept_token_that_grew_likely_enough_is_let_go():
    batch = answers([1.0, 0.0], [0, 0])
    _, gradient, metrics = step(raft(variant="raft_pp"), batch, move=0.3)
    assert not gradient.any()
    assert metrics["clip_ratio/high_mean"] == 0.5
    _, gradient, _ = step(raft(variant="raft_pp"), batch, move=-0.3)
    assert gradient[0, 1:].tolist() == pytest.approx([-torch.tensor(-0.3).exp().item() / 4] * 2)


def test_reinforce_rej_learns_from_both_sides_of_prompts_with_both():
    batch = answers([1.0, -1.0, 1.0, 1.0, -1.0, -1.0], [0, 0, 1, 1, 2, 2])
    found = raft(variant="reinforce_rej").annotate(batch, ALONE)
    assert found["advantage"].tolist() == [1.0, -1.0, 0.0, 0.0, 0.0, 0.0]
    assert found["unit"].all()
    _, gradient, metrics = step(raft(variant="reinforce_rej"), batch)
    assert gradient[:, 1].tolist() == pytest.approx([-1 / 12, 1 / 12, 0, 0, 0, 0])
    assert metrics["raft/kept"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_answer_nobody_scored_is_in_no_term(variant):
    found = raft(variant=variant).annotate(answers([1.0, NAN, -1.0], [0, 0, 0]), ALONE)
    assert not found["unit"][1]
    assert not found["mask"][1].any()
    assert found["advantage"].isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_by_finite_differences(variant):
    algorithm = raft(variant=variant, beta=0.3, selection="threshold")
    batch = algorithm.annotate(answers([1.0, 0.5, -1.0], [0, 0, 0]), ALONE)
    start = batch["policy.logps"] + 0.1 * torch.arange(9).reshape(3, 3).sin().double() * batch["mask"]

    def loss(logps):
        return reduce_terms(algorithm.loss(said(logps[:, 1:]), batch)[0], batch)

    assert torch.autograd.gradcheck(loss, start.requires_grad_())


@pytest.mark.parametrize("name", ["advantage_binary_pm1", "advantage_binary_01"])
def test_golden_advantages(name):
    """Theirs keep the score of an answer without a competitor."""
    case = golden_case("raft.json", name)
    rewards, prompts = case["inputs"]["sequence_rewards"], case["inputs"]["prompt_index"]
    batch = answers(rewards, prompts, mask=torch.tensor(case["inputs"]["response_mask"]))
    pp = raft(variant="raft_pp", selection="threshold").annotate(batch, ALONE)["advantage"]
    rejecting = raft(variant="reinforce_rej").annotate(batch, ALONE)["advantage"]
    competing = [prompts.count(prompt) > 1 for prompt in prompts]
    first = torch.tensor(case["outputs"]["raft_advantages"]).amax(-1).tolist()
    assert pp.tolist() == pytest.approx(first)
    second = [max(row, key=abs) for row in case["outputs"]["reinforce_rej_advantages"]]
    assert rejecting[torch.tensor(competing)].tolist() == [x for x, c in zip(second, competing, strict=True) if c]


@pytest.mark.parametrize("name", ["raft_vanilla", "raft_pp_clipped"])
def test_golden_losses(name):
    case = golden_case("raft.json", name)
    inputs = {key: torch.tensor(x, dtype=torch.float64) for key, x in case["inputs"].items()}
    mask, clip = inputs["response_mask"], case["params"]["cliprange"]
    logps, advantages = inputs["new_token_logps"].requires_grad_(), inputs["advantages"]
    row = torch.stack([a[m.bool()][0] for a, m in zip(advantages, mask, strict=True)])
    batch = answers([0.0] * len(mask), [0] * len(mask), mask=mask, policy__logps=inputs["old_token_logps"])
    batch = batch.with_columns({"advantage": row, "kept": row > 0, "pooled_reward": row, "kept_share": row})
    if name == "raft_vanilla":  # likelihood of the kept ones, over the tokens of all
        assert set(row.tolist()) <= {0.0, 1.0}
        terms, _ = raft().loss(said(logps), batch)
        chosen = terms["policy"].value.where(batch["mask"] & batch["kept"][:, None], 0.0)
        loss = chosen.sum() / mask.sum()
    else:
        algorithm = raft(variant="raft_pp", epsilon_low=clip, epsilon_high=clip)
        loss = reduce_terms(algorithm.loss(said(logps), batch)[0], batch)
    loss.backward()
    same = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)
    same(loss.detach(), torch.tensor(case["outputs"]["loss"]).double())
    same(logps.grad, torch.tensor(case["outputs"]["grad_new_token_logps"]).double())


def test_a_golden_pool():
    case = golden_case("raft.json", "top_fraction_selection")
    rewards, alpha = case["inputs"]["rewards"], case["params"]["alpha"]
    algorithm = raft(selection="top", alpha=alpha, prompts_per_round=len(rewards))
    expected = sorted(case["outputs"]["kept_indices_best_first"])
    assert kept(algorithm, answers(rewards, list(range(len(rewards))))) == expected


def facts(num_generations):
    return RolloutFacts(num_generations, 8, {"r": 1.0}, CombineConfig())


def test_a_share_of_less_than_one_answer_is_refused():
    algorithm = raft(selection="top", alpha=0.1, prompts_per_round=2)
    with pytest.raises(RecipeError, match=r"algorithm\.alpha: 0\.1 of the 8 answers .* at least 0\.12"):
        algorithm.take_facts(facts(4))
    algorithm.take_facts(facts(5))


def test_reinforce_rej_refuses_answers_without_competitors():
    with pytest.raises(RecipeError, match=r"rollout\.num_generations: reinforce_rej"):
        raft(variant="reinforce_rej").take_facts(facts(1))
    raft().take_facts(facts(1))


@pytest.mark.parametrize(
    ("keys", "said_of"),
    [
        ({"selection": "top"}, "prompts_per_round"),
        ({"alpha": 0.0}, "alpha"),
        ({"beta": -0.1}, "beta"),
        ({"variant": "raft++"}, "variant"),
    ],
)
def test_config_bounds(keys, said_of):
    with pytest.raises(ValidationError, match=said_of):
        raft(**keys)


def test_only_what_is_kept_takes_steps(tmp_path):
    """Of seven prompts with four answers each a round keeps seven answers, which make two steps of up to four."""
    bench = testing.Bench("raft", config={"drop_truncated": False}, folder=tmp_path)
    recipe = bench.recipe("run", num_epochs=2, epochs_per_round=2, batch_size=28)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_size": 4})})
    done = testing.train(recipe, quiet=True, report=False)
    told = testing.read_metrics(done.folder)
    assert done.steps == len(told) == 8
    starts = [record["step"] for record in told if "reward" in record]
    assert starts == [1, 5]
    assert all(record["raft/kept"] == pytest.approx(0.25) for record in told)
    assert all(b["step"] == a["step"] + 1 for a, b in pairwise(told))
