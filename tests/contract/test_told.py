"""A run says how it computes: on the console, in run.lock, and hence in its report; and why, where it fell back."""

import json

import pytest

from alignkit.run import train
from alignkit.testing import Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench("dpo", folder=tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({}, "rows packed without padding, shared prompts once; log-probabilities in chunks"),
        ({"layout": "packed"}, "rows packed without padding; log-probabilities in chunks"),
        ({"layout": "padded"}, "padded rows; whole logits"),
        (
            {"attn_implementation": "eager"},
            "padded rows; log-probabilities in chunks (fallback, because model.attn_implementation: eager works on "
            "rows)",
        ),
    ],
    ids=["auto", "packed", "padded", "fallback"],
)
def test_the_way_is_told(bench, model, said, request, capsys):
    recipe = bench.recipe(request.node.callspec.id, model=model, max_steps=1)
    result = train(recipe)
    assert f"computed with {said}" in capsys.readouterr().out.splitlines()
    assert json.loads((result.folder / "run.lock").read_text(encoding="utf-8"))["computation"] == said
    assert said in result.report.read_text(encoding="utf-8")
