"""From scores to advantages: baselines of a group, returns along an answer, whitening, several rewards, selection.

Shapes: N rows, L tokens, K rewards. `group` [N] says which rows answer the same prompt, in any order. A reward of nan
is no score: such a row is in no statistic and its advantage is 0. Statistics of a batch are over all processes: `total`
sums a tensor over them, as `World.sum` does; a group stands on one process. Nothing here has a gradient to pass on.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isnan
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from alignkit.ops.reduce import sequence_mean

GroupForm = Literal["group_std", "group", "batch_std", "rloo"]
Granularity = Literal["token", "sequence", "batch"]
Total = Callable[[Tensor], Tensor]

WHITENING = 1e-8
"""Added to the variance in whitening; small beside any variance worth dividing by."""
SOLVER_STEPS, SOLVED = 1000, 1e-12
"""At most so many steps of the min-norm solver, until what another could gain is this share of the largest norm."""


def alone(x: Tensor) -> Tensor:
    """The sum over all processes where there is one."""
    return x


def to_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """[N] → [N, L]: the number of a row on each of its tokens, 0 elsewhere."""
    return x[:, None].where(mask, 0.0)


def weighted_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """[N, K], [K] → [N]: Σ w·r over the rewards that said something, nan where none did; a weight of 0 says nothing."""
    said = ~rewards.isnan() & (weights != 0)
    summed = (rewards * weights).where(said, 0.0).sum(-1)
    return summed.where(said.any(-1), float("nan"))


class _Groups:
    """Sums over the scored rows of each row's group, [N] → [N], in float64."""

    def __init__(self, rewards: Tensor, group: Tensor) -> None:
        self.scored = ~rewards.isnan()
        names, self.place = torch.unique(group, return_inverse=True)
        self.size = len(names)
        self.count = self.sum(torch.ones_like(rewards, dtype=torch.float64))
        lowest, highest = self._extreme(rewards, "amin"), self._extreme(rewards, "amax")
        self.differ = self.scored & (highest > lowest)
        # above the lowest of its group: equal scores are then exactly 0, and so is their mean
        self.score = (rewards.double() - lowest.double()).where(self.scored, 0.0)

    def sum(self, x: Tensor) -> Tensor:
        sums = x.new_zeros(self.size).index_add(0, self.place, x.where(self.scored, 0.0))
        return sums[self.place]

    def mean(self, x: Tensor) -> Tensor:
        return self.sum(x) / self.count.clamp(min=1)

    def std(self, centred: Tensor) -> Tensor:
        """With n − 1; 0 for a group of one."""
        return (self.sum(centred.square()) / (self.count - 1).clamp(min=1)).sqrt()

    def _extreme(self, rewards: Tensor, which: str) -> Tensor:
        """The smallest (amin) or largest (amax) score of each row's group."""
        unscored = float("inf") if which == "amin" else float("-inf")
        found = rewards.new_full((self.size,), unscored)
        return found.scatter_reduce(0, self.place, rewards.where(self.scored, unscored), which)[self.place]


def group_advantages(
    rewards: Tensor,
    group: Tensor,
    form: GroupForm,
    *,
    eps: float = 1e-4,
    min_std: float = 0.0,
    keep_lone: bool = False,
    total: Total = alone,
) -> Tensor:
    """How much better than its group each answer is, [N], [N] → [N]; equal scores give exactly 0.

    group: r − mean. group_std: (r − mean) / (std + eps). batch_std: the same with the standard deviation of all scores
    of the batch. rloo: r − mean of the others. Standard deviations have n − 1.

    Args:
        min_std: a group whose standard deviation is below this has no signal: 0.
        keep_lone: a lone answer keeps its score (its standard deviation counts as 1), as in verl; else it has 0.

    Source: arXiv 2402.03300 (group_std), 2503.20783 (group), 2402.14740 (rloo).
    """
    groups = _Groups(rewards, group)
    centred = groups.score - groups.mean(groups.score)
    spread = groups.std(centred)
    lone = groups.count == 1 if keep_lone else torch.zeros_like(groups.scored)
    own, centred = spread.where(~lone, 1.0), torch.where(lone, rewards.double(), centred)
    match form:
        case "group":
            value = centred
        case "group_std":
            value = centred / (own + eps)
        case "batch_std":
            value = centred / (_moments(rewards, groups.scored, total)[1].sqrt() + eps)
        case "rloo":
            value = centred * (groups.count / (groups.count - 1)).where(groups.count > 1, 1.0)
        case _:
            raise ValueError(f"unknown form of group advantages {form!r}")
    return value.where(groups.scored & (own >= min_std), 0.0).to(rewards.dtype)


