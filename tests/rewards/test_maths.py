"""Answers in mathematics: where they stand, and when they are the same."""

import gzip
import json
import subprocess
import time

import pytest

from alignkit.core.errors import EnvironmentProblem
from alignkit.rewards import maths
from alignkit.rewards.maths import MathEqual, MathEqualConfig, Verifier, extract_answer, math_equal
from tests.rewards.test_rules import answers
from tests.shared import shared_path

SYMBOLIC_EQUAL = [
    (r"2\sqrt{2}", r"\sqrt{8}"),
    ("(1, 2)", "(1,2)"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
]
SYMBOLIC_DIFFERENT = [(r"\sqrt{2}", r"\sqrt{3}"), ("(1,2)", "(2,1)"), ("x+1", "x-1"), ("12", "1,2")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{\frac{3}{4}} holds", r"\frac{3}{4}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        ("12 apples\n#### 42", "42"),
        ("is 12. … #### 42\nthe end 7", "42"),
        ("<answer>\n5 </answer> 7", "5"),
        ("The answer is 3.5. It was 4.", "3.5"),
        ("Answer is: x = 3", "x = 3"),
        ("The answer is $18 per day.", "18"),
        ("the answer is 2 and 3", "2 and 3"),
        ("5 * 2 = 10 and 13 - 3 = $10 a day", "10"),
        ("A: 1,234,567", "1,234,567"),
        ("candidates: 1,2", "2"),
        ("-1.8 billion", "-1.8"),
        ("16-3", "3"),
        ("it is .5", ".5"),
        ("1/5 of it", "1/5"),
        (r"about 50\% more", r"50\%"),
        ("<think>\\boxed{1}</think> it is 2", "2"),
        ("none", None),
        ("", None),
        (r"\boxed{}", None),
    ],
)
def test_the_last_answer_counts(text, expected):
    assert extract_answer(text) == expected


def test_one_place_can_be_asked_for():
    text = r"\boxed{1} <answer>2</answer> 3 #### 4"
    found = {how: extract_answer(text, how) for how in ("boxed", "tag", "hash", "last_number")}
    assert found == {"boxed": "1", "tag": "2", "hash": "4", "last_number": "4"}
    assert extract_answer("the answer is 5", "boxed") is None


EQUAL = [
    ("1,000", "1000"),
    ("1000", "1000.0"),
    (r"\frac{1}{2}", "0.5"),
    ("0.5", r"50\%"),
    (r"\dfrac12", "1/2"),
    ("x=3", "3"),
    ("1 1/2", "1.5"),
    (r"2\frac{3}{4}", "2.75"),
    ("-1/3", r"-\frac{1}{3}"),
    ("+7", "7."),
    (r"\$18", "18"),
    (r"90^\circ", "90"),
    (r"5\text{ cm}", "5"),
    (r"\text{blue}", "blue"),
    ("1.5e3", r"1.5 \times 10^{3}"),
    ("1500", "1.5e3"),
    (r"\left(1, 2\right)", "(1,2)"),
    ("−3", "-3"),
]
DIFFERENT = [
    ("12", "1,2"),
    ("1/3", "0.33"),
    ("1/3", "0.333333"),
    ("-3", "3"),
    (r"50\%", "50"),
    ("1 1/2", "11/2"),
    ("1/0", "0"),
    ("", ""),
    ("9" * 400, "8" * 400),
    ("1e999", "2e999"),
]


@pytest.mark.parametrize(("left", "right"), EQUAL)
def test_plain_answers_that_are_equal(left, right):
    assert math_equal(left, right)
    assert math_equal(right, left)
    assert math_equal(left, left)


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_plain_answers_that_differ(left, right):
    assert not math_equal(left, right)
    assert not math_equal(right, left)


def test_tolerance_is_asked_for():
    assert math_equal("1/3", "0.333", tolerance=1e-2)
    assert not math_equal("1/3", "0.3", tolerance=1e-2)


def test_what_no_step_can_read_is_asked_about_once():
    asked = []
    assert math_equal("x+1", "1 + x", symbolic=lambda a, b: asked.append((a, b)) is None)
    assert asked == [("x+1", "1+x")]
    assert not math_equal("1/3", "0.3", symbolic=lambda a, b: True)


