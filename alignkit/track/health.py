"""Is the run well? What was logged so far → a verdict on each thing that usually goes wrong, in plain words.

Pure: the same records and recipe give the same checks. A check whose metrics a method does not log is not there.
`docs/health.md` says of each what it means and what to do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import copysign, fsum, inf, sqrt
from typing import Any, Literal

from alignkit.track.text import number

Verdict = Literal["ok", "watch", "bad"]
Record = Mapping[str, Any]

PAGE = "docs/health.md"
WINDOW = 10
"""Records that "now" is the mean of; a trend compares them with as many of the first ones."""
SHORTEST = 5
"""Records without which nothing is said, of either end where it is about a trend."""
LIKELY, SURE = 2.0, 4.0
"""Standard errors by which two ends differ for a change to count: in a run's favour, and as an alarm."""
TRIFLE = 1e-3
"""Share of a value that is added to its standard error: what hardly scatters may still hardly have changed."""


@dataclass(frozen=True)
class Check:
    """One verdict: `value` is the number it rests on, `text` a sentence about it."""

    name: str
    verdict: Verdict
    value: float
    text: str

    @property
    def link(self) -> str:
        """Where the documents explain the check."""
        return f"{PAGE}#{self.name.replace(' ', '-')}"


class History:
    """The two ends of what a run logged of its training steps, evaluations left out; small however long the run is."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._first: list[Record] = []
        self._last: deque[Record] = deque(maxlen=WINDOW)
        self.rounds: list[Record] = []
        """The records in which a round of an iterative method is measured."""
        self.count = 0
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Take up the next record."""
        if any(name.startswith("eval_") for name in record):
            return
        self.count += 1
        self._last.append(record)
        if "round" in record:
            self.rounds.append(record)
        if len(self._first) < WINDOW:
            self._first.append(record)

    def names(self) -> list[str]:
        """Names of all numbers at the ends."""
        return list(dict.fromkeys(name for record in (*self._first, *self._last) for name in record))

    def now(self, name: str) -> float | None:
        """The mean of the last records; None where too few have the metric."""
        found = _values(self._last, name)
        return fsum(found) / len(found) if len(found) >= SHORTEST else None

    def trend(self, name: str) -> Trend | None:
        """The first records beside the last ones; None where the metric or the history is too short."""
        size = min(WINDOW, self.count // 3)
        start, now = _values(self._first[:size], name), _values(list(self._last)[len(self._last) - size :], name)
        return Trend(start, now) if min(len(start), len(now)) >= SHORTEST else None


@dataclass(frozen=True)
class Trend:
    """The values of a metric in the first and in the last records."""

    first: list[float]
    last: list[float]

    @cached_property
    def start(self) -> float:
        """Mean of the first records."""
        return fsum(self.first) / len(self.first)

    @cached_property
    def now(self) -> float:
        """Mean of the last records."""
        return fsum(self.last) / len(self.last)

    @property
    def change(self) -> float:
        """How far it rose since the start, in standard errors; below 0 where it fell."""
        size = self.now - self.start
        error = sqrt(_error(self.first, self.start) + _error(self.last, self.now)) + TRIFLE * abs(self.start)
        return size / error if error else copysign(inf, size) if size else 0.0

    @property
    def words(self) -> str:
        """`from 0.3 to 0.8`."""
        return f"from {number(self.start)} to {number(self.now)}"


def judge(history: History, recipe: Mapping[str, Any]) -> list[Check]:
    """The checks that apply to what was logged. `recipe` is a resolved one, as plain data."""
    found = [check(history, recipe) for check in CHECKS]
    return [check for check in found if check is not None]


def _reward(history: History, recipe: Mapping[str, Any]) -> Check | None:
    del recipe
    reward = history.trend("reward")
    if reward is None:
        return None
    if reward.change < -SURE:
        return Check("reward", "bad", reward.now, f"The reward fell {reward.words}: the run unlearns what it is for.")
    how = "rose" if reward.change > LIKELY else "hardly moved,"
    return Check("reward", "ok", reward.now, f"The reward {how} {reward.words}.")


def _signal(history: History, recipe: Mapping[str, Any]) -> Check | None:
    del recipe
    share = history.now("frac_reward_zero_std")
    if share is None:
        return None
    learnt = _rises(history)
    verdict = _beyond(share, watch=0.5, bad=2.0 if learnt else 0.9)
    text = f"In {_percent(share)} of the prompts all answers have the same reward, so nothing is learnt from them"
    after = {
        "ok": ".",
        "watch": "; the reward has risen, so most of the task may be learnt." if learnt else ": half the work is lost.",
        "bad": ": there is hardly any signal.",
    }
    return Check("groups without signal", verdict, share, text + after[verdict])


def _parts(history: History, recipe: Mapping[str, Any]) -> Check | None:
    weights = {_reward_name(entry): float(entry.get("weight", 1.0)) for entry in recipe.get("rewards", [])}
    reward = history.trend("reward")
    trends = {name: trend for name in weights if (trend := history.trend(f"rewards/{name}/mean")) is not None}
    if reward is None or len(trends) < 2:
        return None
    worse = {name: trend.change if weights[name] < 0 else -trend.change for name, trend in trends.items()}
    against = {name: trend for name, trend in trends.items() if worse[name] > SURE}
    if not against or not _rises(history):
        return Check("reward against its parts", "ok", 0, "No part of the reward is being traded for another.")
    scales = {name: history.trend(f"rewards/{name}/std") for name in against}
    far = any((scale := scales[n]) is not None and abs(t.now - t.start) > scale.start for n, t in against.items())
    told = ", ".join(f"{name} went {trend.words}" for name, trend in against.items())
    text = f"The reward rose {reward.words} while {told}: one part is bought with another."
    return Check("reward against its parts", "bad" if far else "watch", len(against), text)


def _unscored(history: History, recipe: Mapping[str, Any]) -> Check | None:
    """A reward with a `when` leaves rows out by design, so that only more of them than at the start count."""
    routed = {_reward_name(entry) for entry in recipe.get("rewards", []) if entry.get("when") is not None}
    shares: dict[str, float] = {}
    for metric in history.names():
        share = history.now(metric) if metric.startswith("rewards/") and metric.endswith("/invalid") else None
        if share is not None:
            name, trend = metric.removeprefix("rewards/").removesuffix("/invalid"), history.trend(metric)
            usual = 0.0 if name not in routed else share if trend is None else trend.start
            shares[name] = share - usual
    if not shares:
        return None
    name, share = max(shares.items(), key=lambda item: item[1])
    more = " more answers than at the start" if name in routed else " of the answers"
    text = f"The reward {name} has no score for {_percent(share)}{more}."
    if share <= 0:
        text = "Every answer that a reward is for has a score."
    return Check("unscored answers", _beyond(share, watch=0.1, bad=0.5), max(share, 0.0), text)


def _clipping(history: History, recipe: Mapping[str, Any]) -> Check | None:
    sides = [history.now(f"clip_ratio/{side}_mean") for side in ("low", "high")]
    both = None if None in sides else fsum(side for side in sides if side is not None)
    found = (history.now("clip_ratio/region_mean"), history.now("policy/clipfrac_avg"), both)
    share = next((share for share in found if share is not None), None)
    if share is None:
        return None
    by_sequence = recipe.get("algorithm", {}).get("ratio", "token") != "token"
    repeated = recipe.get("train", {}).get("epochs_per_round", 1)
    if share == 0 and repeated > 1 and history.count >= WINDOW:
        text = f"Nothing is ever clipped, although each answer is used {repeated} times: the steps hardly do anything."
        return Check("clipped tokens", "watch", share, text)
    verdict = _beyond(share, watch=0.3 if by_sequence else 0.2, bad=0.5)
    text = f"{_percent(share)} of the tokens are clipped"
    text += ": the policy runs ahead of the answers it learns from." if verdict != "ok" else "."
    return Check("clipped tokens", verdict, share, text)


def _critic(history: History, recipe: Mapping[str, Any]) -> Check | None:
    """Not before it has had time to learn."""
    del recipe
    explained = history.now("val/explained_variance")
    if explained is None or history.count < 2 * WINDOW:
        return None
    verdict = _beyond(-explained, watch=-0.3, bad=0.0)
    text = f"The value estimates explain {_percent(explained)} of how the returns differ"
    text += {"ok": ".", "watch": ": they hardly help.", "bad": ": they do harm."}[verdict]
    return Check("value estimates", verdict, explained, text)


def _divergence(history: History, recipe: Mapping[str, Any]) -> Check | None:
    """Summed over an answer; methods without rewards use the name `kl` for other things."""
    del recipe
    reward = history.now("reward")
    nats, per_token, length = (history.now(name) for name in ("objective/kl", "kl", "completions/mean_length"))
    if nats is None and per_token is not None and length is not None:
        nats = per_token * length
    if reward is None or nats is None:
        return None
    verdict = _beyond(nats, watch=30.0, bad=50.0)
    why = "and the reward does not rise"
    if _rises(history):
        why = "a reward that rises so far out is usually a deceived one"
    text = f"An answer is {number(nats)} nats away from the reference" + ("." if verdict == "ok" else f": {why}.")
    return Check("divergence from the reference", verdict, nats, text)


def _entropy(history: History, recipe: Mapping[str, Any]) -> Check | None:
    """Of a model that samples what it learns from: of given answers it may well fall to nothing."""
    del recipe
    entropy = history.trend("entropy")
    if entropy is None or history.now("reward") is None or entropy.start <= 0:
        return None
    left = entropy.now / entropy.start
    verdict = _beyond(-left, watch=-0.3, bad=-0.1)
    text = f"The entropy of a token went {entropy.words} nats, {_percent(left)} of the start"
    text += ": the samples become alike." if verdict != "ok" else "."
    return Check("entropy", verdict, left, text)


def _phrases(history: History, recipe: Mapping[str, Any]) -> Check | None:
    del recipe
    distinct = history.trend("completions/distinct_trigrams")
    if distinct is None or distinct.start <= 0:
        return None
    left = distinct.now / distinct.start
    verdict = _beyond(-left, watch=-0.7, bad=-0.5)
    text = f"The share of three-token phrases that are new went {distinct.words}"
    text += ": answers repeat themselves or each other." if verdict != "ok" else "."
    return Check("distinct phrases", verdict, left, text)


def _length(history: History, recipe: Mapping[str, Any]) -> Check | None:
    del recipe
    length = history.trend("completions/mean_length")
    if length is None or history.trend("reward") is None or length.start <= 0:
        return None
    grown = length.now / length.start
    verdict, why = _beyond(-grown, watch=-0.5, bad=-0.25), "answers wither"
    if grown >= 1:
        verdict = "ok" if _rises(history) else _beyond(grown, watch=1.5, bad=2.5)
        why = "longer, and no better"
    text = f"The mean length went {length.words} tokens" + (f": {why}." if verdict != "ok" else ".")
    return Check("length of answers", verdict, grown, text)


def _truncated(history: History, recipe: Mapping[str, Any]) -> Check | None:
    del recipe
    share, trend = history.now("completions/clipped_ratio"), history.trend("completions/clipped_ratio")
    if share is None:
        return None
    more = trend is not None and trend.change > LIKELY and trend.now - trend.start > 0.1
    verdict = _beyond(share, watch=0.1, bad=0.3 if more else 2.0)
    text = f"{_percent(share)} of the answers are cut off at the length limit"
    text += ", more than at the start." if more else "."
    return Check("truncated answers", verdict, share, text)


def _sampler(history: History, recipe: Mapping[str, Any]) -> Check | None:
    del recipe
    mean, most = (history.now(f"sampling/sampling_logp_difference/{how}") for how in ("mean", "max"))
    if mean is None:
        return None
    verdict = _beyond(mean, watch=0.05, bad=0.2)
    text = f"The sampler's log-probabilities differ from the trainer's by {number(mean)} nats a token"
    text += f", {number(most)} at most" if most is not None else ""
    text += ": it is another model that writes." if verdict == "bad" else "."
    return Check("sampler against trainer", verdict, mean, text)


def _chosen(history: History, recipe: Mapping[str, Any]) -> Check | None:
    del recipe
    chosen = history.trend("logps/chosen")
    if chosen is None or chosen.start >= 0:
        return None
    lost = (chosen.start - chosen.now) / -chosen.start if chosen.change < -LIKELY else 0.0
    verdict = _beyond(lost, watch=0.2, bad=0.5)
    text = f"The log-probability of chosen answers went {chosen.words} nats"
    text += ": what is preferred becomes less likely too." if verdict != "ok" else "."
    return Check("chosen answers", verdict, lost, text)


def _judge(history: History, recipe: Mapping[str, Any]) -> Check | None:
    """By held-out labels where there are some, else by the round before."""
    del recipe
    for metric, does in (
        ("drift/judge_accuracy", "is right about {} of the held-out pairs"),
        ("drift/agreement", "agrees with that of the round before about {}"),
    ):
        found = _values(history.rounds, metric)
        if len(found) > 1:
            lost = max(found) - found[-1]
            verdict = _beyond(lost, watch=0.05, bad=0.15)
            text = f"The judge {does.format(_percent(found[-1]))}, {_percent(max(found))} at its best"
            text += ": what it likes is no longer what is good." if verdict != "ok" else "."
            return Check("judge", verdict, found[-1], text)
    return None


CHECKS = (
    *(_reward, _signal, _parts, _unscored, _clipping, _critic, _divergence, _entropy, _phrases, _length, _truncated),
    *(_sampler, _chosen, _judge),
)
"""`check(history, recipe)` each; None where it does not apply."""


def _rises(history: History) -> bool:
    """Whether the reward is higher than at the start."""
    reward = history.trend("reward")
    return reward is not None and reward.change > LIKELY


def _beyond(value: float, *, watch: float, bad: float) -> Verdict:
    """bad above `bad`, watch above `watch`, else ok."""
    return "bad" if value > bad else "watch" if value > watch else "ok"


def _values(records: Iterable[Record], name: str) -> list[float]:
    return [float(record[name]) for record in records if name in record]


def _error(values: Sequence[float], mean: float) -> float:
    """The squared standard error of a mean."""
    return fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)


def _percent(share: float) -> str:
    return f"{number(round(100 * share, 1))} %"


def _reward_name(entry: Mapping[str, Any]) -> str:
    """The name under which a reward is logged: its label, or `exact` for `my_package.rewards:exact`."""
    return str(entry.get("label") or entry["name"]).rpartition(":")[2]