def opo_advantages(rewards: Tensor, lengths: Tensor, group: Tensor, *, keep_lone: bool = False) -> Tensor:
    """r − Σ length·r / Σ length over the group, [N] each → [N]; 0 in a group without a token.

    Args: lengths in tokens; `keep_lone` as in `group_advantages`.

    Source: arXiv 2505.23585.
    """
    groups, lengths = _Groups(rewards, group), lengths.double()
    tokens = groups.sum(lengths)
    value = groups.score - groups.sum(lengths * groups.score) / tokens.clamp(min=1)
    if keep_lone:
        value = torch.where(groups.count == 1, rewards.double(), value)
    return value.where(groups.scored & (tokens > 0), 0.0).to(rewards.dtype)


def merged_advantages(
    rewards: Tensor,
    weights: Tensor,
    group: Tensor,
    *,
    form: GroupForm = "group_std",
    rescale: bool = True,
    eps: float = 1e-4,
    min_std: float = 0.0,
    total: Total = alone,
) -> Tensor:
    """Several rewards, each compared in its group and then weighted: Σ w·A, [N, K], [K], [N] → [N].

    Args:
        form, eps, min_std: as in `group_advantages`, for every reward.
        rescale: divide the sum by its standard deviation over the batch plus eps; its mean there is 0 as it is.

    Source: arXiv 2601.05242.
    """
    parts = [
        group_advantages(reward, group, form, eps=eps, min_std=min_std, total=total) for reward in rewards.unbind(1)
    ]
    summed = (torch.stack(parts, dim=1).double() * weights).sum(-1)
    if rescale:
        scored = (~rewards.isnan() & (weights != 0)).any(-1)
        summed = summed / (_moments(summed, scored, total)[1].sqrt() + eps)
    return summed.to(rewards.dtype)


def batch_normalized(x: Tensor, over: Tensor, *, eps: float = 1e-4, total: Total = alone) -> Tensor:
    """(x − mean) / (std + eps) over the batch where `over` (same shape) is True, 0 elsewhere."""
    mean, variance, _ = _moments(x, over, total)
    return ((x.double() - mean) / (variance.sqrt() + eps)).where(over, 0.0).to(x.dtype)


def whiten(x: Tensor, mask: Tensor, *, keep_mean: bool = False, total: Total = alone) -> Tensor:
    """(x − mean)·(variance + 1e-8)^−½ over the batch's masked tokens, [N, L] → [N, L], 0 elsewhere.

    The variance has n − 1; fewer than two tokens stay as they are. `keep_mean` adds the mean again: only the scale
    changes.
    """
    mean, variance, count = _moments(x, mask, total)
    white = (x.double() - mean) * (variance + WHITENING).rsqrt() + (mean if keep_mean else 0.0)
    return white.where(count > 1, x.double()).where(mask, 0.0).to(x.dtype)


