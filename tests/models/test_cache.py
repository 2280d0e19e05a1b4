"""Reference log-probabilities on disk: found again for the same model and rows, and never for others."""

import gc
import io
import json
import shutil
import weakref

import pytest
import torch
from rich.console import Console
from safetensors.torch import load, load_file, save, save_file
from transformers import AutoTokenizer

from alignkit.core.types import Row
from alignkit.data.collate import collate
from alignkit.dist.world import LocalWorld
from alignkit.models.cache import LogpsCache
from alignkit.run import train
from alignkit.testing import comparable_metrics, digest
from tests.models.workshop import Workshop, assembled

FOUND, SCORED = "found in", "scoring 10 rows once"


def no_bar(chunks, title):
    return chunks


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """The folder of an empty cache."""
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "logps"


@pytest.fixture
def forwards(monkeypatch):
    """Counts the reference's forwards."""
    from alignkit.models.roster import FrozenModel

    calls = []
    original = FrozenModel.holding
    monkeypatch.setattr(FrozenModel, "holding", lambda *a: calls.append(1) or original(*a))
    return calls


def said(recipe) -> str:
    """What precomputing prints."""
    run = assembled(recipe)
    run.close()
    console = Console(record=True, width=400, file=io.StringIO())
    run.precompute(console)
    return console.export_text()


def test_second_run_reads_what_the_first_one_scored(workshop, own_cache, forwards):
    first = train(workshop.recipe("one"), quiet=True, report=False)
    assert len(list(own_cache.glob("*.safetensors"))) == 1
    scored = len(forwards)
    assert scored > 0
    second = train(workshop.recipe("two"), quiet=True, report=False)
    assert len(forwards) == scored
    assert digest(first.folder) == digest(second.folder)
    assert FOUND in said(workshop.recipe("three"))


def test_only_rows_that_the_run_will_meet_are_scored(workshop, own_cache):
    recipe = workshop.recipe("short", train={"max_steps": 1, "batch_size": 2})
    assert "scoring 4 rows once" in said(recipe)
    train(recipe, quiet=True, report=False)
    assert len(list(own_cache.glob("*.safetensors"))) == 1


def nudge_a_weight(workshop: Workshop) -> dict:
    path = workshop.model / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    return {}


def write_a_template(workshop: Workshop) -> dict:
    """For rows of text a template changes nothing; as messages they are other tokens."""
    text = workshop.data.read_text()
    for name in ("prompt", "chosen", "rejected"):
        role = "user" if name == "prompt" else "assistant"
        rows = [json.loads(line) for line in text.splitlines()]
        text = "".join(json.dumps({**row, name: [{"role": role, "content": row[name]}]}) + "\n" for row in rows)
    workshop.data.write_text(text)
    tokenizer = AutoTokenizer.from_pretrained(workshop.model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(workshop.model)
    return {}


CHANGES = {
    "weight": nudge_a_weight,
    "template": write_a_template,
    "dtype": lambda _: {"model": {"dtype": "bfloat16"}},
    "attention": lambda _: {"model": {"attn_implementation": "eager"}},
    "max_length": lambda _: {"train": {"max_length": 16}, "data": [{"overlong": "cut", "max_bad_fraction": 1}]},
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_whatever_changes_the_numbers_misses_the_cache(tmp_path, own_cache, change):
    workshop = Workshop(tmp_path)
    assert SCORED in said(workshop.recipe("before"))
    assert FOUND in said(workshop.recipe("same"))
    blocks = CHANGES[change](workshop)
    if "data" in blocks:
        blocks["data"] = [{"path": str(workshop.data), **blocks["data"][0]}]
    text = said(workshop.recipe("after", **blocks))
    assert FOUND not in text
    assert "scoring" in text


def test_corrupted_file_is_scored_again_and_repaired(workshop, own_cache, forwards):
    said(workshop.recipe("whole"))
    (path,) = own_cache.glob("*.safetensors")
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-36] ^= 1  # in the last number: the 32 bytes behind it are the checksum
    tensors = load(good)
    del tensors["checksum"]
    for bad in (good[:-20], b"", b"\xff" * 64, bytes(flipped), save(tensors)):
        path.write_bytes(bad)
        forwards.clear()
        assert SCORED in said(workshop.recipe("bad"))
        assert forwards
        assert path.read_bytes() == good


def test_folder_that_cannot_be_written_costs_only_the_next_run(workshop, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("where a folder should be")
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "file"))
    text = said(workshop.recipe("unkept"))
    assert SCORED in text
    assert "were not kept in" in text
    result = train(workshop.recipe("unkept-run"), quiet=True, report=False)
    assert result.steps == 3


