"""The report's samples: answers to the same prompt next to each other, and who scores higher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from alignkit.track.folder import RunFolder, WinRate, reward_of, win_rate
from alignkit.track.page import note
from alignkit.track.text import number

NUM_SAMPLES = 12


def sample_win_rate(run: RunFolder) -> WinRate | None:
    """The win rate of the last samples over the first ones; None where there are not two scored steps."""
    steps = run.sample_steps()
    return win_rate(run.samples_at(steps[0]), run.samples_at(steps[-1])) if len(steps) > 1 else None


def samples_before_after(run: RunFolder, rate: WinRate | None) -> str:
    """HTML of the first and the last samples of one run."""
    steps = run.sample_steps()
    if not steps:
        return note("samples.jsonl holds no samples. Set eval.num_samples in the recipe to draw some.")
    sides = {
        f"after step {step}" if step else "before training": run.samples_at(step)
        for step in sorted({steps[0], steps[-1]})
    }
    words = ""
    if rate is not None:
        words = note(
            f"The later sample scores higher on {rate.wins} prompts, equal on {rate.ties}, lower on {rate.losses}: "
            f"win rate {number(rate.rate)}, 95 % bootstrap interval {number(rate.low)} to {number(rate.high)} "
            "(a tie is half a win)."
        )
    return words + _sample_cards(sides)


def samples_after(named: Mapping[str, RunFolder]) -> str:
    """HTML of the last samples of several runs."""
    sides = {name: run.samples_at(run.sample_steps()[-1]) for name, run in named.items() if run.samples}
    return _sample_cards(sides) if sides else note("None of the runs drew samples.")


def _sample_cards(sides: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Prompts that every side answered, in file order, answers next to each other."""
    shared = [name for name in next(iter(sides.values())) if all(name in side for side in sides.values())]
    if not shared:
        return note("The samples answer different prompts, so they cannot be set side by side.")
    cards = []
    for name in shared[:NUM_SAMPLES]:
        answers = {label: side[name] for label, side in sides.items()}
        rewards = [reward for sample in answers.values() if (reward := reward_of(sample)) is not None]
        parts = "".join(_answer(label, sample, rewards) for label, sample in answers.items())
        prompt = escape(str(next(iter(answers.values()))["prompt"]))
        cards.append(
            f'<article class="sample"><div class="label">prompt</div><p class="text">{prompt}</p>'
            f'<div class="grid">{parts}</div></article>'
        )
    rest = len(shared) - NUM_SAMPLES
    more = note(f"{rest} further prompts are in samples.jsonl.") if rest > 0 else ""
    return "\n".join(cards) + more


def _answer(label: str, sample: Mapping[str, Any], rewards: Sequence[float]) -> str:
    """One answer with its scores; marked, in words and colour, when it scores best or worst of several."""
    reward, mark = reward_of(sample), ""
    if reward is not None and len(rewards) > 1 and min(rewards) < max(rewards):
        mark = "good" if reward == max(rewards) else "bad" if reward == min(rewards) else ""
    words = [
        label,
        *(f"{name} {number(value)}" for name, value in sample.get("scores", {}).items() if value is not None),
    ]
    words += [{"good": "scores higher", "bad": "scores lower"}[mark]] if mark else []
    return (
        f'<div class="answer {mark}"><div class="label">{escape(" · ".join(words))}</div>'
        f'<p class="text">{escape(str(sample["completion"]))}</p></div>'
    )