def _moments(x: Tensor, over: Tensor, total: Total) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance with n − 1 (0 of fewer than two) and n, in float64, over all processes."""
    x = x.double().where(over, 0.0)
    summed, count = total(torch.stack([x.sum(), over.sum().double()])).unbind()
    mean = summed / count.clamp(min=1)
    squares = total((x - mean).where(over, 0.0).square().sum())
    return mean, squares / (count - 1).clamp(min=1), count


def extended(mask: Tensor) -> Tensor:
    """[N, L] → [N, L]: also the position behind the last True of each row, where there is one."""
    place, last = _last(mask)
    return mask | ((place == last + 1) & mask.any(-1, keepdim=True))


def _last(mask: Tensor) -> tuple[Tensor, Tensor]:
    """[L] positions, and that of the last True of each row, [N, 1]."""
    place = torch.arange(mask.shape[1], device=mask.device)
    return place, (place * mask).amax(-1, keepdim=True)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float, *, behind_last: bool = False) -> Tensor:
    """−κ·kl on every token and the score of the answer on its last one, [N], [N, L], [N, L] → [N, L].

    Args:
        scores: numbers; a row without a score has no token in the mask.
        kl: estimates in nats.
        coefficient: κ, dimensionless.
        behind_last: put the score one position further where the row has one, as TRL's PPO trainer does; values must
            then live on `extended(mask)`.

    Source: arXiv 2203.02155.
    """
    place, last = _last(mask)
    if behind_last:
        last = (last + 1).clamp(max=mask.shape[1] - 1)
    ends = (place == last) & mask.any(-1, keepdim=True)
    return (-coefficient * kl).where(mask, 0.0) + to_tokens(scores, ends)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns A + V, [N, L] each, 0 outside the mask: δ_t = r_t + γV_{t+1} − V_t, A_t = δ_t + γλA_{t+1}.

    V stands for the state before a token and is 0 behind the last one. Tokens outside the mask are stepped over: what
    comes after them counts as the next token.

    Source: arXiv 1506.02438.
    """
    advantage, later = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    columns = []
    for reward, value, on in zip(*(x.unbind(1)[::-1] for x in (rewards, values, mask)), strict=True):
        step = reward + gamma * later - value + gamma * lam * advantage
        advantage, later = torch.where(on, step, advantage), torch.where(on, value, later)
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages.where(mask, 0.0), (advantages + values).where(mask, 0.0)


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """R_t = r_t + γR_{t+1}, [N, L], [N, L] → [N, L]; tokens outside the mask pass it on undiscounted and have 0.

    Deviation: the reference code starts again from 0 at every masked token, tool output within an answer included.

    Source: arXiv 2501.03262.
    """
    running = torch.zeros_like(rewards[:, 0])
    columns = []
    for reward, on in zip(rewards.unbind(1)[::-1], mask.unbind(1)[::-1], strict=True):
        running = torch.where(on, reward + gamma * running, running)
        columns.append(running)
    return torch.stack(columns[::-1], dim=1).where(mask, 0.0)


def overlong_punishment(lengths: Tensor, longest: int, cache: int) -> Tensor:
    """0 up to `longest` − `cache` tokens, falling to −1 at `longest`, −1 beyond; elementwise, of lengths in tokens.

    Source: arXiv 2503.14476.
    """
    dtype = lengths.dtype if lengths.is_floating_point() else torch.get_default_dtype()
    if cache == 0:
        return -(lengths > longest).to(dtype)
    return ((longest - cache - lengths.to(dtype)) / cache).clamp(-1.0, 0.0)


def has_signal(rewards: Tensor, group: Tensor) -> Tensor:
    """[N], [N] → [N] bool: whether two scores of the row's group differ at all; False where the row has none.

    Source: arXiv 2503.14476, dynamic sampling.
    """
    return _Groups(rewards, group).differ


def raft_advantages(rewards: Tensor) -> Tensor:
    """max(0, r), elementwise; 0 without a score. Source: arXiv 2504.11343, RAFT++ in the authors' code."""
    return rewards.where(rewards > 0, 0.0)


def reinforce_rej_advantages(rewards: Tensor, group: Tensor) -> Tensor:
    """r where the scores of the group differ, else 0, [N], [N] → [N].

    Deviation: a lone answer has nothing to differ from and gets 0; the authors' code keeps its score.

    Source: arXiv 2504.11343.
    """
    return rewards.where(has_signal(rewards, group), 0.0)


def best_of_groups(rewards: Tensor, group: Tensor) -> Tensor:
    """[N], [N] → [G]: the place of the best of each group, ascending; of equal ones the first, of unscored ones none.

    Source: arXiv 2304.06767.
    """
    places: dict[int, int] = {}
    scores: list[float] = rewards.tolist()
    for place, name in enumerate(group.tolist()):
        if not isnan(scores[place]) and (name not in places or scores[place] > scores[places[name]]):
            places[name] = place
    return torch.tensor(sorted(places.values()), dtype=torch.long, device=rewards.device)


