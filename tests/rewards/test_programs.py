"""Programs that a model wrote: what passes, what is stopped, and what cannot be faked."""

import time

import pytest

from alignkit.core.errors import RunFailed
from alignkit.rewards.programs import CodeTests, CodeTestsConfig, program_in, read_tests, run_test
from tests.rewards.test_rules import answers

ADD = "def add(a, b):\n    return a + b\n"
MEMORY = 512 << 20


def passes(program, test, seconds=5):
    return run_test(program, test, seconds, MEMORY)


def allowed(**keys):
    return CodeTests(CodeTestsConfig(allow_execution=True, timeout_s=5, **keys))


def test_the_last_block_is_the_program():
    text = "<think>```python\nbad\n```</think>\n```\nfirst\n```\nthen\n```python\nprint(1)\n```\ndone"
    assert program_in(text) == "print(1)\n"
    assert program_in("print(1)") == "print(1)"
    assert program_in("```python\nx = 1") == "```python\nx = 1"


def test_nothing_runs_unless_it_is_allowed():
    """The same right program and test are worth 1 where running is allowed."""
    with pytest.warns(UserWarning, match="allow_execution: true"):
        source = CodeTests(CodeTestsConfig())
    tests = [[{"assert": "assert add(1, 2) == 3"}]]
    assert answers(source, ADD, tests=tests) == [None]
    assert answers(allowed(), ADD, tests=tests) == [1.0]


def test_asserts_are_counted():
    tests = [{"assert": "assert add(1, 2) == 3"}, {"assert": "assert add(1, 2) == 4"}]
    fenced = f"Here:\n```python\n{ADD}```"
    assert answers(allowed(), fenced, "no code", ADD, tests=[tests, tests, None]) == [0.5, 0.0, None]
    assert answers(allowed(scoring="all"), ADD, ADD, tests=[tests, tests[:1]]) == [0.0, 1.0]


def test_standard_streams_are_compared_line_by_line():
    program = "a, b = map(int, input().split())\nprint(a + b, '')\n"
    tests = [{"input": "1 2", "output": "3\n"}, {"input": "1 2", "output": "4"}]
    assert answers(allowed(), program, tests=[tests]) == [0.5]
    assert not passes("print(3)\nraise SystemExit(1)", {"stdin": "", "stdout": "3"})


def test_functions_are_called_with_lists_mappings_and_single_values():
    tests = [
        {"input": [1, 2], "output": 3},
        {"input": {"a": 1, "b": 2}, "output": 3},
        {"input": [1, 2], "output": 4},
    ]
    assert answers(allowed(entry_point="name"), ADD, tests=[tests], name=["add"]) == [pytest.approx(2 / 3)]
    both = "def both(x):\n    return (x, x)\n"
    assert answers(allowed(entry_point="name"), both, tests=[[{"input": 1, "output": [1, 1]}]], name=["both"]) == [1.0]


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "open('result', 'w').write('null')\nimport os; os._exit(0)",
        "def add(",
        "def add(a, b): return 3\nadd.__eq__ = None\nraise KeyboardInterrupt",
    ],
)
def test_leaving_early_is_not_passing(program):
    assert not passes(program, {"assert": "assert add(1, 2) == 3"})
    assert not passes(program, {"entry_point": "add", "positional": [1, 2], "named": {}, "value": 3})


def test_a_program_cannot_read_what_is_expected_of_a_call():
    peeks = "import json, pathlib\nseen = [p.name for p in pathlib.Path('.').iterdir()]\ndef add(a, b): return seen\n"
    job = {"entry_point": "add", "positional": [1, 2], "named": {}}
    assert passes(peeks, {**job, "value": ["stdin", "stdout"]}) or passes(peeks, {**job, "value": ["stdout", "stdin"]})


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"], ids=["busy", "idle"])
def test_time_is_limited(program):
    started = time.monotonic()
    assert not passes(program, {"stdin": "", "stdout": ""}, seconds=1)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(2 << 30)",
        "print('x' * (1 << 20))",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import os; os.kill(os.getppid(), 0)",
        "import ctypes; ctypes.CDLL(None)",
    ],
)
def test_what_a_program_may_not_do(program):
    wrapped = f"try:\n    {program}\nexcept BaseException as error:\n    print('refused')\n"
    found = passes(wrapped, {"stdin": "", "stdout": "refused"})
    assert found != (program.startswith("print"))  # too much output cannot be told in the output


def test_it_cannot_touch_files_of_others(tmp_path):
    file = tmp_path / "kept"
    file.write_text("mine")
    for change in (f"open({str(file)!r}, 'w')", f"os.remove({str(file)!r})", f"os.rename({str(file)!r}, 'x')"):
        assert not passes(f"import os\n{change}", {"stdin": "", "stdout": ""})
    assert file.read_text() == "mine"
    assert passes("open('own', 'w').write('1'); print(open('own').read())", {"stdin": "", "stdout": "1"})


def test_it_sees_no_environment(monkeypatch):
    monkeypatch.setenv("SOME_SECRET", "x")
    assert passes("import os; print('SOME_SECRET' in os.environ)", {"stdin": "", "stdout": "False"})


@pytest.mark.parametrize("tests", ["not json", [{"input": 1}], [3]])
def test_tests_that_are_none_name_their_row(tests):
    with pytest.raises(RunFailed, match=r"column 'tests' of row 0"):
        answers(allowed(), ADD, tests=[tests])


def test_tests_may_be_text():
    assert read_tests('[{"assert": "assert 1"}]', None, "'tests' of row 0") == [{"assert": "assert 1"}]
