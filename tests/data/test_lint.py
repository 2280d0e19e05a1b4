"""Lint: every check finds what was planted and stays silent without it; its figures are those worked by hand."""

import json
import math
import random

import pytest

from alignkit.data.config import DataConfig
from alignkit.data.lint import CHECKS, NEAR, Neighbours, cohens_d, lint

WORDS = ["crab", "fish", "shore", "tide", "sand", "shell", "wave", "boat", "gull", "star", "moon", "reef", "kelp"]


def pair(i, **more):
    """A row that has nothing to do with any other, its two answers of one length."""
    draw = random.Random(i)
    prompt = " ".join(draw.choice(WORDS) for _ in range(12))
    return {"prompt": f"{prompt} {i}", "chosen": f"yes {i % 3 * 'x'}", "rejected": f"non {i % 3 * 'x'}", **more}


PAIRS = [pair(i) for i in range(20)]


@pytest.fixture
def look(tmp_path):
    """look(rows, held_out=, renderer=, max_length=) → findings by check."""

    def look(rows, held_out=None, renderer=None, max_length=None, **options):
        paths = []
        for name, some in (("rows.jsonl", rows), ("eval.jsonl", held_out)):
            path = tmp_path / name
            path.write_text("".join(json.dumps(row) + "\n" for row in some or []))
            paths.append(path)
        others = [DataConfig(path=str(paths[1]))] if held_out else []
        look.report = lint(DataConfig(path=str(paths[0]), **options), others, renderer, max_length)
        return {finding.check: finding for finding in look.report.findings}

    return look


def test_clean_rows_give_no_warning(look, make_renderer):
    found = look(PAIRS, held_out=[pair(i) for i in range(50, 60)], renderer=make_renderer(), max_length=200)
    assert [finding.check for finding in found.values() if finding.warning] == []
    assert look.report.lines()[0].endswith("20 rows as preference, 0 warnings")
    assert found["length bias"].numbers == {"cohens_d": 0.0, "longer_wins": 0.5}


@pytest.mark.parametrize(
    ("planted", "check", "example"),
    [
        ([PAIRS[3]], "duplicate rows", "line 21 as line 4"),
        ([{**PAIRS[3], "chosen": "other"}], "duplicate prompts", "line 21 as line 4"),
        ([{**PAIRS[3], "prompt": PAIRS[3]["prompt"].upper() + "!"}], "near-duplicate prompts", "line 21 near line 4"),
        (
            [{**PAIRS[3], "chosen": PAIRS[3]["rejected"], "rejected": PAIRS[3]["chosen"]}],
            "contradictions",
            "line 21 against line 4",
        ),
        ([pair(30, score_chosen=2, score_rejected=2.5)], "scores against order", "line 21: 2 and 2.5"),
        ([pair(30, chosen="same", rejected="same")], "unusable rows", "line 21"),
        ([pair(30, chosen=None, id="x")], "unusable rows", "line 21 (id x): no `chosen`"),
    ],
)
def test_each_fault_is_found_where_it_is(look, planted, check, example):
    finding = look(PAIRS + planted)[check]
    assert (finding.warning, finding.count, finding.examples) == (True, 1, [example])
    before = look(PAIRS).get(check)
    assert before is None or not before.warning


def test_unusable_rows_are_told_apart_by_reason(look):
    rows = [*PAIRS, pair(30, chosen=""), pair(31, chosen="a", rejected="a"), pair(32, chosen="b", rejected="b")]
    verdict = look(rows)["unusable rows"].verdict
    assert verdict.startswith("3 of 23 (13.0 %): 1 empty completion: ")
    assert "2 equal completions: equal answers hold no preference" in verdict


def test_truncation_as_a_run_would_do_it(look, make_renderer):
    rows = [*PAIRS, pair(30, prompt="one day " * 200), pair(31, chosen="one day " * 200)]
    found = look(rows, renderer=make_renderer(), max_length=90)
    assert found["truncated prompts"].examples == ["line 21"]
    assert found["overlong answers"].examples[0].startswith("line 22: ")
    assert not found["lost stop tokens"].warning
    found = look(rows, renderer=make_renderer(), max_length=90, overlong="cut")
    assert found["lost stop tokens"].examples == ["line 22"]
    assert not found["overlong answers"].warning
    assert "truncated prompts" not in look(rows, renderer=make_renderer())
    assert "truncated prompts" not in look(rows)


def labelled(count, true):
    return [{"prompt": pair(i)["prompt"], "completion": f"yes {i}", "label": i < true} for i in range(count)]


def test_label_imbalance(look):
    balanced, rare = look(labelled(20, 4))["label imbalance"], look(labelled(20, 3))["label imbalance"]
    assert (balanced.warning, balanced.numbers) == (False, {"share_true": 0.2})
    assert (rare.warning, rare.verdict.partition(":")[0]) == (True, "3 true, 17 false (15.0 % true)")
    assert look(labelled(20, 17))["label imbalance"].warning


