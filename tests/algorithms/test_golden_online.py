"""Advantages and losses of online policy optimization against numbers of published implementations, with gradients."""

import json

import pytest
import torch
from torch import Tensor

from alignkit import ops
from tests.shared import golden_case, shared_path

FORMS = {"group": "group_std", "batch": "batch_std", "none": "group"}
"""TRL's names of how rewards are scaled → ours."""


def tensor(values) -> Tensor:
    """Float64; the strings nan, inf and -inf stand for those numbers."""

    def numbers(x):
        return [numbers(part) for part in x] if isinstance(x, list) else float(x)

    return torch.tensor(numbers(values), dtype=torch.float64)


def opened(file: str, name: str):
    """Parameters, inputs as tensors and outputs of a case, and a comparison with the tolerance its file asks for."""
    case = golden_case(file, name)
    meta = json.loads(shared_path("golden", file).read_text())["meta"]

    def same(actual: Tensor, expected, where: Tensor | None = None) -> None:
        expected = tensor(expected)
        if where is not None:
            actual, expected = actual[where], expected[where]
        torch.testing.assert_close(actual, expected, rtol=meta["rtol"], atol=meta["atol"])

    return case["params"], {key: tensor(x) for key, x in case["inputs"].items()}, case["outputs"], same


def groups_of(rows: int, size: int) -> Tensor:
    return torch.arange(rows) // size


def token_mean(value: Tensor, mask: Tensor) -> Tensor:
    return value[mask].sum() / mask.sum()


@pytest.mark.parametrize(
    "name",
    [
        "group",
        "batch",
        "none",
        "two_rewards_weighted",
        "gdpo_normalize_then_sum",
        "missing_scores",
        "zero_std_group",
    ],
)
def test_group_advantages(name):
    params, inputs, expected, same = opened("grpo_advantages.json", name)
    rewards, weights = inputs["rewards_per_func"], tensor(params["reward_weights"])
    group = groups_of(len(rewards), params["num_generations"])

    def advantages(rewards, group):
        if params["aggregation"] == "normalize_then_sum":
            return ops.merged_advantages(rewards, weights, group, eps=params["eps"])
        summed = ops.weighted_rewards(rewards, weights)
        return ops.group_advantages(summed, group, FORMS[params["scale_rewards"]], eps=params["eps"])

    found = advantages(rewards, group)
    same(found, expected["advantages"])
    order = torch.arange(len(rewards)).reshape(-1, params["num_generations"]).T.flatten()
    torch.testing.assert_close(advantages(rewards[order], 7 - 3 * group[order]), found[order])


def test_overlong_punishment():
    params, inputs, expected, same = opened("grpo_advantages.json", "soft_overlong_punishment")
    longest, cache = params["max_completion_len"], params["soft_punish_cache"]
    same(ops.overlong_punishment(inputs["completion_lengths"], longest, cache), expected["rewards"])


@pytest.mark.parametrize(
    "name", ["advantages_plain", "advantages_normalized", "advantages_missing", "advantages_pairs"]
)
def test_leave_one_out_advantages(name):
    params, inputs, expected, same = opened("rloo.json", name)
    rewards = inputs["rewards"]
    found = ops.group_advantages(rewards, groups_of(len(rewards), params["num_generations"]), "rloo")
    if params["normalize_advantages"]:
        found = ops.batch_normalized(found, ~rewards.isnan())
    same(found, expected["advantages"])


@pytest.mark.parametrize("name", ["gae_gamma1.0_lam0.95", "gae_gamma0.9_lam0.8"])
def test_gae(name):
    params, inputs, expected, same = opened("advantages_verl.json", name)
    mask = inputs["response_mask"].bool()
    advantages, returns = ops.gae(inputs["token_rewards"], inputs["values"], mask, params["gamma"], params["lam"])
    same(ops.whiten(advantages, mask), expected["advantages"], mask)
    same(returns, expected["returns"], mask)


