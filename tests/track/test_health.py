"""Made-up runs: healthy ones raise no alarm on any seed, each sick one the alarm of its sickness and no other."""

import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignkit.track.console import ConsoleSink
from alignkit.track.health import CHECKS, Check, History, judge
from alignkit.track.report import write_report
from tests.track.fake_run import eval_record, make_run, train_record, write_lines

STEPS = 60
RECIPE = {
    "algorithm": {"name": "grpo", "ratio": "token"},
    "train": {"epochs_per_round": 2},
    "rewards": [{"name": "rewards:right", "weight": 1.0}, {"name": "length", "weight": -0.1}],
}
PAGE = Path(__file__).parents[2] / "docs" / "health.md"
Record = dict[str, Any]
Change = Callable[[Record, float], None]


def record(step: int, share: float, draw: random.Random) -> Record:
    """A step of a run that does well; `share` of the way is behind it."""
    noise = draw.gauss
    return {
        "step": step,
        "reward": 0.3 + 0.5 * share + noise(0, 0.05),
        "reward_std": 0.3,
        "frac_reward_zero_std": 0.2 + 0.2 * share + noise(0, 0.05),
        "rewards/right/mean": 0.35 + 0.5 * share + noise(0, 0.05),
        "rewards/right/std": 0.3,
        "rewards/right/invalid": abs(noise(0, 0.01)),
        "rewards/length/mean": 0.5 + noise(0, 0.05),
        "rewards/length/std": 0.1,
        "rewards/length/invalid": 0.0,
        "clip_ratio/region_mean": 0.1 + noise(0, 0.01),
        "val/explained_variance": min(0.6, 2 * share) + noise(0, 0.05),
        "kl": 0.1 * share + abs(noise(0, 0.01)),
        "entropy": 2.5 - 1.5 * share + noise(0, 0.1),
        "completions/mean_length": 60 + 20 * share + noise(0, 5),
        "completions/clipped_ratio": 0.05 + abs(noise(0, 0.01)),
        "completions/distinct_trigrams": 0.9 - 0.1 * share + noise(0, 0.02),
        "sampling/sampling_logp_difference/mean": 1e-6,
        "sampling/sampling_logp_difference/max": 1e-5,
    }


def made(seed: int = 0, steps: int = STEPS, change: Change = lambda _, share: None) -> list[Record]:
    draw, records = random.Random(seed), []
    for step in range(1, steps + 1):
        share = step / steps
        records.append(record(step, share, draw))
        change(records[-1], share)
    return records


def alarms(records: list[Record], recipe: dict[str, Any] = RECIPE) -> dict[str, str]:
    return {check.name: check.verdict for check in judge(History(records), recipe) if check.verdict != "ok"}


@pytest.mark.parametrize("steps", [5, 14, 15, 30, 300])
def test_healthy_runs_raise_no_alarm(steps: int) -> None:
    for seed in range(20):
        assert alarms(made(seed, steps)) == {}, seed


def test_every_check_has_something_to_say_of_a_run_that_logs_all() -> None:
    said = judge(History(made(change=ALL)), RECIPE)
    assert len(said) == len(CHECKS)
    assert all(check.text.endswith(".") for check in said)


def put(**values: Callable[[float], float]) -> Change:
    names = {name.replace("__", "/"): function for name, function in values.items()}
    return lambda record, share: record.update({name: function(share) for name, function in names.items()})


ALL = put(logps__chosen=lambda s: -100 - s, round=lambda s: s, drift__judge_accuracy=lambda _: 0.8)
FLAT = put(reward=lambda _: 0.3, rewards__right__mean=lambda _: 0.35)


def both(*changes: Change) -> Change:
    def change(record: Record, share: float) -> None:
        for one in changes:
            one(record, share)

    return change


