"""PPO: credit by hand, golden numbers of TRL's trainer, identities, a coefficient that moves, and the real loop."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from alignkit import testing
from alignkit.algorithms.ppo import PPO, PPOConfig
from alignkit.core import Completion, Group, register
from alignkit.core.rng import generator
from alignkit.data.collate import select_units
from alignkit.dist.world import LocalWorld
from tests.algorithms.fakes import averages, reduce_terms
from tests.algorithms.rounds import on_ranks, round_of, said
from tests.shared import golden_case

ALONE = LocalWorld()


def ppo(**keys) -> PPO:
    return PPO(PPOConfig(name="ppo", **{"missing_eos_penalty": 0.0, **keys}))


def numbers(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def drawn(seed=0, rows=3, tokens=4, **columns):
    """A round of random numbers: of four tokens, three, two, …"""
    draw = generator(seed, "ppo round")

    def some(scale):
        return numbers(*[[draw.gauss(0, scale) for _ in range(tokens)] for _ in range(rows)])

    mask = torch.tensor([[t < max(1, tokens - n) for t in range(tokens)] for n in range(rows)])
    found = {
        "policy__logps": (some(0.3) - 1.0) * mask,
        "reference__logps": (some(0.3) - 1.0) * mask,
        "policy__values": some(0.5) * mask,
        "behaviour__weight": torch.ones_like(mask).double(),
        "reward": numbers(*[draw.gauss(0, 1) for _ in range(rows)]),
        "ended": torch.ones(rows).double(),
        "group": torch.arange(rows).double(),
    }
    return round_of(mask, **{**found, **columns})


def tokens_of(batch, name):
    """Numbers of a column at trained tokens, row by row."""
    return [row[on].tolist() for row, on in zip(batch[name], batch["mask"], strict=True)]


def moved(batch, seed=1, scale=0.1):
    """Log-probabilities and values a little away from those of the round, as leaves."""
    draw = generator(seed, "moved")

    def near(x):
        noise = numbers(*[[draw.gauss(0, scale) for _ in row] for row in x])
        return (x + noise).where(batch["mask"], 0.0).requires_grad_()

    return near(batch["policy.logps"]), near(batch["policy.values"])


def test_what_it_asks_for_depends_on_the_config():
    assert register.algorithm.get("ppo").target is PPO
    assert "reference.logps" not in ppo(kl_coef=0.0).needs.columns
    assert "reference.logps" in ppo().needs.columns
    assert ppo().needs.outputs == {"logps", "values"}
    assert ppo(entropy_coef=0.1).needs.outputs == {"logps", "values", "entropy"}


def test_a_unit_is_one_answer():
    answers = [Completion("a", [5, 2], reward=1.0), Completion("b", [6], reward=0.5, ended=False)]
    group = Group("g", [], [7, 8], answers)
    units = ppo().build([group])
    assert [unit[0].tokens for unit in units] == [[7, 8, 5, 2], [7, 8, 6]]
    assert [unit[0].scalar["ended"] for unit in units] == [1.0, 0.0]
    assert ppo().count_units(group) == 2


def test_credit_by_hand():
    # r = −0.5·KL, and 2 − 1 for the second answer, which was cut off
    batch = round_of(
        torch.tensor([[1, 1], [1, 0]]),
        policy__logps=numbers([-1.0, -2.0], [-3.0, 0.0]),
        reference__logps=numbers([-2.0, -2.0], [-1.0, 0.0]),
        policy__values=numbers([0.5, 1.0], [0.25, 0.0]),
        reward=numbers(4.0, 2.0),
        ended=numbers(1.0, 0.0),
    )
    found = ppo(kl_coef=0.5, gamma=0.5, lam=0.5, missing_eos_penalty=1.0).annotate(batch, ALONE)
    # rewards −0.5, 4 | 1 + 1 = 2; last: 4 − 1 = 3; first: −0.5 + 0.5·1 − 0.5 + 0.25·3 = 0.25; other: 2 − 0.25
    raw = torch.tensor([0.25, 3.0, 1.75], dtype=torch.float64)
    white = (raw - raw.mean()) / raw.std()
    assert tokens_of(found, "return") == [pytest.approx([0.75, 4.0]), pytest.approx([2.0])]
    assert torch.cat([found["advantage"][0, 1:], found["advantage"][1, 1:2]]).tolist() == pytest.approx(white.tolist())
    assert found["kl"].tolist() == [1.0, -2.0]
    assert found["score"].tolist() == [4.0, 1.0]


def test_without_discount_and_critic_returns_are_what_is_still_to_come():
    batch = drawn(policy__values=torch.zeros(3, 4).double())
    found = ppo(gamma=1.0, lam=1.0, kl_coef=0.2).annotate(batch, ALONE)
    for row, (n, on) in enumerate(zip(batch["reward"], batch["mask"], strict=True)):
        paid = -0.2 * (batch["policy.logps"] - batch["reference.logps"])[row][on]
        paid[-1] += n
        assert found["return"][row][on].tolist() == pytest.approx(paid.flip(0).cumsum(0).flip(0).tolist())


@pytest.mark.parametrize(("lam", "same"), [(1.0, True), (0.95, False)])
def test_a_constant_on_all_scores_changes_nothing_without_discount_alone(lam, same):
    batch = drawn()
    more = batch.with_columns({"reward": batch["reward"] + 7.0})
    found = [ppo(lam=lam).annotate(b, ALONE)["advantage"] for b in (batch, more)]
    assert torch.allclose(*found, atol=1e-6) == same


def test_an_answer_nobody_scored_is_in_nothing():
    batch = drawn()
    unscored = batch.with_columns({"reward": batch["reward"].where(torch.arange(3) != 1, float("nan"))})
    found = ppo().annotate(unscored, ALONE)
    assert found["unit"].tolist() == [True, False, True]
    assert not found["mask"][1].any()
    alone = ppo().annotate(select_units(batch, [0, 2]), ALONE)
    torch.testing.assert_close(found["advantage"][[0, 2]], alone["advantage"])
    assert all(bool(x.isfinite().all()) for name, x in found.columns.items() if name != "reward")


def test_tokens_that_are_not_trained_are_stepped_over():
    batch, gap = drawn(rows=1), torch.tensor([[1, 1, 0, 1, 1]])
    places = gap[0].bool().nonzero().flatten()

    def spread(x):
        wide = torch.full((1, 5), 9.0, dtype=x.dtype)
        wide[:, places] = x[:, 1:]
        return wide

    wide = round_of(
        gap,
        **{name.replace(".", "__"): spread(batch[name]) for name in batch.columns if "." in name},
        **{name: batch[name] for name in ("reward", "ended")},
    )
    found = ppo().annotate(wide, ALONE)
    (expected,) = tokens_of(ppo().annotate(batch, ALONE), "advantage")
    assert tokens_of(found, "advantage") == [pytest.approx(expected, rel=1e-12)]


def test_rewards_may_be_whitened_first():
    batch = drawn()
    plain, white = (ppo(whiten_rewards=w, gamma=1.0, lam=1.0).annotate(batch, ALONE) for w in (False, True))

    def earned(found):
        """Token rewards, from differences of returns without discount."""
        return torch.cat([-torch.tensor([*row, 0.0]).double().diff() for row in tokens_of(found, "return")])

    r = earned(plain)
    assert earned(white).tolist() == pytest.approx(((r - r.mean()) / r.std() + r.mean()).tolist(), rel=1e-5)


@pytest.mark.parametrize("keys", [{}, {"whiten_rewards": True}, {"kl_target": 1.0, "kl_horizon": 50.0}])
def test_credit_does_not_depend_on_the_ranks(keys):
    batch, algorithm = drawn(rows=5), ppo(**keys)
    whole = algorithm.annotate(batch, ALONE)
    parts = [[0, 2, 4], [1, 3]]

    def on_rank(part, world):
        mine = ppo(**keys)
        return mine.annotate(select_units(batch, part), world), mine.state_dict()

    for part, (found, state) in zip(parts, on_ranks(on_rank, parts), strict=True):
        width = found["advantage"].shape[1]
        torch.testing.assert_close(found["advantage"], whole["advantage"][part, :width], rtol=1e-12, atol=1e-12)
        assert state == pytest.approx(algorithm.state_dict())


def test_before_the_first_step_the_policys_loss_is_nothing():
    batch = ppo().annotate(drawn(), ALONE)
    out = said(batch["policy.logps"][:, 1:], values=batch["policy.values"][:, 1:])
    terms, metrics = ppo().loss(out, batch)
    assert reduce_terms({"policy": terms["policy"]}, batch).item() == pytest.approx(0.0, abs=1e-12)
    told = averages(metrics)
    assert told["val/ratio"] == 1.0
    assert told["policy/approxkl_avg"] == told["policy/clipfrac_avg"] == told["val/clipfrac_avg"] == 0.0


def test_with_a_wide_clip_it_is_the_policy_gradient():
    algorithm = ppo(epsilon_low=1e6, epsilon_high=1e6)
    batch = algorithm.annotate(drawn(), ALONE)
    logps = batch["policy.logps"].clone().requires_grad_()
    terms, _ = algorithm.loss(said(logps[:, 1:], values=batch["policy.values"][:, 1:]), batch)
    reduce_terms({"policy": terms["policy"]}, batch).backward()
    torch.testing.assert_close(logps.grad, -batch["advantage"] / batch["mask"].sum())


def test_a_token_of_another_writer_weighs_as_much_as_the_policy_likes_it():
    batch = ppo().annotate(drawn(), ALONE)
    logps, values = moved(batch)
    out = said(logps[:, 1:], values=values[:, 1:])
    once, _ = ppo().loss(out, batch)
    half, _ = ppo().loss(out, batch.with_columns({"behaviour.weight": 0.5 * batch["behaviour.weight"]}))
    torch.testing.assert_close(half["policy"].value, 0.5 * once["policy"].value)
    torch.testing.assert_close(half["value"].value, once["value"].value)


def test_the_dual_clip_bounds_what_a_bad_token_costs():
    batch = ppo().annotate(drawn(), ALONE)
    out = said(batch["policy.logps"][:, 1:] + 3.0 * batch["mask"][:, 1:], values=batch["policy.values"][:, 1:])
    bounded, free = (ppo(dual_clip=dual).loss(out, batch)[0]["policy"].value for dual in (3.0, None))
    bad = batch["advantage"] < 0
    assert bad.any()
    torch.testing.assert_close(bounded[bad], -3.0 * batch["advantage"][bad])
    assert (free[bad] > 6 * bounded[bad]).all()
    assert torch.equal(bounded[~bad], free[~bad])


@pytest.mark.parametrize("keys", [{}, {"value_clip": None, "entropy_coef": 0.3, "value_coef": 1.0, "dual_clip": 1.5}])
def test_gradient_by_finite_differences(keys):
    algorithm = ppo(**keys)
    batch = algorithm.annotate(drawn(), ALONE)
    entropy = torch.ones_like(batch["policy.logps"]).requires_grad_()

    def loss(logps, values, entropy):
        terms, _ = algorithm.loss(said(logps[:, 1:], values=values[:, 1:], entropy=entropy[:, 1:]), batch)
        return reduce_terms(terms, batch)

    assert torch.autograd.gradcheck(loss, (*moved(batch), entropy))
    if "entropy_coef" in keys:
        slope = torch.autograd.grad(loss(*moved(batch), entropy), entropy)[0]
        torch.testing.assert_close(slope, -0.3 / batch["mask"].sum() * batch["mask"].double())


def test_the_critics_explained_variance():
    algorithm, batch = ppo(), drawn(rows=4)
    batch = algorithm.annotate(batch, ALONE)
    logps, values = moved(batch)
    _, metrics = algorithm.loss(said(logps[:, 1:], values=values[:, 1:]), batch)
    told = algorithm.derive(averages(metrics))
    returns, before = batch["return"][batch["mask"]], batch["policy.values"][batch["mask"]]
    expected = 1 - (returns - before).var(correction=0) / returns.var(correction=0)
    assert told["val/explained_variance"] == pytest.approx(expected.item(), rel=1e-9)
    assert not any(name.startswith("~") for name in told)
    same = batch.with_columns({"return": torch.full_like(batch["return"], 0.3)})
    _, metrics = algorithm.loss(said(logps[:, 1:], values=values[:, 1:]), same)
    assert "val/explained_variance" not in algorithm.derive(averages(metrics))
    assert algorithm.derive({"reward": 1.0}) == {"reward": 1.0}


def test_the_coefficient_follows_its_target_once_a_round():
    algorithm = ppo(kl_coef=0.1, kl_target=2.0, kl_horizon=30.0)
    mask = torch.ones(3, 2)
    apart = {"policy__values": torch.zeros(3, 2), "reward": torch.ones(3), "ended": torch.ones(3)}
    near = round_of(mask, policy__logps=torch.zeros(3, 2), reference__logps=torch.full((3, 2), -0.9), **apart)
    far = near.with_columns({"reference.logps": near["reference.logps"] * 3})
    assert algorithm.annotate_held_out(far, ALONE)["kl_coef"].tolist() == pytest.approx([0.1] * 3)
    assert algorithm.state_dict() == {"kl_coef": 0.1}
    found = algorithm.annotate(near, ALONE)  # 1.8 nats an answer: 0.1 below its target
    assert found["kl_coef"].tolist() == pytest.approx([0.1] * 3)
    assert algorithm.state_dict() == {"kl_coef": pytest.approx(0.1 * (1 - 0.1 * 3 / 30))}
    algorithm.annotate(far, ALONE)  # 5.4 nats, of which a fifth too many counts
    assert algorithm.state_dict() == {"kl_coef": pytest.approx(0.1 * 0.99 * (1 + 0.2 * 3 / 30))}
    other = ppo(kl_coef=0.1, kl_target=2.0)
    other.load_state_dict(algorithm.state_dict())
    assert other.annotate(near, ALONE)["kl_coef"][0] == pytest.approx(0.1 * 0.99 * 1.02)


def test_what_is_paid_and_earned_is_logged():
    algorithm = ppo(kl_coef=0.5)
    batch = algorithm.annotate(drawn(), ALONE)
    logps, values = moved(batch)
    told = averages(algorithm.loss(said(logps[:, 1:], values=values[:, 1:]), batch)[1])
    kl = ((batch["policy.logps"] - batch["reference.logps"]) * batch["mask"]).sum(-1)
    assert told["objective/kl"] == pytest.approx(kl.mean().item())
    assert told["objective/scores"] == pytest.approx(batch["reward"].mean().item())
    assert told["objective/rlhf_reward"] == pytest.approx((batch["reward"] - 0.5 * kl).mean().item())
    ratio = (logps - batch["policy.logps"])[batch["mask"]].exp()
    assert told["policy/approxkl_avg"] == pytest.approx((ratio - 1 - ratio.log()).mean().item())


@pytest.mark.parametrize("name", ["loss", "loss_tight"])
def test_golden_losses(name):
    """TRL's critic lives one place longer than its answers do, so each term has a mask of its own."""
    case = golden_case("ppo.json", name)
    params, expected = case["params"], case["outputs"]
    inputs = {key: torch.tensor(x, dtype=torch.float64) for key, x in case["inputs"].items()}
    mask, live = inputs["padding_mask"] == 0, inputs["padding_mask_plus_one"] == 0
    clip = params["cliprange"]
    algorithm = ppo(
        epsilon_low=clip, epsilon_high=clip, value_clip=params["cliprange_value"], value_coef=params["vf_coef"]
    )
    batch = round_of(
        live,
        policy__logps=inputs["old_token_logps"],
        policy__values=inputs["old_values"],
        behaviour__weight=torch.ones_like(live).double(),
        advantage=inputs["advantages"],
        score=torch.zeros(len(mask)),
        kl=torch.zeros(len(mask)),
        kl_coef=torch.zeros(len(mask)),
        **{"return": inputs["returns"]},
    )
    logps, values = inputs["new_token_logps"].requires_grad_(), inputs["value_preds"].requires_grad_()
    terms, _ = algorithm.loss(said(logps, values=values), batch)
    policy = reduce_terms({"policy": terms["policy"]}, round_of(mask))
    value = reduce_terms({"value": terms["value"]}, round_of(live))
    (policy + value).backward()
    assert policy.item() == pytest.approx(expected["policy_loss"], rel=1e-6, abs=1e-7)
    assert value.item() == pytest.approx(params["vf_coef"] * expected["value_loss"], rel=1e-6)
    same = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)
    same(logps.grad, torch.tensor(expected["grad_new_token_logps"]).double())
    same(values.grad, torch.tensor(expected["grad_value_preds"]).double())


@pytest.mark.parametrize(
    ("keys", "said_of"),
    [
        ({"kl_coef": 0.0, "kl_target": 1.0}, "0 stays 0"),
        ({"value_coef": 0.0}, "value_coef"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"lam": 1.1}, "lam"),
    ],
)
def test_config_bounds(keys, said_of):
    with pytest.raises(ValidationError, match=said_of):
        ppo(**keys)


def test_resumed_inside_a_round_it_ends_with_the_same_bits(tmp_path):
    """With a coefficient that moves; the contract tests do the same for the defaults."""
    moving = {"kl_target": 0.5, "kl_horizon": 20.0}
    bench = testing.Bench("ppo", config=moving, folder=tmp_path, rows=testing.toy_rows(PPO, 2))
    testing.check_resume(bench)
    told = [record["objective/kl_coef"] for record in testing.read_metrics(tmp_path / "whole")]
    assert any(a != b for a, b in pairwise(told))
