"""How figures are judged and written down."""

import importlib.util
from pathlib import Path

import pytest

from tests.acceptance.bench import Bench, Figure, methods, passes

_spec = importlib.util.spec_from_file_location("acceptance", Path(__file__).parents[2] / "scripts" / "acceptance.py")
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)


def seeds(*values: float, start: float | None = None) -> list[Figure]:
    return [Figure("share", value, at_least=0.9, start=start) for value in values]


def test_the_median_decides_and_no_seed_may_fall_behind_the_start():
    assert passes(seeds(0.95, 0.2, 0.9))
    assert not passes(seeds(0.95, 0.2, 0.89))
    assert passes(seeds(0.95, 0.4, 0.9, start=0.4))
    assert not passes(seeds(0.95, 0.4, 0.9, start=0.5))


@pytest.mark.parametrize(("value", "good"), [(0.34, False), (0.35, True), (0.65, True), (0.66, False)])
def test_a_bound_may_have_two_sides(value, good):
    assert passes([Figure("share", value, at_least=0.35, at_most=0.65)]) is good


def test_a_figure_without_bound_is_reported_only():
    assert passes([Figure("valid", 0.0)])
    assert Figure("valid", 0.0).bound == "reported"
    assert script.table([0], [[Figure("valid", 0.0)]])[-1].endswith("| reported | – |")
    assert Figure("valid", 0.0, at_least=0.35, at_most=0.65).bound == "≥ 0.35, ≤ 0.65"


def test_methods_are_found_by_their_file():
    assert {"dpo", "sft"} <= set(methods())


def test_a_failed_run_is_shown_with_its_output(tmp_path):
    with pytest.raises(RuntimeError, match=r"exit code 2(.|\n)*algoritm"):
        Bench(tmp_path, 0).train("broken", {"algoritm": {"name": "sft"}})


def test_the_page_keeps_the_methods_that_did_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "PAGE", tmp_path / "acceptance.md")
    script.write_page({"sft": "old"})
    script.write_page({"dpo": "\n".join(script.table([0, 1, 2], [[figure] for figure in seeds(0.95, 0.2, 0.91)]))})
    script.write_page({"sft": "new"})
    page = (tmp_path / "acceptance.md").read_text()
    assert "| share | 0.950 | 0.200 | 0.910 | 0.910 | ≥ 0.9 | pass |" in page
    assert page.index("## dpo") < page.index("## sft\n\nnew\n")
    assert "old" not in page
    script.write_page({"sft": "new"})
    assert (tmp_path / "acceptance.md").read_text() == page