SICK: list[tuple[str, Change, dict[str, str]]] = [
    ("unlearns", put(reward=lambda s: 0.6 - 0.3 * s), {"reward": "bad"}),
    ("half lost", both(FLAT, put(frac_reward_zero_std=lambda _: 0.7)), {"groups without signal": "watch"}),
    ("no signal", both(FLAT, put(frac_reward_zero_std=lambda _: 0.97)), {"groups without signal": "bad"}),
    ("learnt", put(frac_reward_zero_std=lambda s: s), {"groups without signal": "watch"}),
    ("traded", put(rewards__right__mean=lambda s: 0.4 - 0.2 * s), {"reward against its parts": "watch"}),
    ("sold", put(rewards__right__mean=lambda s: 0.6 - 0.6 * s), {"reward against its parts": "bad"}),
    ("dearer", put(rewards__length__mean=lambda s: 0.5 + s), {"reward against its parts": "bad"}),
    ("silent", put(rewards__right__invalid=lambda _: 0.2), {"unscored answers": "watch"}),
    ("mute", put(rewards__right__invalid=lambda _: 0.6), {"unscored answers": "bad"}),
    ("ahead", put(clip_ratio__region_mean=lambda _: 0.25), {"clipped tokens": "watch"}),
    ("far ahead", put(clip_ratio__region_mean=lambda _: 0.6), {"clipped tokens": "bad"}),
    ("asleep", put(clip_ratio__region_mean=lambda _: 0.0), {"clipped tokens": "watch"}),
    ("no help", put(val__explained_variance=lambda _: 0.1), {"value estimates": "watch"}),
    ("harm", put(val__explained_variance=lambda _: -0.5), {"value estimates": "bad"}),
    ("far", put(objective__kl=lambda s: 45 * s), {"divergence from the reference": "watch"}),
    ("deceived", put(kl=lambda s: 1.5 * s), {"divergence from the reference": "bad"}),
    ("alike", put(entropy=lambda s: 2.5 - 2.1 * s), {"entropy": "watch"}),
    ("collapsed", put(entropy=lambda s: 2.5 * 0.01**s), {"entropy": "bad"}),
    ("stutters", put(completions__distinct_trigrams=lambda s: 0.9 - 0.4 * s), {"distinct phrases": "watch"}),
    ("one phrase", put(completions__distinct_trigrams=lambda s: 0.9 - 0.8 * s), {"distinct phrases": "bad"}),
    ("longer", both(FLAT, put(completions__mean_length=lambda s: 60 + 60 * s)), {"length of answers": "watch"}),
    ("endless", both(FLAT, put(completions__mean_length=lambda s: 60 + 180 * s)), {"length of answers": "bad"}),
    ("shorter", put(completions__mean_length=lambda s: 60 - 40 * s), {"length of answers": "watch"}),
    ("nothing", put(completions__mean_length=lambda s: 60 - 58 * s), {"length of answers": "bad"}),
    ("cut", put(completions__clipped_ratio=lambda _: 0.9), {"truncated answers": "watch"}),
    ("runs on", put(completions__clipped_ratio=lambda s: 0.8 * s), {"truncated answers": "bad"}),
    ("rounded", put(sampling__sampling_logp_difference__mean=lambda _: 0.1), {"sampler against trainer": "watch"}),
    ("stale", put(sampling__sampling_logp_difference__mean=lambda _: 0.4), {"sampler against trainer": "bad"}),
    ("sinks", put(logps__chosen=lambda s: -100 - 40 * s), {"chosen answers": "watch"}),
    ("sunk", put(logps__chosen=lambda s: -100 - 90 * s), {"chosen answers": "bad"}),
    ("strays", put(round=lambda s: s, drift__judge_accuracy=lambda s: 0.8 - 0.1 * s), {"judge": "watch"}),
    ("lost", put(round=lambda s: s, drift__judge_accuracy=lambda s: 0.8 - 0.2 * s), {"judge": "bad"}),
    ("turns", put(round=lambda s: s, drift__agreement=lambda s: 0.9 - 0.1 * s), {"judge": "watch"}),
]


@pytest.mark.parametrize(("change", "expected"), [case[1:] for case in SICK], ids=[case[0] for case in SICK])
def test_a_sick_run_raises_its_alarm_and_no_other(change: Change, expected: dict[str, str]) -> None:
    assert alarms(made(change=change)) == expected


def test_longer_answers_are_welcome_while_the_reward_rises() -> None:
    assert alarms(made(change=put(completions__mean_length=lambda s: 60 + 300 * s, kl=lambda _: 0.01))) == {}


def test_the_recipe_tells_what_is_usual() -> None:
    quarter = made(change=put(clip_ratio__region_mean=lambda _: 0.25))
    assert alarms(quarter, {**RECIPE, "algorithm": {"name": "gspo", "ratio": "sequence"}}) == {}
    never = made(change=put(clip_ratio__region_mean=lambda _: 0.0))
    assert alarms(never, {**RECIPE, "train": {"epochs_per_round": 1}}) == {}
    routed = {**RECIPE, "rewards": [{"name": "right", "weight": 1.0, "when": "maths"}]}
    assert alarms(made(change=put(rewards__right__invalid=lambda _: 0.7)), routed) == {}
    more = made(change=put(rewards__right__invalid=lambda s: 0.5 + 0.4 * s))
    assert alarms(more, routed) == {"unscored answers": "watch"}


@pytest.mark.parametrize(
    "logged", [{"clip_ratio/low_mean": 0.15, "clip_ratio/high_mean": 0.15}, {"policy/clipfrac_avg": 0.3}]
)
def test_clipping_has_other_names_too(logged: Record) -> None:
    def renamed(record: Record, share: float) -> None:
        del record["clip_ratio/region_mean"]
        record.update(logged)

    found = {check.name: check for check in judge(History(made(change=renamed)), RECIPE)}
    assert found["clipped tokens"].value == pytest.approx(0.3)
    assert found["clipped tokens"].verdict == "watch"