def test_results_do_not_depend_on_precomputing(workshop, own_cache):
    runs = {}
    for on in (True, False):
        models = {"reference": {"from": "policy", "precompute": on}}
        runs[on] = train(workshop.recipe(f"precompute-{on}", models=models), quiet=True, report=False).folder
    first, second = (comparable_metrics(runs[on]) for on in (True, False))
    assert len(first) == len(second) == 3
    for a, b in zip(first, second, strict=True):
        a.pop("rewards/accuracies"), b.pop("rewards/accuracies")  # at step 1 rewards are equal up to rounding
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


def test_another_model_can_be_the_reference(tmp_path, own_cache):
    """Then the first loss is not ln 2, cached or not, and equal both ways."""
    workshop = Workshop(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(workshop.model, other)
    nudge = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    nudge = {n: w + 0.05 * torch.randn(w.shape, generator=generator) for n, w in nudge.items()}
    save_file(nudge, other / "model.safetensors", metadata={"format": "pt"})
    losses = []
    for on in (True, False):
        models = {"reference": {"from": str(other), "precompute": on}}
        run = train(workshop.recipe(f"other-{on}", models=models), quiet=True, report=False).folder
        losses.append(comparable_metrics(run)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert abs(losses[0] - 0.693147) > 1e-3


def test_reference_leaves_memory_after_precomputing(workshop, own_cache, monkeypatch):
    from alignkit import assemble_models as module

    made = []
    original = module.load_policy
    monkeypatch.setattr(module, "load_policy", lambda *a: made.append(original(*a)) or made[-1])
    run = assembled(workshop.recipe("memory"))
    run.close()
    run.precompute(Console(quiet=True))
    assert len(made) == 1  # the reference
    alive = weakref.ref(made.pop())
    gc.collect()
    assert alive() is None
    batch = collate(run.trainer.algorithm.build(run.groups))
    assert run.trainer.roster.fill(batch, {"reference.logps"})["reference.logps"].abs().sum() > 0
    assert not made  # found without loading it again


def whole_batch(batch, max_tokens):
    assert max_tokens > 0
    return [list(range(batch.num_units))]


def test_rows_are_told_apart_by_their_mask(tmp_path):
    """The same tokens with other trained ones have other numbers to keep."""
    cache = LogpsCache("model", LocalWorld(), tmp_path)
    tokens = [5, 6, 7, 8]
    half, whole = Row(tokens, [False, False, True, True]), Row(tokens, [False, True, True, True])
    cache.fill(
        [(half,), (whole,)],
        lambda batch: -batch.inputs["tokens"].float() * batch["mask"],
        whole_batch,
        lambda _: None,
        no_bar,
    )
    found = cache.lookup(collate([(whole,), (half,)]))
    assert found.tolist() == [[0, -6, -7, -8], [0, 0, -7, -8]]
    assert cache.lookup(collate([(Row([5, 6], [False, True]),)])) is None


def test_cached_numbers_are_read_back_bit_for_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = [(Row([1, *range(i, i + n)], [False] + [True] * n),) for i, n in ((3, 5), (9, 1), (20, 3))]

    def score(batch):
        return torch.randn(batch["mask"].shape, generator=generator)

    first, second = (LogpsCache("model", LocalWorld(), tmp_path) for _ in range(2))
    first.fill(rows, score, whole_batch, lambda _: None, no_bar)
    second.fill(rows, lambda batch: pytest.fail("scored again"), whole_batch, lambda _: None, no_bar)
    batch = collate(rows)
    assert torch.equal(first.lookup(batch), second.lookup(batch))
    other = LogpsCache("another model", LocalWorld(), tmp_path)
    with pytest.raises(pytest.fail.Exception):
        other.fill(rows, lambda batch: pytest.fail("scored again"), whole_batch, lambda _: None, no_bar)