@pytest.mark.parametrize("name", ["advantage_reinforce_pp_gamma1.0", "advantage_reinforce_pp_gamma0.9"])
def test_whitened_returns(name):
    params, inputs, expected, same = opened("advantages_verl.json", name)
    mask = inputs["response_mask"].bool()
    returns = ops.discounted_returns(inputs["token_rewards"], mask, params["gamma"])
    same(returns, expected["returns"])
    same(ops.whiten(returns, mask), expected["advantages"])


@pytest.mark.parametrize("keep_lone", [True, False])
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("advantage_grpo", "group_std"),
        ("advantage_dr_grpo", "group"),
        ("advantage_rloo", "rloo"),
        ("advantage_reinforce_pp_baseline", "whitened"),
        ("advantage_opo", "opo"),
        ("advantage_grpo__all_rewards_equal", "group_std"),
    ],
)
def test_estimators_on_ragged_groups(name, form, keep_lone):
    """The last answer is alone: theirs keeps its score, ours gets 0 unless asked."""
    params, inputs, expected, same = opened("advantages_verl.json", name)
    mask, group, scores = inputs["response_mask"].bool(), inputs["prompt_index"].long(), inputs["token_rewards"].sum(-1)
    if form == "opo":
        found = ops.opo_advantages(scores, mask.sum(-1), group, keep_lone=keep_lone)
    else:
        kind = "group" if form == "whitened" else form
        found = ops.group_advantages(scores, group, kind, eps=params["eps"], keep_lone=keep_lone)
    if not keep_lone:
        assert found[-1] == 0
        if form != "whitened":
            same(ops.to_tokens(found, mask)[:-1], expected["advantages"][:-1])
        return
    found = ops.to_tokens(found, mask)
    same(ops.whiten(found, mask) if form == "whitened" else found, expected["advantages"])


@pytest.mark.parametrize("name", ["advantage_binary_pm1", "advantage_binary_01"])
def test_advantages_of_selection(name):
    _, inputs, expected, same = opened("raft.json", name)
    rewards, mask, group = inputs["sequence_rewards"], inputs["response_mask"].bool(), inputs["prompt_index"].long()
    same(ops.to_tokens(ops.raft_advantages(rewards), mask), expected["raft_advantages"])
    rejected = ops.reinforce_rej_advantages(rewards, group)
    same(ops.to_tokens(rejected, mask), expected["reinforce_rej_advantages"])


def test_the_best_share_of_a_pool():
    params, inputs, expected, same = opened("raft.json", "top_fraction_selection")
    kept = ops.top_fraction(inputs["rewards"], params["alpha"])
    assert kept.tolist() == expected["kept_indices_best_first"]
    same(inputs["rewards"][kept], expected["kept_rewards"])


@pytest.mark.parametrize("name", ["hardness_mixed", "hardness_no_outliers", "hardness_all_masked_falls_back"])
def test_hardness(name):
    params, inputs, expected, same = opened("grpo_s.json", name)
    distance, gap = 1 - inputs["similarity_W"], inputs["reward_gap"]
    category, all_rows = torch.zeros(len(gap), dtype=torch.long), torch.ones(len(gap), dtype=torch.bool)
    mean_distance, mean_gap = (ops.category_means(x, category, all_rows, 1) for x in (distance, gap))
    hard = ops.data_hardness(distance, mean_distance[category])
    responds, kept = ops.responsiveness(gap, category, all_rows, mean_gap, params["tau"], tau_mode="absolute")
    same(hard, expected["alpha_data"])
    assert kept.tolist() == expected["kept"]
    same(responds[0], expected["alpha_model"])
    same(hard * responds[category], expected["alpha"])


def test_clauses():
    _, inputs, expected, same = opened("grpo_s.json", "clause_similarity")
    found = ops.clause_similarity(inputs["embeddings_generated_clauses"], inputs["embeddings_demo_clauses"])
    same(found, expected["similarity_matrix"])
    same(ops.clause_coverage(found), expected["W"])


