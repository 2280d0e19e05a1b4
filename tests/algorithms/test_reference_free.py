"""SimPO, CPO, ORPO and SLiC: golden numbers, numbers by hand, identities with one another and with DPO."""

import math

import pytest
import torch
from pydantic import ValidationError

from alignkit import ops
from alignkit.algorithms.dpo import DPO, DPOConfig
from alignkit.algorithms.reference_free import (
    CPO,
    ORPO,
    CPOConfig,
    ORPOConfig,
    SimPO,
    SimPOConfig,
    SLiC,
    SLiCConfig,
    simpo_loss,
)
from alignkit.core import Completion, Group, register
from alignkit.data.collate import collate
from alignkit.dist.world import LocalWorld
from alignkit.testing import Bench, check_layouts, check_micro_batches
from tests.algorithms.fakes import averages, pair_batch, reduce_terms, sums_batch
from tests.shared import golden_case

METHODS = {
    "simpo": (SimPO, SimPOConfig),
    "cpo": (CPO, CPOConfig),
    "orpo": (ORPO, ORPOConfig),
    "slic": (SLiC, SLiCConfig),
}


def make(name: str, **keys):
    method, config = METHODS[name]
    return method(config(name=name, **keys))


def run(algorithm, policy, mask):
    """Terms, metrics, loss and annotated batch of [2U, T] token log-probabilities; the reference is not to matter."""
    out, batch = pair_batch(policy, torch.full_like(policy, float("nan")), mask)
    batch = algorithm.annotate(batch, LocalWorld())
    terms, metrics = algorithm.loss(out, batch)
    return terms, averages(metrics), reduce_terms(terms, batch)


def run_sums(algorithm, chosen, rejected):
    """The same for answers of one token, whose mean is their sum; the policy leaf comes first."""
    policy, _, _ = sums_batch(chosen, rejected, chosen, rejected)
    return policy, *run(algorithm, policy, torch.ones_like(policy))


def test_they_are_registered_and_need_no_reference():
    for name, (method, _) in METHODS.items():
        assert register.algorithm.get(name).target is method
        assert method.needs.columns == frozenset()


@pytest.mark.parametrize(
    "name", ["simpo", "simpo_label_smoothing", "alphapo_simpo", "cpo_sigmoid", "cpo_hinge", "cpo_ipo"]
)
def test_golden_numbers_of_simpo_and_cpo(name):
    case = golden_case("simpo_cpo.json", name)
    params, inputs, expected = case["params"], case["inputs"], case["outputs"]
    keys = {"beta": params["beta"], "label_smoothing": params["label_smoothing"], "cpo_alpha": 0.0}
    if params["loss_type"] == "simpo":
        algorithm = make("simpo", **keys, simpo_gamma=params["simpo_gamma"], reward_alpha=params["alpha"])
    else:
        algorithm = make("cpo", **keys, loss_type=params["loss_type"])
    policy, terms, metrics, loss = run_sums(algorithm, inputs["policy_chosen_logps"], inputs["policy_rejected_logps"])
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-9)
    assert terms["preference"].value.tolist() == pytest.approx(expected["per_sample_loss"], rel=1e-9)
    chosen, rejected = policy.grad.reshape(-1, 2).T.tolist()
    assert chosen == pytest.approx(expected["grad_policy_chosen_logps"], rel=1e-9, abs=1e-12)
    assert rejected == pytest.approx(expected["grad_policy_rejected_logps"], rel=1e-9, abs=1e-12)
    for side in ("chosen", "rejected"):
        rewards = expected[f"{side}_rewards"]
        assert metrics[f"rewards/{side}"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-9)


