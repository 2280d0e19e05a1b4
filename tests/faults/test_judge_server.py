"""Runs whose judge is behind a server of OpenAI's protocol: it judges as a function would, or fails."""

import json

import pytest

from alignkit.core.errors import EnvironmentProblem, RecipeError, RunFailed
from alignkit.recipe import load_recipe
from alignkit.run import resume, train
from alignkit.testing import Bench, comparable_metrics, digest, read_metrics
from tests.chat_server import HTML, WRONG_SHAPE, ChatServer, error

pytestmark = pytest.mark.xdist_group("faults-judge")


def answer_in(prompt):
    """What stands between the marks of the template."""
    return prompt.partition("<<answer>>\n")[2].rpartition("\n<<end of answer>>")[0]


def grade(prompt):
    """One point, and one for each capital letter; nobody gets more than ten."""
    return str(min(10, 1 + sum(letter.isupper() for letter in answer_in(prompt))))


def by_rule(completions, **columns):
    """The same as a reward function."""
    return [float(min(10, 1 + sum(letter.isupper() for letter in text))) for text in completions]


@pytest.fixture
def bench(tmp_path):
    return Bench("online_dpo", folder=tmp_path)


def recipe(bench, run, server=None, **model):
    """Four steps of seven prompts, judged by the server, else by the rule."""
    made = json.loads(bench.recipe(run, max_steps=4, num_epochs=4).model_dump_json(by_alias=True))
    made["rewards"] = [{"name": f"{__name__}:by_rule", "label": "judge"}]
    if server is not None:
        made["rewards"] = [{"name": "judge", "args": {"model": "judge", "mode": "rating", "max_tokens": 8}}]
        made["models"] = {"judge": {"endpoint": server.url, "timeout": 20.0, "retries": 2, **model}}
    return load_recipe(made)


@pytest.fixture
def whole(bench):
    """The run that nothing happens to."""
    with ChatServer(grade) as server:
        return train(recipe(bench, "whole", server), quiet=True, report=False).folder


def test_it_judges_as_a_function_does(bench, whole):
    told = train(recipe(bench, "rule"), quiet=True, report=False).folder
    assert digest(whole) == digest(told)
    records = read_metrics(whole)
    assert len(records) == 4
    assert all(record["rewards/judge/votes"] == 1 and record["rewards/judge/invalid"] == 0 for record in records)


def test_hiccups_change_nothing(bench, whole):
    with ChatServer(grade) as server:
        server.faults = [error(500), error(429, Retry_After="0"), HTML, error(503)]
        found = train(recipe(bench, "hiccups", server), quiet=True, report=False).folder
    assert digest(found) == digest(whole)
    assert comparable_metrics(found) == comparable_metrics(whole)


@pytest.mark.parametrize(
    ("faults", "problem", "said"),
    [
        (
            [error(500, "out of memory")] * 99,
            EnvironmentProblem,
            "did not answer 3 times, at last: 500 .*out of memory",
        ),
        ([WRONG_SHAPE] * 99, RunFailed, "expected a chat completion"),
        ([error(401, "no key")] * 99, EnvironmentProblem, "models.judge.token_env"),
    ],
)
def test_one_that_fails_for_good_ends_the_run_and_loses_nothing(bench, whole, faults, problem, said):
    server = ChatServer(grade).__enter__()
    first = len([record for record in read_metrics(whole) if "reward" in record])
    assert first == 4

    def fail_after_two_rounds(prompt):
        if len(server.requests) == 2 * 28:  # seven prompts with four answers each
            server.faults = list(faults)
        return grade(prompt)

    server.answer = fail_after_two_rounds
    with pytest.raises(problem, match=said):
        train(recipe(bench, "broken", server, max_requests=1), quiet=True, report=False)
    server.faults, server.answer = [], grade
    folder = bench.folder / "broken"
    assert (folder / "checkpoint-2").is_dir()
    resume(folder, quiet=True, report=False)
    server.stop()
    assert digest(folder) == digest(whole)


def test_one_that_nobody_named_is_refused_before_anything_is_trained(bench):
    """A copy of the start model must not judge in its place."""
    made = json.loads(bench.recipe("unnamed", max_steps=4).model_dump_json(by_alias=True))
    made["rewards"] = [{"name": "judge", "args": {"model": "jury", "mode": "rating", "max_tokens": 8}}]
    with pytest.raises(RecipeError, match=r"asks a model 'jury', which nothing says where to find; there are "):
        train(load_recipe(made), quiet=True, report=False)


def test_one_that_is_gone_is_named(bench):
    server = ChatServer(grade)
    server.__enter__()
    made = recipe(bench, "gone", server, retries=1)
    server.stop()
    with pytest.raises(EnvironmentProblem, match=r"did not answer 2 times, at last: ConnectionRefusedError.*resume"):
        train(made, quiet=True, report=False)


def test_one_that_is_slow_is_waited_for_as_long_as_the_recipe_says(bench):
    with ChatServer(grade) as server:
        server.delay = 1.0
        with pytest.raises(EnvironmentProblem, match=r"no answer within 0.2 s.*timeout"):
            train(recipe(bench, "slow", server, timeout=0.2, retries=0), quiet=True, report=False)


def test_words_that_are_no_grade_are_counted_and_left_out(bench):
    """Every third judgement is nonsense: no pair is made of such an answer."""
    with ChatServer(lambda prompt: grade(prompt) if len(answer_in(prompt)) % 3 else "well …") as server:
        found = train(recipe(bench, "mumbling", server), quiet=True, report=False).folder
    records = read_metrics(found)
    assert 0 < max(record["rewards/judge/invalid"] for record in records) < 1