def test_scaled_advantages():
    params, inputs, expected, same = opened("grpo_s.json", "scaled_advantages")
    rewards = inputs["rewards"]
    group = groups_of(rewards.numel(), rewards.shape[1])
    plain = ops.group_advantages(rewards.flatten(), group, "group_std", eps=params["eps"])
    same(plain.view_as(rewards), expected["advantages_unscaled"])
    same((inputs["alpha_per_prompt"][group] * plain).view_as(rewards), expected["advantages"])


GRPO_LOSSES = [
    *(f"{kind}{more}" for kind in ("grpo", "bnpo", "dr_grpo", "dapo") for more in ("", "_clip_higher", "_kl")),
    "grpo_kl_bias_corrected",
    "dr_grpo_long_budget",
    "dapo_global_token_count",
    "gspo",
    "cispo",
    "two_sided_delta",
    "sapo",
    "vespo",
    "luspo",
    "grpo__empty_completion",
    "dapo__empty_completion",
    "grpo__on_policy",
    "grpo__zero_advantage",
    "grpo__extreme_ratios",
    "gspo__extreme_ratios",
    "cispo__extreme_ratios",
    "grpo__token_level_advantages",
]


ROUNDED_TAU = torch.tensor(1.05, dtype=torch.float32).item()
"""TRL makes its temperatures in float32 whatever the log-probabilities are; the file is more exact than that."""