def top_fraction(rewards: Tensor, fraction: float) -> Tensor:
    """[N] → [int(n·fraction)]: the places of the best of the n scored rows, best first; of equal ones the first.

    Raises:
        ValueError: the fraction is less than one row.

    Source: arXiv 2304.06767, in the form of LMFlow's `top`.
    """
    scored = ~rewards.isnan()
    count = int(scored.sum())
    keep = int(count * fraction)
    if keep < 1:
        raise ValueError(f"{fraction:g} of {count} scored answers is less than one; take more answers, or keep more")
    return rewards.where(scored, float("-inf")).argsort(descending=True, stable=True)[:keep]


def pareto_advantages(
    advantages: Tensor,
    mask: Tensor,
    *,
    granularity: Granularity = "token",
    noon: bool = True,
    total: Total = alone,
) -> Tensor:
    """The point nearest 0 between the smallest and the largest advantage over objectives, [N, L, K], [N, L] → [N, L].

    That is how far all objectives agree: with `noon`, which cuts advantages off at 0 before, their minimum. The ratio
    counts as 1, so none is cut off for being above 1 + ε; the surrogate does that.

    Args:
        granularity: where objectives are compared: at each token (reconstructed), in the mean of each answer, or in
            one mean of the batch, which then stands on every token and credits none of them.

    Source: arXiv 2508.07768, theorem 1.
    """
    each = (advantages.clamp(min=0.0) if noon else advantages).where(mask[..., None], 0.0)
    if granularity == "sequence":
        each = torch.stack([sequence_mean(x, mask) for x in each.unbind(-1)], dim=-1)[:, None]
    elif granularity == "batch":
        each = torch.stack([_moments(x, mask, total)[0] for x in each.unbind(-1)]).to(each.dtype)
    elif granularity != "token":
        raise ValueError(f"unknown granularity {granularity!r}")
    nearest = each.amin(-1).clamp(min=0.0) + each.amax(-1).clamp(max=0.0)
    return nearest.expand(mask.shape).where(mask, 0.0)


def filled(advantages: Tensor, said: Tensor) -> Tensor:
    """[N, K] with the mean over the objectives that said something of a row in place of the others.

    A minimum over objectives is then that of the former.
    """
    mean = advantages.where(said, 0.0).sum(-1) / said.sum(-1).clamp(min=1)
    return advantages.where(said, mean[:, None])


def least_shares(advantages: Tensor) -> Tensor:
    """1 for the objective with the smallest advantage of a row, a part of it where several have it, [N, K] → [N, K]."""
    least = advantages == advantages.amin(-1, keepdim=True)
    return least / least.sum(-1, keepdim=True)


def advantage_gram(advantages: Tensor, mask: Tensor, *, total: Total = alone) -> Tensor:
    """Means of A_i·A_j over the batch's masked tokens, [N, L, K], [N, L] → [K, K], in float64."""
    x = advantages[mask].double()
    return total(x.T @ x) / total(mask.sum().double()).clamp(min=1)


def diagonal_weights(gram: Tensor) -> Tensor:
    """[K, K] → [K]: weights on the simplex that minimise Σ c²·m with m on the diagonal: c ∝ 1/m.

    Reconstructed from arXiv 2508.07768. An objective with m = 0 has nothing to say and weight 0; if none has, all are
    equal.
    """
    size = gram.diagonal()
    active = size > 0
    if not active.any():
        return torch.full_like(size, 1 / len(size))
    return normalize(size.where(active, 1.0).reciprocal().where(active, 0.0), p=1, dim=0)