def plain(**keys):
    return MathEqual(MathEqualConfig(symbolic=False, **keys))


def test_scores_without_symbols():
    given = ["#### 18", "It is 17", "", "no", "18"]
    assert answers(plain(), *given, answer=["18", "18", "18", "18", None]) == [1.0, 0.0, 0.0, 0.0, None]
    assert answers(plain(partial_format=0.1), "17", "no", answer=["18", "18"]) == [pytest.approx(0.1), 0.0]
    assert answers(plain(column="solution"), "18", solution=["9 * 2 = 18\n#### 18"]) == [1.0]


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("alignkit.rewards.extras.importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"'math_equal' needs math-verify.*pip install 'alignkit\[rewards\]'"):
        MathEqual(MathEqualConfig())


class Child:
    """A process in the verifier's place that says it is ready and then runs this."""

    def __init__(self, monkeypatch, script):
        start = subprocess.Popen

        def popen(command, **keys):
            self.started += 1
            return start([command[0], "-c", f"import sys, time\nprint('ready', flush=True)\n{script}"], **keys)

        self.started = 0
        monkeypatch.setattr(maths.subprocess, "Popen", popen)


@pytest.mark.parametrize("script", ["time.sleep(60)", "sys.stdin.readline()"], ids=["hangs", "ends"])
def test_a_verifier_that_does_not_answer_is_replaced(monkeypatch, script):
    child, verifier = Child(monkeypatch, script), Verifier(0.3)
    started = time.monotonic()
    assert not verifier.equal("x", "y")
    assert not verifier.equal("x", "y")
    assert child.started == 2
    assert time.monotonic() - started < 20


def test_a_verifier_is_kept_for_the_next_answer(monkeypatch):
    child = Child(monkeypatch, "for line in sys.stdin: print('true', flush=True)")
    verifier = Verifier(5.0)
    assert [verifier.equal("x", "y") for _ in range(3)] == [True] * 3
    assert child.started == 1


def test_a_verifier_that_does_not_start_is_the_machines_fault(monkeypatch):
    start = subprocess.Popen
    monkeypatch.setattr(maths.subprocess, "Popen", lambda command, **keys: start([command[0], "-c", "pass"], **keys))
    with pytest.raises(EnvironmentProblem, match="math-verify does not start"):
        Verifier(1.0).equal("x", "y")


@pytest.fixture(scope="module")
def symbolic():
    pytest.importorskip("math_verify")
    return Verifier(30.0).equal


def test_symbols_that_are_equal(symbolic):
    assert [pair for pair in SYMBOLIC_EQUAL + EQUAL if not math_equal(*pair, symbolic=symbolic)] == []
    assert [pair for pair in SYMBOLIC_EQUAL if not math_equal(*pair[::-1], symbolic=symbolic)] == []


def test_symbols_that_differ(symbolic):
    pairs = SYMBOLIC_DIFFERENT + [pair for pair in DIFFERENT if pair[0]]
    assert [pair for pair in pairs if math_equal(*pair, symbolic=symbolic)] == []


def test_towers_of_powers_end_in_time():
    pytest.importorskip("math_verify")
    source = MathEqual(MathEqualConfig(timeout_s=1.0))
    started = time.monotonic()
    assert answers(source, r"\boxed{9^{9^{9^9}}}", r"\boxed{x+1}", answer=["y", "1+x"])[0] == 0.0
    assert time.monotonic() - started < 60


def lines(name):
    with gzip.open(shared_path("data", "gsm8k", name), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_real_solutions_are_judged_as_their_labels_say():
    found = lines("model_solutions.jsonl.gz")
    started = time.process_time()
    scores = answers(plain(), *[row["completion"] for row in found], answer=[row["answer"] for row in found])
    seconds = time.process_time() - started
    agreed = sum(bool(score) == row["label"] for score, row in zip(scores, found, strict=True))
    assert agreed / len(found) >= 0.995
    assert len(found) / seconds > 2000


def test_every_right_solution_scores_one():
    found = lines("train.jsonl.gz") + lines("test_shared.jsonl.gz")
    texts = [f"{row['solution']}\n#### {row['answer']}" for row in found]
    assert set(answers(plain(), *texts, answer=[row["answer"] for row in found])) == {1.0}