def test_rows_of_one_answer_may_share_a_prompt_but_not_a_verdict(look):
    rows = labelled(20, 10)
    found = look([*rows, {**rows[0], "completion": "other"}, {**rows[1], "label": False}])
    assert "duplicate prompts" not in found
    assert found["near-duplicate prompts"].count == 0
    assert found["contradictions"].examples == ["line 22 against line 2"]


def test_length_bias_in_characters_and_tokens(look, make_renderer):
    rows = [pair(i, chosen="one day " * (4 + i % 3), rejected="one day " * (1 + i % 3)) for i in range(20)]
    found = look(rows)["length bias"]
    lengths = [8 * (i % 3) for i in range(20)]
    mean = sum(lengths) / 20
    spread = math.sqrt(sum((length - mean) ** 2 for length in lengths) / 19)
    assert found.numbers["cohens_d"] == pytest.approx(24 / spread)
    assert (found.warning, found.numbers["longer_wins"]) == (True, 1.0)
    assert "large: good answers have 40 characters, bad ones 16; the longer one wins 100 %" in found.verdict
    assert "tokens" in look(rows, renderer=make_renderer())["length bias"].verdict
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert look(turned)["length bias"].numbers["cohens_d"] == pytest.approx(-24 / spread)


def test_length_bias_of_lists_is_that_of_best_and_worst(look):
    rows = [{"prompt": f"{i} {WORDS[i]}", "completions": ["a" * 5, "b", "cccc"], "scores": [1, 3, 2]} for i in (1, 2)]
    assert look(rows)["length bias"].verdict.startswith("d = -inf, large: good answers have 1 characters, bad ones 5")
    assert json.loads(json.dumps(look.report.to_json()))["findings"][-1]["cohens_d"] is None


@pytest.mark.parametrize(
    ("first", "second", "d"),
    [
        ([2, 4], [1, 3], 1 / math.sqrt(2)),
        ([1, 2, 3], [1, 2, 3], 0.0),
        ([5, 5], [5, 5], 0.0),
        ([5, 5], [4, 4], math.inf),
        ([0, 2, 4, 6], [1, 3], 1 / math.sqrt((3 * 20 / 3 + 1 * 2) / 4)),
    ],
)
def test_cohens_d(first, second, d):
    assert cohens_d(first, second) == pytest.approx(d)


def test_overlap_with_the_evaluation_set_is_found_exact_and_near(look):
    near = {**PAIRS[5], "prompt": PAIRS[5]["prompt"] + "?"}
    finding = look(PAIRS, held_out=[PAIRS[2], near, pair(99)])["overlap with evaluation"]
    assert (finding.count, finding.total, finding.warning) == (2, 20, True)
    assert finding.examples[0].startswith("line 3 as ")
    assert finding.examples[0].endswith("eval.jsonl line 1")
    assert finding.examples[1].startswith("line 6 near ")
    assert "overlap with evaluation" not in look(PAIRS)


def jaccard(first, second):
    sets = [{tuple(words[i : i + 3]) for i in range(len(words) - 2)} for words in (first.split(), second.split())]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_neighbours_are_those_of_high_jaccard_similarity():
    draw = random.Random(0)
    found = missed = 0
    for _ in range(300):
        words = [draw.choice(WORDS) + str(draw.randrange(9)) for _ in range(60)]
        changed = list(words)
        for _ in range(draw.randrange(6)):
            changed[draw.randrange(60)] = "crab"
        index = Neighbours()
        index.add(" ".join(words), "here")
        is_near = jaccard(" ".join(words), " ".join(changed)) >= NEAR
        answer = index.find(" ".join(changed))
        assert is_near or answer is None
        found += is_near and answer == "here"
        missed += is_near and answer is None
    assert found > 100
    assert missed <= 0.03 * (found + missed)


def test_short_and_wordless_texts_have_neighbours_too():
    index = Neighbours()
    for text in ("Hi!", "…", "Good morning"):
        index.add(text, text)
    assert [index.find(text) for text in ("hi", "…", "good morning.", "Good evening")] == [
        "Hi!",
        "…",
        "Good morning",
        None,
    ]


def test_the_report_is_plain_json_and_names_known_checks(look):
    found = look([*PAIRS, PAIRS[0]], held_out=PAIRS[:1])
    assert set(found) <= set(CHECKS)
    said = json.loads(json.dumps(look.report.to_json()))
    assert (said["rows"], said["unit"], said["format"]) == (21, "characters", "preference")
    duplicate = said["findings"][1]
    assert (duplicate["check"], duplicate["count"], duplicate["of"]) == ("duplicate rows", 1, 21)
    assert any(line.startswith("  warning  duplicate rows") for line in look.report.lines())


def test_foreign_layouts_are_looked_at_too(look):
    rows = [
        {
            "conversations": [{"from": "human", "value": f"{i} hello"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": x,
        }
        for i, x in ((1, {"from": "gpt", "value": "b"}), (2, {"from": "sea", "value": "b"}))
    ]
    assert look(rows)["unusable rows"].examples[0].startswith("line 2: `rejected` has a turn from 'sea'")
    assert (look.report.format, look.report.layout) == ("preference", "sharegpt")
