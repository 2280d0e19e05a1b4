"""`report.html`: what a run, or several side by side, did, told from the run folder alone.

The page needs no network and no scripts, and equal folders give equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from alignkit.core.errors import RecipeError
from alignkit.track.folder import Curve, RunFolder, WinRate, better, read_run, reward_of, win_rate
from alignkit.track.page import details, note, page, section, table
from alignkit.track.plots import Line, draw
from alignkit.track.text import flatten, number

NUM_SAMPLES = 12

PANELS: dict[str, tuple[str, ...]] = {
    "Loss": ("loss",),
    "Implicit rewards": ("rewards/chosen", "rewards/rejected"),
    "Reward margin": ("rewards/margins",),
    "Preference accuracy": ("rewards/accuracies",),
    "Win rate of samples": ("win_rate",),
    "Log-probabilities, nats": ("logps/chosen", "logps/rejected"),
    "Token accuracy": ("mean_token_accuracy",),
    "Reward": ("reward",),
    "Gradient norm": ("grad_norm",),
    "Learning rate": ("learning_rate",),
}
"""Title → metrics drawn together, first the ones a reader asks for. Other metrics get a panel each, after these."""

BOOKKEEPING = ("epoch", "num_tokens", "step_time", "total_flos")
"""Numbers about the run rather than about the model: not drawn, and only their last value is listed."""
BOOKKEEPING_PREFIXES = (
    "perf/",
    "memory/",
    "train_",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
)


def write_report(run_dirs: list[Path]) -> Path:
    """Write `report.html` into the first run folder and return its path; several runs are compared.

    Raises: RecipeError when there is no folder or one is no run, DataError when a file in it is damaged.
    """
    if not run_dirs:
        raise RecipeError("no run folder was named; expected at least one: alignkit report RUN [RUN ...]")
    runs = [read_run(Path(folder)) for folder in run_dirs]
    target = runs[0].path / "report.html"
    target.write_text(_one_run(runs[0]) if len(runs) == 1 else _comparison(runs), encoding="utf-8")
    return target


def _one_run(run: RunFolder) -> str:
    rate = _sample_win_rate(run)
    body = [
        f"<h1>{escape(run.name)}</h1>",
        note(f"aligned with {run.algorithm}"),
        f'<p class="verdict">{escape(verdict(run, rate))}</p>',
        section("Departures from the defaults", _departures(run)),
        section("Key numbers", _key_numbers(run)),
        section("Curves", _curves({"": run})),
        section("Samples before and after", _samples_before_after(run, rate)),
        section("Data", _facts(run.data_report, "What became of the rows of each data file.", "data_report.json")),
        section("Environment", _facts(run.lock, "What the run ran on, and its seeds.", "run.lock")),
        _recipe(run),
    ]
    return page(f"{run.name} · {run.algorithm}", "\n".join(body))


def _comparison(runs: Sequence[RunFolder]) -> str:
    named = _distinct_names(runs)
    verdicts = "".join(
        f"<li><strong>{escape(name)}</strong> ({escape(run.algorithm)}): "
        f"{escape(verdict(run, _sample_win_rate(run)))}</li>"
        for name, run in named.items()
    )
    title = f"Comparison of {len(runs)} runs"
    body = [
        f"<h1>{title}</h1>",
        f"<ul>{verdicts}</ul>",
        section("Settings that differ", _differing_settings(named)),
        section("Last numbers", _last_numbers(named)),
        section("Curves", _curves(named)),
        section("Samples after training", _samples_after(named)),
        *(details(f"Environment of {name}", _facts(run.lock, name, "run.lock")) for name, run in named.items()),
    ]
    return page(title, "\n".join(body))


def verdict(run: RunFolder, rate: WinRate | None) -> str:
    """The run in one line: what improved on rows it was not trained on, or in training where nothing was held out."""
    parts = []
    for prefix, place in (("eval_", "held-out "), ("", "training ")):
        for metric, word in (
            ("rewards/accuracies", "accuracy"),
            ("mean_token_accuracy", "token accuracy"),
            ("loss", "loss"),
        ):
            curve = run.curve(prefix + metric)
            if len(curve) > 1:
                parts.append(f"{place}{word} {number(curve[0][1])} → {number(curve[-1][1])}")
        if parts:
            break
    logged = run.curve("eval_win_rate")
    if rate is not None:
        parts.append(f"win rate {number(rate.rate)} against the samples before")
    elif logged:
        parts.append(f"win rate {number(logged[-1][1])}")
    return ", ".join(parts) or "Nothing was logged twice yet, so there is no change to report."


def _departures(run: RunFolder) -> str:
    if run.departures is None:
        return note("departures.yaml is not in the folder, so what was set differently is not known.")
    if not run.departures:
        return note("None: every setting is the default.")
    return table(
        ["setting", "value"], flatten(run.departures), caption="Settings that differ from the method's defaults."
    )


def _facts(facts: Any, caption: str, file: str) -> str:
    if not facts:
        return note(f"{file} is not in the folder.")
    return table(["", "value"], flatten(facts), caption=caption)


def _recipe(run: RunFolder) -> str:
    if not run.recipe_text:
        return note("recipe.resolved.yaml is not in the folder.")
    return details("The whole recipe", f"<pre>{escape(run.recipe_text)}</pre>")


def _is_bookkeeping(metric: str) -> bool:
    return metric in BOOKKEEPING or metric.startswith(BOOKKEEPING_PREFIXES)


def _ordered_metrics(runs: Sequence[RunFolder]) -> list[str]:
    """All metrics of the runs without the prefix of evaluations: those with a panel first, then as they appear."""
    logged = [name.removeprefix("eval_") for run in runs for name in run.metrics() if not _is_bookkeeping(name)]
    known = [metric for metrics in PANELS.values() for metric in metrics if metric in logged]
    return list(dict.fromkeys([*known, *logged]))


def _best(metric: str, curve: Curve) -> tuple[int, float] | None:
    """(step, value) of the best point, the earliest of equals; None where neither end of the scale is the good one."""
    direction = better(metric)
    if direction is None:
        return None
    choose: Callable[..., tuple[int, float]] = max if direction == "max" else min
    return choose(curve, key=lambda point: point[1])


def _key_numbers(run: RunFolder) -> str:
    rows = []
    for metric in _ordered_metrics([run]):
        for name, place in ((metric, "training"), (f"eval_{metric}", "held out")):
            if curve := run.curve(name):
                best = _best(name, curve)
                best_text = f"{number(best[1])} (step {best[0]})" if best else "–"
                rows.append([metric, place, number(curve[0][1]), number(curve[-1][1]), best_text])
    bookkeeping = filter(_is_bookkeeping, run.metrics())
    rows += [[metric, "run", "", number(run.curve(metric)[-1][1]), ""] for metric in bookkeeping]
    if not rows:
        return note("metrics.jsonl holds no numbers yet.")
    head = ["metric", "measured", "first", "last", "best"]
    return table(head, rows, caption="First, last and best logged value of each metric.", numbers=True)


def _curves(named: Mapping[str, RunFolder]) -> str:
    panels = dict(PANELS)
    shown = {metric for metrics in panels.values() for metric in metrics}
    panels.update({name: (name,) for name in _ordered_metrics(list(named.values())) if name not in shown})
    pictures = []
    for title, metrics in panels.items():
        lines = [line for line in _panel_lines(named, metrics) if line.train or line.held_out]
        if any(len(line.train) + len(line.held_out) > 1 for line in lines):
            pictures.append(draw(title, lines))
    if not pictures:
        return note("metrics.jsonl holds too few numbers to draw a curve.")
    words = note("Lines are training batches; marked points are held-out measurements.")
    return words + '\n<div class="grid">\n' + "\n".join(pictures) + "\n</div>"


def _panel_lines(named: Mapping[str, RunFolder], metrics: Sequence[str]) -> list[Line]:
    """One run: a colour a metric. Several: a colour a run, and the second metric dashed."""
    several = len(named) > 1
    return [
        Line(
            label=" ".join(part for part in (name, metric if len(metrics) > 1 or not several else "") if part),
            train=run.curve(metric),
            held_out=run.curve(f"eval_{metric}"),
            colour=run_index if several else metric_index,
            dashed=metric_index > 0,
        )
        for run_index, (name, run) in enumerate(named.items())
        for metric_index, metric in enumerate(metrics)
    ]


def _sample_win_rate(run: RunFolder) -> WinRate | None:
    steps = run.sample_steps()
    return win_rate(run.samples_at(steps[0]), run.samples_at(steps[-1])) if len(steps) > 1 else None


def _samples_before_after(run: RunFolder, rate: WinRate | None) -> str:
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


def _samples_after(named: Mapping[str, RunFolder]) -> str:
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


def _distinct_names(runs: Sequence[RunFolder]) -> dict[str, RunFolder]:
    """Runs by folder name, or by whole path where folder names clash."""
    names = [run.name for run in runs]
    return {run.name if names.count(run.name) == 1 else str(run.path): run for run in runs}


def _differing_settings(named: Mapping[str, RunFolder]) -> str:
    settings = {name: dict(flatten(run.recipe)) for name, run in named.items()}
    keys = dict.fromkeys(key for values in settings.values() for key in values if key != "output_dir")
    rows = [[key, *(values.get(key, "–") for values in settings.values())] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if not rows:
        return note("None: the recipes are the same.")
    return table(["setting", *named], rows, caption="Recipe settings that are not the same in all runs.")


def _last_numbers(named: Mapping[str, RunFolder]) -> str:
    rows = []
    for metric in _ordered_metrics(list(named.values())):
        for name, place in ((metric, "training"), (f"eval_{metric}", "held out")):
            curves = [run.curve(name) for run in named.values()]
            if any(curves):
                rows.append([f"{metric}, {place}", *(number(curve[-1][1]) if curve else "–" for curve in curves)])
    if not rows:
        return note("None of the runs logged a number yet.")
    return table(["metric", *named], rows, caption="The last logged value of each metric.", numbers=True)