def min_norm_weights(gram: Tensor) -> Tensor:
    """[K, K] → [K]: weights on the simplex that minimise the mean of (Σ c·A)², by pairwise Frank-Wolfe steps.

    Reconstructed from arXiv 2508.07768. An objective without any advantage has weight 0: it would win with a norm of 0.
    The smaller objective weighs more, so a user's wish w asks for the gram of A/w.
    """
    active = gram.diagonal() > 0
    weights = diagonal_weights(gram)
    for _ in range(SOLVER_STEPS):
        slope = gram @ weights
        best = int(slope.where(active, float("inf")).argmin())
        worst = int(slope.where(weights > 0, float("-inf")).argmax())
        gain = slope[worst] - slope[best]
        if gain <= SOLVED * gram.diagonal().max():
            break
        curve = gram[best, best] + gram[worst, worst] - 2 * gram[best, worst]
        # of two objectives all but alike the curve can be rounded to nothing; the whole weight moves then
        moved = torch.minimum(gain / curve.clamp(min=torch.finfo(curve.dtype).tiny), weights[worst])
        weights = weights.clone()
        weights[best] += moved
        weights[worst] -= moved
    return weights


def clause_similarity(generated: Tensor, demonstrated: Tensor) -> Tensor:
    """Cosines between the clauses of an answer and those of a demonstration, embeddings [k, d], [l, d] → [k, l]."""
    return normalize(generated, dim=-1) @ normalize(demonstrated, dim=-1).T


def clause_coverage(similarity: Tensor) -> Tensor:
    """How like the closest demonstrated clause those of the answer are on average, [k, l] → [], in [−1, 1].

    Source: arXiv 2503.18991, as accounts of it give it; one of them has the maximum over the answer's clauses.
    """
    return similarity.amax(-1).mean()


def category_means(x: Tensor, category: Tensor, over: Tensor, size: int, *, total: Total = alone) -> Tensor:
    """Means of x by category over the batch where `over` is True, [N] each → [size]; 0 of an empty one.

    Args: categories are numbered from 0 to size − 1, the same on all processes.
    """
    summed, count = _category_sums(x, category, over, size, total)
    return (summed / count.clamp(min=1)).to(x.dtype)


def _category_sums(x: Tensor, category: Tensor, over: Tensor, size: int, total: Total) -> tuple[Tensor, Tensor]:
    """Sums and counts, [size] each, in float64, over all processes."""
    kept = torch.stack([x.double().where(over, 0.0), over.double()])
    summed, count = total(kept.new_zeros(2, size).index_add(1, category, kept)).unbind()
    return summed, count


def data_hardness(distance: Tensor, mean: Tensor) -> Tensor:
    """σ(δ)/σ(mean of δ in its category), elementwise: above 1 far from the demonstration.

    Args: δ = 1 − coverage; with coverages in its place, what is near the demonstration counts as hard instead.

    Source: arXiv 2503.18991, as accounts of it give it.
    """
    return distance.sigmoid() / mean.sigmoid()


def responsiveness(
    gap: Tensor,
    category: Tensor,
    over: Tensor,
    means: Tensor,
    tau: float,
    *,
    tau_mode: Literal["absolute", "variance"] = "variance",
    total: Total = alone,
) -> tuple[Tensor, Tensor]:
    """σ(mean gap without outliers)/σ(mean gap) by category, [C], and who is no outlier, [N] bool.

    Args:
        gap: [N] reward of the demonstration minus that of the answer.
        category, over: [N], as in `category_means`.
        means: [C] mean gaps.
        tau: a gap counts if its squared distance from the mean is at most τ (absolute), or τ times the category's
            variance, which does not depend on the scale of the reward (variance, our choice).

    A category of outliers alone keeps its mean.

    Source: arXiv 2503.18991, as accounts of it give it.
    """
    size = len(means)
    away = (gap - means[category]).square()
    match tau_mode:
        case "absolute":
            bound = torch.full_like(away, tau)
        case "variance":
            summed, count = _category_sums(away, category, over, size, total)
            bound = tau * (summed / (count - 1).clamp(min=1)).to(gap.dtype)[category]
        case _:
            raise ValueError(f"unknown tau_mode {tau_mode!r}")
    kept = over & (away <= bound)
    summed, count = _category_sums(gap, category, kept, size, total)
    filtered = torch.where(count > 0, (summed / count.clamp(min=1)).to(gap.dtype), means)
    return filtered.sigmoid() / means.sigmoid(), kept