@pytest.mark.parametrize("name", ["random", "near_certain", "very_unlikely"])
def test_golden_numbers_of_the_odds_ratio(name):
    case = golden_case("orpo.json", name)
    inputs, expected = case["inputs"], case["outputs"]
    means = [
        torch.tensor(inputs[f"policy_{side}_mean_logps"], dtype=torch.float32).requires_grad_()
        for side in ("chosen", "rejected")
    ]
    policy = torch.stack(means, 1).reshape(-1, 1)
    out, batch = pair_batch(policy, torch.zeros_like(policy), torch.ones_like(policy))
    algorithm = make("orpo", beta=case["params"]["beta"])
    batch = algorithm.annotate(batch, LocalWorld())
    terms, metrics = algorithm.loss(out, batch)
    term, logged = terms["preference"], averages(metrics)
    (term.weight * term.value.mean()).backward()
    close = {"rel": 2e-5, "abs": 1e-6}
    assert (term.weight * term.value).mean().item() == pytest.approx(expected["or_term"], **close)
    assert (term.weight * term.value).tolist() == pytest.approx(expected["per_sample_or_term"], **close)
    assert logged["log_odds_ratio"] == pytest.approx(expected["mean_log_sigmoid_log_odds"], **close)
    assert logged["log_odds_chosen"] == pytest.approx(expected["mean_log_odds"], **close)
    for side, mean in zip(("chosen", "rejected"), means, strict=True):
        assert mean.grad.tolist() == pytest.approx(expected[f"grad_policy_{side}_mean_logps"], **close)
        rewards = expected[f"{side}_rewards"]
        assert logged[f"rewards/{side}"] == pytest.approx(sum(rewards) / len(rewards), **close)


TOKENS = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -9.0, -9.0]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


def test_simpo_by_hand():
    # means −2 and −4: β·2 − γ = 2·2 − 1
    terms, metrics, loss = run(make("simpo", beta=2.0), TOKENS, MASK)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-3.0)))
    assert set(terms) == {"preference"}
    assert metrics == pytest.approx(
        {
            "rewards/chosen": -4.0,
            "rewards/rejected": -8.0,
            "rewards/margins": 4.0,
            "rewards/accuracies": 1.0,
            "logps/chosen": -6.0,
            "logps/rejected": -4.0,
            "completions/mean_length": 2.0,
            "nll_loss": 2.0,
        }
    )


def test_cpo_by_hand():
    terms, _, loss = run(make("cpo", beta=0.5, cpo_alpha=0.25), TOKENS, MASK)
    assert terms["preference"].value.item() == pytest.approx(math.log1p(math.exp(1.0)))  # β·(−6 + 4)
    assert loss.item() == pytest.approx(math.log1p(math.exp(1.0)) + 0.25 * 2.0)


def test_orpo_by_hand():
    # means ln ¾ and ln ½: odds 3 and 1
    policy = torch.tensor([[math.log(0.75)], [math.log(0.5)]], dtype=torch.float64)
    _, metrics, loss = run(make("orpo", beta=0.1), policy, torch.ones_like(policy))
    assert loss.item() == pytest.approx(-math.log(0.75) - 0.1 * math.log(0.75))
    assert metrics["log_odds_chosen"] == pytest.approx(math.log(3))
    assert metrics["log_odds_ratio"] == pytest.approx(math.log(0.75))


def test_slic_by_hand():
    _, metrics, loss = run(make("slic", beta=1.0, nll_weight=0.1), TOKENS, MASK)
    assert loss.item() == pytest.approx(1.0 + 6.0 - 4.0 + 0.6)
    assert metrics["rewards/margins"] == pytest.approx(-2.0)
    _, _, apart = run(make("slic", beta=1.0, nll_weight=0.0), TOKENS.flip(0), MASK.flip(0))
    assert apart.item() == 0.0


def test_the_likelihood_is_a_mean_over_tokens_of_the_whole_batch():
    policy = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, 0, 0], [-5.0, 0, 0], [-1.0, 0, 0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0]])
    for name in ("cpo", "orpo"):
        terms, metrics, _ = run(make(name), policy, mask)
        assert terms["nll"].over == "chosen"
        assert metrics["nll_loss"] == pytest.approx(8 / 4)


