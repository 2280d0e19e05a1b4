"""`report.html`: what a run, or several side by side, did, told from the run folder alone.

The page needs no network and no scripts, and equal folders give equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from alignkit.core.errors import RecipeError
from alignkit.track.folder import Curve, RunFolder, WinRate, better, read_run
from alignkit.track.health import History, judge
from alignkit.track.page import details, note, page, section, table
from alignkit.track.plots import Line, draw
from alignkit.track.rounds import rounds_section
from alignkit.track.samples import sample_win_rate, samples_after, samples_before_after
from alignkit.track.text import flatten, number

PANELS: dict[str, tuple[str, ...]] = {
    "Loss": ("loss",),
    "Implicit rewards": ("rewards/chosen", "rewards/rejected"),
    "Reward margin": ("rewards/margins",),
    "Preference accuracy": ("rewards/accuracies", "rewards/length_accuracies"),
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
    rate = sample_win_rate(run)
    body = [
        f"<h1>{escape(run.name)}</h1>",
        note(f"aligned with {run.algorithm}"),
        f'<p class="verdict">{escape(verdict(run, rate))}</p>',
        *([note(best_weights(run.best))] if run.best is not None else []),
        *_health(run),
        *rounds_section(run),
        section("Departures from the defaults", _departures(run)),
        section("Key numbers", _key_numbers(run)),
        section("Curves", _curves({"": run})),
        section("Samples before and after", samples_before_after(run, rate)),
        section("Data", _data(run)),
        section("Environment", _environment(run)),
        _recipe(run),
    ]
    return page(f"{run.name} · {run.algorithm}", "\n".join(body))


def _comparison(runs: Sequence[RunFolder]) -> str:
    named = _distinct_names(runs)
    verdicts = "".join(
        f"<li><strong>{escape(name)}</strong> ({escape(run.algorithm)}): "
        f"{escape(verdict(run, sample_win_rate(run)))}</li>"
        for name, run in named.items()
    )
    title = f"Comparison of {len(runs)} runs"
    body = [
        f"<h1>{title}</h1>",
        f"<ul>{verdicts}</ul>",
        section("Settings that differ", _differing_settings(named)),
        section("Last numbers", _last_numbers(named)),
        section("Curves", _curves(named)),
        section("Samples after training", samples_after(named)),
        *(details(f"Environment of {name}", _environment(run)) for name, run in named.items()),
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
    if logged and run.recipe.get("eval", {}).get("opponent") == "chosen":
        parts.append(f"win rate {number(logged[-1][1])} against the data's chosen answers")
    elif rate is not None:
        parts.append(f"win rate {number(rate.rate)} against the samples before")
    elif logged:
        parts.append(f"win rate {number(logged[-1][1])}")
    return ", ".join(parts) or "Nothing was logged twice yet, so there is no change to report."


def best_weights(best: Mapping[str, Any]) -> str:
    """Which weights the folder `best` holds, of what best.json says."""
    found = f"Best {best['metric']} {number(best['value'])} at step {best['step']}"
    end = "where the run stopped early" if best["stopped_early"] else "where the run ended"
    if best["step"] == best["last_step"]:
        return f"{found}, {end}: best/ and this folder hold the same weights."
    return f"{found}: the weights are in best/. This folder holds those of step {best['last_step']}, {end}."


def _health(run: RunFolder) -> list[str]:
    """The panel; no section where no check applies."""
    checks = judge(History(run.records), run.recipe)
    rows = [[check.name, check.verdict, number(check.value), check.text, check.link] for check in checks]
    head = ["check", "verdict", "number", "what it says", "what to do"]
    caption = "Judged by the last ten records, and against the first ten where it is about a change."
    return [section("Health", table(head, rows, caption=caption))] if rows else []


def _departures(run: RunFolder) -> str:
    if run.departures is None:
        return note("departures.yaml is not in the folder, so what was set differently is not known.")
    if not run.departures:
        return note("None: every setting is the default.")
    return table(
        ["setting", "value"], flatten(run.departures), caption="Settings that differ from the method's defaults."
    )


def _environment(run: RunFolder) -> str:
    if not run.lock:
        return note("run.lock is not in the folder.")
    return table(["fact", "value"], flatten(run.lock), caption="What the run ran on, its data and its seed.")


def _data(run: RunFolder) -> str:
    if not run.data_report:
        return note("data_report.json is not in the folder.")
    tables = []
    for source in run.data_report:
        facts = flatten({name: value for name, value in source.items() if name != "path"})
        tables.append(
            table(["rows of", str(source["path"])], facts, caption="What became of the rows of a data source.")
        )
    return "\n".join(tables)


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


def _best(metric: str, curve: Curve, run: RunFolder) -> tuple[int, float] | None:
    """(step, value) of the best point, the earliest of equals; None where neither end of the scale is the good one."""
    direction = run.best["mode"] if run.best is not None and run.best["metric"] == metric else better(metric)
    if direction is None:
        return None
    choose: Callable[..., tuple[int, float]] = max if direction == "max" else min
    return choose(curve, key=lambda point: point[1])


def _key_numbers(run: RunFolder) -> str:
    rows = []
    for metric in _ordered_metrics([run]):
        for name, place in ((metric, "training"), (f"eval_{metric}", "held out")):
            if curve := run.curve(name):
                best = _best(name, curve, run)
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