@pytest.mark.parametrize("name", GRPO_LOSSES)
def test_grpo_loss(name):
    params, inputs, expected, same = opened("grpo_loss.json", name)
    logps, old, reference = (inputs[f"{which}_token_logps"] for which in ("new", "old", "ref"))
    logps.requires_grad_()
    mask, kind = inputs["completion_mask"].bool(), params["loss_type"]
    low, high = params["epsilon_low"], params["epsilon_high"]
    of_rows = params["importance_sampling_level"] == "sequence"
    ratio = (ops.sequence_ratio if of_rows else ops.token_ratio)(logps, old, mask)
    advantages = inputs["advantages"]
    if not of_rows and advantages.ndim == 1:
        advantages = advantages[:, None].expand_as(mask)
    if kind == "cispo":
        value = ops.cispo_surrogate(logps, ratio, advantages, params["clip_max"])
    elif kind == "sapo":
        value = ops.sapo_surrogate(ratio, advantages, tau_negative=ROUNDED_TAU)
    elif kind == "vespo":
        value = ops.vespo_surrogate(logps, old, mask, advantages)
    elif kind == "luspo":
        value = ops.luspo_surrogate(ratio, advantages, mask, low, high)
    else:
        value = ops.clipped_surrogate(ratio, advantages, low, high, upper=params["delta"])
    kl = ops.kl_estimate(logps, reference, "k3") * (ratio if params["use_bias_correction_kl"] else 1.0)
    if params["beta"]:
        value = value + params["beta"] * kl

    if of_rows:
        loss = value.mean()
    elif kind in ("grpo", "sapo"):
        loss = ops.sequence_mean(value, mask).mean()
    elif kind == "dr_grpo":
        loss = (ops.sequence_sum(value, mask) / params["max_completion_length"]).mean()
    elif kind == "bnpo":
        loss = token_mean(value, mask)
    else:
        loss = ops.sequence_sum(value, mask).sum() / params["global_token_count"]
    loss.backward()
    same(loss.detach(), expected["loss"])
    same(logps.grad, expected["grad_new_token_logps"])

    over = torch.ones_like(ratio, dtype=torch.bool) if of_rows else mask
    below, above = (hit.double()[over].mean().item() for hit in ops.clip_hits(ratio, advantages, low, high))
    _, beyond = ops.clip_hits(ratio, advantages, 1.0, (params["clip_max"] or 0.0) - 1.0)
    ours = {
        "clip_ratio/low_mean": below,
        "clip_ratio/high_mean": above,
        "cispo_clip_ratio": beyond.double()[over].mean().item(),
        "kl": token_mean(kl.detach(), mask).item() if not of_rows else None,
    }
    logged = {key: value for key, value in expected["metrics"].items() if key in ours}
    assert {key: ours[key] for key in logged} == pytest.approx(logged, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", ["loss_symmetric", "loss_asymmetric"])
def test_leave_one_out_loss(name):
    params, inputs, expected, same = opened("rloo.json", name)
    logps, mask = inputs["new_token_logps"].requires_grad_(), inputs["completion_mask"].bool()
    old = torch.zeros_like(mask, dtype=torch.float64)
    old[:, 0] = inputs["old_seq_logps"]  # only the sum is known; every answer has a first token
    ratio = ops.sum_ratio(logps, old, mask)
    loss = ops.clipped_surrogate(ratio, inputs["advantages"], params["epsilon_low"], params["epsilon_high"]).mean()
    loss.backward()
    same(loss.detach(), expected["loss"])
    same(logps.grad, expected["grad_new_token_logps"])


AGGREGATIONS = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def aggregate(value: Tensor, mask: Tensor, how: str) -> Tensor:
    """As verl does, which leaves out rows without a token."""
    rows = mask.any(-1)
    match how:
        case "token-mean":
            return token_mean(value, mask)
        case "seq-mean-token-sum":
            return ops.sequence_sum(value, mask)[rows].mean()
        case "seq-mean-token-mean":
            return ops.sequence_mean(value, mask)[rows].mean()
        case "seq-mean-token-sum-norm":
            return ops.sequence_sum(value, mask).sum() / mask.shape[1]
    raise ValueError(how)


@pytest.mark.parametrize(
    "name",
    [
        *(f"ppo_clip_{how}{rows}" for how in AGGREGATIONS for rows in ("", "__empty_row")),
        "ppo_clip_higher",
        "ppo_dual_clip_extreme",
        "gspo",
        "cispo",
        "sapo",
        "geo_mean",
    ],
)
def test_policy_loss(name):
    params, inputs, expected, same = opened("policy_losses_verl.json", name)
    logps, old, advantages = inputs["new_token_logps"], inputs["old_token_logps"], inputs["advantages"]
    logps.requires_grad_()
    mask = inputs["response_mask"].bool()
    low, high = (params[key] if params[key] else params["clip_ratio"] for key in ("clip_ratio_low", "clip_ratio_high"))
    ratio = ops.token_ratio(logps, old, mask)
    match name:
        case "gspo":
            loss = ops.clipped_surrogate(ops.sequence_ratio(logps, old, mask), advantages[:, 0], low, high).mean()
        case "geo_mean":
            loss = ops.gmpo_surrogate(logps, old, mask, advantages[:, 0], low, high).mean()
        case "cispo":
            loss = aggregate(ops.cispo_surrogate(logps, ratio, advantages, 1 + high), mask, params["agg"])
        case "sapo":
            value = ops.sapo_surrogate(ratio, advantages, params["tau_pos"], params["tau_neg"])
            loss = aggregate(value, mask, params["agg"])
        case _:
            value = ops.clipped_surrogate(ratio, advantages, low, high, dual=params["clip_ratio_c"])
            loss = aggregate(value, mask, params["agg"])
            below, above = ops.clip_hits(ratio, advantages, low, high)
            share = token_mean((below | above).double(), mask).item()
            assert share == pytest.approx(expected["metrics"]["actor/pg_clipfrac"], rel=1e-6)
    loss.backward()
    same(loss.detach(), expected["loss"])
    same(logps.grad, expected["grad_new_token_logps"])


def test_value_loss():
    params, inputs, expected, same = opened("policy_losses_verl.json", "value_loss_clipped")
    values, mask = inputs["value_preds"].requires_grad_(), inputs["response_mask"].bool()
    others = (inputs["returns"], inputs["old_values"], params["cliprange_value"])
    loss = token_mean(ops.value_loss(values, *others), mask)
    loss.backward()
    same(loss.detach(), expected["loss"])
    same(values.grad, expected["grad_value_preds"])
    share = token_mean(ops.value_hits(values, *others).double(), mask).item()
    assert share == pytest.approx(expected["clip_fraction"], rel=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
def test_kl_estimates(estimator):
    _, inputs, expected, same = opened("policy_losses_verl.json", f"kl_{estimator}")
    logps, mask = inputs["new_token_logps"].requires_grad_(), inputs["response_mask"].bool()
    kl = ops.kl_estimate(logps, inputs["ref_token_logps"], estimator)
    kl[mask].sum().backward()
    same(kl.detach(), expected["kl_tokens"])
    same(logps.grad, expected["grad_of_masked_sum"])


@pytest.mark.parametrize("name", ["rewards_and_gae_k1", "rewards_and_gae_k3", "rewards_and_gae_whiten_rewards"])
def test_rewards_of_tokens_to_advantages(name):
    """With the score behind the last token, as TRL has it."""
    params, inputs, expected, same = opened("ppo.json", name)
    mask, live = ~inputs["padding_mask"].bool(), ~inputs["padding_mask_plus_one"].bool()
    assert torch.equal(ops.extended(mask), live)
    kl = ops.kl_estimate(inputs["token_logps"], inputs["ref_token_logps"], params["kl_estimator"])
    rewards = ops.token_rewards(inputs["scores"], kl, mask, params["kl_coef"], behind_last=True)
    if params["whiten_rewards"]:
        rewards = ops.whiten(rewards, live, keep_mean=True)
    same(rewards, expected["token_rewards"])
    advantages, returns = ops.gae(rewards, inputs["values"], live, params["gamma"], params["lam"])
    same(ops.whiten(advantages, mask), expected["advantages"])
    same(returns, expected["returns"])


@pytest.mark.parametrize("name", ["loss", "loss_tight"])
def test_policy_and_value_loss(name):
    params, inputs, expected, same = opened("ppo.json", name)
    mask, live = ~inputs["padding_mask"].bool(), ~inputs["padding_mask_plus_one"].bool()
    logps, values = (inputs[key].requires_grad_() for key in ("new_token_logps", "value_preds"))
    ratio, clip = ops.token_ratio(logps, inputs["old_token_logps"], mask), params["cliprange"]
    policy = token_mean(ops.clipped_surrogate(ratio, inputs["advantages"], clip, clip), mask)
    square = ops.value_loss(values, inputs["returns"], inputs["old_values"], params["cliprange_value"])
    value = token_mean(square, live)
    loss = policy + params["vf_coef"] * value
    loss.backward()
    for ours, theirs in ((policy, "policy_loss"), (value, "value_loss"), (loss, "loss")):
        same(ours.detach(), expected[theirs])
    same(logps.grad, expected["grad_new_token_logps"])
    same(values.grad, expected["grad_value_preds"])


@pytest.mark.parametrize("name", ["raft_vanilla", "raft_pp_clipped"])
def test_loss_of_selected_answers(name):
    params, inputs, expected, same = opened("raft.json", name)
    logps, mask, advantages = inputs["new_token_logps"], inputs["response_mask"].bool(), inputs["advantages"]
    logps.requires_grad_()
    if name == "raft_vanilla":  # as if every answer were of this very policy
        value = ops.cispo_surrogate(logps, torch.ones_like(advantages), advantages, clip_max=1.0)
    else:
        ratio = ops.token_ratio(logps, inputs["old_token_logps"], mask)
        value = ops.clipped_surrogate(ratio, advantages, params["cliprange"], params["cliprange"])
    loss = token_mean(value, mask)
    loss.backward()
    same(loss.detach(), expected["loss"])
    same(logps.grad, expected["grad_new_token_logps"])