def test_cpo_without_likelihood_is_dpo_without_reference():
    chosen, rejected, nothing = [-2.0, -9.0], [-6.0, -3.0], [0.0, 0.0]
    _, terms, _, _ = run_sums(make("cpo", beta=0.3, cpo_alpha=0.0), chosen, rejected)
    _, out, batch = sums_batch(chosen, rejected, nothing, nothing)
    plain, _ = DPO(DPOConfig(name="dpo", beta=0.3)).loss(out, batch)
    torch.testing.assert_close(terms["preference"].value, plain["sigmoid"].value)


def test_simpo_without_margin_reads_only_means():
    longer = torch.tensor([[-1.0, -2.0, -3.0, -1.0, -2.0, -3.0], [-4.0, -4.0, 0, 0, 0, 0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    algorithm = make("simpo", simpo_gamma=0.0)
    assert run(algorithm, longer, mask)[2].item() == pytest.approx(run(algorithm, TOKENS, MASK)[2].item())


def test_the_curved_reward_is_the_plain_one_in_the_limit():
    chosen, rejected = torch.tensor([-0.5], dtype=torch.float64), torch.tensor([-2.0], dtype=torch.float64)
    plain, curved = (simpo_loss(chosen, rejected, 2.5, 1.0, alpha=alpha) for alpha in (0.0, 1e-7))
    assert curved.item() == pytest.approx(plain.item(), rel=1e-6)


def test_odds_by_hand_and_at_the_ends():
    probabilities = [0.5, 0.9, 1e-3]
    odds = ops.log_odds(torch.tensor(probabilities, dtype=torch.float64).log())
    assert odds.tolist() == pytest.approx([math.log(p / (1 - p)) for p in probabilities])
    ends = torch.tensor([0.0, -1e-9, -1e-6, -1e3], requires_grad=True)
    odds = ops.log_odds(ends)
    odds.sum().backward()
    assert torch.isfinite(odds).all()
    assert torch.isfinite(ends.grad).all()
    assert odds[-1].item() == pytest.approx(-1e3)


def test_the_margin_has_two_spellings():
    assert make("simpo", beta=2.5).config.gamma == 1.25
    assert make("simpo", beta=2.5, gamma_beta_ratio=0.1).config.gamma == pytest.approx(0.25)
    assert make("simpo", beta=2.5, simpo_gamma=0.0).config.gamma == 0.0
    with pytest.raises(ValidationError, match="give one of them"):
        make("simpo", simpo_gamma=1.0, gamma_beta_ratio=0.5)


def test_smoothing_that_does_nothing_is_refused():
    with pytest.raises(ValidationError, match="does nothing to hinge"):
        make("cpo", loss_type="hinge", label_smoothing=0.1)


PAIR = Group("g", [], [7, 8, 9], [Completion("a", [10, 2], reward=1.0), Completion("b", [11, 12, 2], reward=0.0)])


def test_orpo_may_learn_prompts_of_chosen_answers():
    algorithm = make("orpo", orpo_nll_on_prompt=True)
    batch = algorithm.annotate(collate(algorithm.build([PAIR])), LocalWorld())
    assert batch["mask"].long().tolist() == [[0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    assert batch["chosen"].long().tolist() == [[0, 1, 1, 1, 1, 0], [0] * 6]
    logps = torch.tensor([[0, -8.0, -4.0, -1.0, -3.0, 0], [0, 0, 0, -1.0, -1.0, -1.0]], dtype=torch.float64)
    out, _ = pair_batch(logps[:, 1:], logps[:, 1:], torch.ones(2, 5))
    terms, metrics = algorithm.loss(out, batch)
    logged = averages(metrics)
    assert logged["nll_loss"] == pytest.approx(16 / 4)
    assert logged["rewards/chosen"] == pytest.approx(0.1 * -2.0), "the odds are those of the answer alone"
    assert logged["logps/chosen"] == pytest.approx(-4.0)
    assert logged["completions/mean_length"] == pytest.approx(2.5)
    assert terms["nll"].value.where(batch["chosen"], 0).sum() == pytest.approx(16.0)


def test_prompts_that_are_learned_keep_the_contract(tmp_path):
    bench = Bench("orpo", config={"orpo_nll_on_prompt": True}, folder=tmp_path)
    check_micro_batches(bench)
    check_layouts(bench)