def test_numbers_and_words_by_hand() -> None:
    records = [{"step": step, "reward": 1.0, "entropy": 4.0 if step <= 5 else 1.0} for step in range(1, 16)]
    records.insert(4, {"step": 4, "eval_reward": 0.0, "eval_entropy": 99.0})
    (reward, entropy) = judge(History(records), {})
    assert reward == Check("reward", "ok", 1.0, "The reward hardly moved, from 1 to 1.")
    text = "The entropy of a token went from 4 to 1 nats, 25 % of the start: the samples become alike."
    assert entropy == Check("entropy", "watch", 0.25, text)
    assert entropy.link == "docs/health.md#entropy"


def test_a_trifle_is_no_change_even_where_nothing_scatters() -> None:
    def fall(depth: float) -> list[Record]:
        return [{"step": step, "reward": 1.0 if step <= 15 else 1.0 - depth} for step in range(1, 31)]

    assert alarms(fall(0.003)) == {}
    assert alarms(fall(0.005)) == {"reward": "bad"}  # four thousandths are the bound
    assert alarms([{"step": step, "reward": float(step <= 15) - 1} for step in range(1, 31)]) == {"reward": "bad"}


def test_what_is_not_logged_or_too_short_is_not_judged() -> None:
    assert judge(History(made(steps=4)), RECIPE) == [], "four records are too few"
    assert judge(History([{"step": 1, "loss": 0.7, "kl": 400.0, "entropy": 2.0}] * 40), {}) == []
    (chosen,) = judge(History([train_record(step) for step in range(1, 31)]), {})
    assert (chosen.name, chosen.verdict) == ("chosen answers", "ok")


def test_every_check_is_explained_and_every_explanation_is_of_one() -> None:
    checks = judge(History(made(change=ALL)), RECIPE)
    titles = re.findall(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [title.lower() for title in titles] == [check.name for check in checks]
    anchors = {f"docs/health.md#{re.sub(r'[^a-z -]', '', title.lower()).replace(' ', '-')}" for title in titles}
    assert {check.link for check in checks} == anchors


def watched(facts: dict[str, Any], records: list[Record], **options: bool) -> list[str]:
    """What the console says of health."""
    out = io.StringIO()
    sink = ConsoleSink(Console(file=out, width=80), **options)
    sink.start(facts)
    for one in records:
        sink.log(one)
    sink.close()
    return [line for line in out.getvalue().splitlines() if line.startswith("health")]


def collapse(record: Record, share: float) -> None:
    record["entropy"] = 0.2 if 0.5 < share <= 0.75 else 2.0


def test_the_console_says_what_changed_and_all_of_it_at_the_end(facts: dict[str, Any]) -> None:
    facts = {**facts, "recipe": RECIPE, "total_steps": STEPS}
    said = watched(facts, [*made(change=collapse), eval_record(STEPS)])
    changes, panel = said[:2], said[2:]
    # Ten records of 0.2 nats at step 40, five at step 50, none at step 60; the start had 2.
    entropy = "The entropy of a token went from 2 to 0.2 nats, 10 % of the start: the samples become alike."
    assert changes[0] == f"health  step 40/60  entropy: watch, was ok.  {entropy} docs/health.md#entropy"
    assert changes[1].startswith("health  step 50/60  entropy: ok, was watch.")
    assert [line.split()[1] for line in panel] == ["ok"] * (len(CHECKS) - 2)  # no chosen answers, no rounds


def test_a_quiet_console_says_nothing_of_it(facts: dict[str, Any]) -> None:
    assert watched({**facts, "recipe": RECIPE}, made(change=collapse), quiet=True) == []


def test_a_resumed_run_remembers_its_start_and_says_only_what_is_new(facts: dict[str, Any], tmp_path: Path) -> None:
    records = made(change=put(entropy=lambda s: 2.5 if s < 0.4 else 0.5))
    write_lines(tmp_path / "metrics.jsonl", records[:40])
    resumed = {**facts, "recipe": RECIPE, "total_steps": STEPS, "start_step": 40, "resumed": True}
    said = watched(resumed, records[40:])
    assert not any(line.startswith("health  step") for line in said)
    assert any(line.startswith("health  watch  entropy") for line in said)


def test_the_report_has_the_panel_where_a_check_applies(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "recipe.resolved.yaml").write_text(json.dumps(RECIPE), encoding="utf-8")
    write_lines(folder / "metrics.jsonl", made(change=put(entropy=lambda s: 2.5 * 0.01**s)))
    page = write_report([folder]).read_text()
    row = re.search(r'<th scope="row">entropy</th>(.*?)</tr>', page)
    assert row is not None
    verdict, value, text, link = re.findall(r"<td>(.*?)</td>", row.group(1))
    assert (verdict, link) == ("bad", "docs/health.md#entropy")
    assert float(value) == pytest.approx(0.0215, abs=1e-3)  # 0.01 ** (50 / 60): the ends are 50 steps apart
    assert text.startswith("The entropy of a token went from")
    write_lines(folder / "metrics.jsonl", [{"step": 1, "loss": 0.7}])
    assert "<h2>Health</h2>" not in write_report([folder]).read_text()
