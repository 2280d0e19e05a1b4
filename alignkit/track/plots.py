"""Curves as small SVG pictures that take the page's ink colour, so that they read by day and by night.

Equal data give equal bytes: no date, no random ids, no dependence on a user's matplotlib settings.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from alignkit.track.folder import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"
"""Stands for the page's text colour while matplotlib draws; no curve uses it."""
COLOURS = ("#2f7ed8", "#e0703a", "#2a9d6f", "#b3549e", "#b8901f", "#5b6bd6", "#4aa3a8", "#c4455c")


@dataclass(frozen=True)
class Line:
    """One curve: `train` is drawn as a line, `held_out` as marked points over it, both in the same colour."""

    label: str
    train: Curve
    held_out: Curve
    colour: int = 0
    dashed: bool = False


def draw(title: str, lines: list[Line]) -> str:
    """An `<svg>` element of the lines over optimizer steps."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_style(title))
        figure = Figure(figsize=(4.2, 2.7), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("step")
        axes.patch.set_visible(False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.ticklabel_format(useOffset=False)
        axes.grid(visible=True, alpha=0.15)
        for line in lines:
            _draw_line(axes, line)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False, fontsize=8)
        picture = io.StringIO()
        FigureCanvasSVG(figure).print_svg(
            picture, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return _embeddable(picture.getvalue(), describe(title, lines))


def describe(title: str, lines: list[Line]) -> str:
    """The picture in words, for those who do not see it."""
    parts = []
    for line in lines:
        for kind, curve in (("training", line.train), ("held-out", line.held_out)):
            if curve:
                (first, start), (last, end) = curve[0], curve[-1]
                parts.append(f"{line.label} ({kind}) from {start:.3g} at step {first} to {end:.3g} at step {last}")
    return f"{title}: " + "; ".join(parts)


def _draw_line(axes: Axes, line: Line) -> None:
    colour = COLOURS[line.colour % len(COLOURS)]
    style = "--" if line.dashed else "-"
    if line.train:
        axes.plot(*zip(*line.train, strict=True), color=colour, linestyle=style, linewidth=1.5, label=line.label)
    if line.held_out:
        label = f"{line.label}, held out"
        marker = "s" if line.dashed else "o"
        points = zip(*line.held_out, strict=True)
        axes.plot(*points, color=colour, linestyle=":", linewidth=1, marker=marker, markersize=4.5, label=label)


def _style(title: str) -> dict[str, object]:
    ink = (
        "text.color",
        "axes.labelcolor",
        "axes.edgecolor",
        "axes.titlecolor",
        "xtick.color",
        "ytick.color",
        "grid.color",
    )
    return {
        **dict.fromkeys(ink, INK),
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.family": "sans-serif",
        "font.size": 9,
    }


def _embeddable(document: str, alt: str) -> str:
    """The `<svg>` of a document: scalable, described, and free of ids that would clash with other pictures' ids."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"font-family: [^;]+;", "font-family: inherit;", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    opening = re.search(r'viewBox="[^"]+"', svg)
    assert opening is not None, "matplotlib writes a viewBox"
    body = svg[svg.index(">") + 1 :]
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {opening.group(0)} role="img" aria-label="{escape(alt)}">'
    return (head + body).replace(INK, "currentColor")
