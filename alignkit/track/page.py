"""The pieces of the report page: one self-contained HTML file, readable on a phone, in the dark and without scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #5b6470; --paper: #fff; --card: #f5f7f9; --line: #d8dee4;
  --good: #1a7f4b; --bad: #b3362b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9aa5b1; --paper: #14181d; --card: #1d232a; --line: #353d47; --good: #5cc98d;
    --bad: #ef8a80; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.2rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { margin: 1.25rem 0 .5rem; font-size: 1rem; overflow-wrap: anywhere; }
p.soft, caption, summary, .label { color: var(--soft); }
p.verdict { font-size: 1.15rem; margin: .5rem 0 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; }
caption { text-align: left; padding-bottom: .35rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.1rem .3rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
th { font-weight: 600; }
caption, table.numbers th { white-space: nowrap; }
table.numbers td, table.numbers thead th + th { text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
.grid svg { width: 100%; height: auto; background: var(--card); border-radius: .5rem; padding: .4rem; }
.sample { background: var(--card); border-radius: .5rem; padding: .9rem 1rem; margin: 0 0 1rem; }
.sample .grid { margin-top: .7rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .15rem 0 0; }
.label { font-size: .82rem; }
.answer { border-left: 3px solid var(--line); padding-left: .7rem; }
.answer.good { border-color: var(--good); } .answer.bad { border-color: var(--bad); }
pre { overflow-x: auto; background: var(--card); padding: .8rem; border-radius: .5rem; font-size: .85rem; }
details { margin-top: 1rem; } summary { cursor: pointer; }
"""


def page(title: str, body: str) -> str:
    """A whole HTML document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, body: str) -> str:
    """A headed part of the page; `body` is HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def note(text: str) -> str:
    """A sentence that explains, or says why something is not here."""
    return f'<p class="soft">{escape(text)}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str, numbers: bool = False) -> str:
    """A table of plain texts, each row headed by its first cell. It scrolls sideways where the screen is narrow."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    style = ' class="numbers"' if numbers else ""
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table{style}><caption>{escape(caption)}</caption>\n'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def details(summary: str, body: str) -> str:
    """A part folded away until asked for; `body` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>"
