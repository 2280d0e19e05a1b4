"""A judge behind a server, and every way in which a server can fail."""

from math import exp, log

import pytest

from alignkit.core.errors import EnvironmentProblem, RunFailed
from alignkit.models.config import RosterModelConfig
from alignkit.rollout.chat import ChatModel
from tests.chat_server import HTML, WRONG_SHAPE, ChatServer, error


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server():
    with ChatServer() as found:
        yield found


def client(server, pauses=None, **keys):
    """A judge of that server; pauses are noted and not waited for."""
    config = RosterModelConfig(endpoint=server.url, **keys)
    return ChatModel(config, "judge", sleep=[].append if pauses is None else pauses.append)


def ask(model, *prompts, n=1, temperature=0.0, stop=()):
    return model.generate(prompts, n, temperature, 7, stop)


def test_answers_come_in_the_order_of_prompts_and_so_many_at_a_time(server):
    server.delay = 0.02
    prompts = ["x" * length for length in (3, 1, 2, 9, 8)]
    assert ask(client(server, max_requests=2), *prompts) == [["3"], ["1"], ["2"], ["9"], ["8"]]
    assert server.most_at_once == 2
    assert sorted(server.requests, key=str)[0] == {
        "model": "judge",
        "messages": [{"role": "user", "content": "x"}],
        "temperature": 0.0,
        "max_tokens": 7,
    }


def test_draws_are_several_with_seeds_of_their_own(server):
    model = client(server, served_name="judge")
    assert ask(model, "a", "bb", n=2, temperature=0.7, stop=["."]) == [["1", "1"], ["2", "2"]]
    first = {body["seed"] for body in server.requests}
    assert len(first) == 4
    assert {tuple(body["stop"]) for body in server.requests} == {(".",)}
    ask(model, "a", "bb", n=2, temperature=0.7)
    assert {body["seed"] for body in server.requests} == first
    assert ask(model) == []


def test_identity_is_server_and_name(server):
    names = {client(server, served_name=name).identity() for name in ("big", "small", None)}
    assert len(names) == 3
    assert all(server.url in name for name in names)


def test_choices_add_up_what_is_one_word(server):
    server.likely = lambda prompt: {"1": log(0.2), " 1": log(0.3), "2": log(0.1), "\n": log(0.4)}
    ((one, two),) = client(server).choices(["p"], ["1", "2"])
    assert (exp(one), exp(two)) == pytest.approx((0.5, 0.1))
    (body,) = server.requests
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20)


def test_an_answer_that_is_not_among_the_likeliest_is_bounded_and_told_once(server):
    server.likely = lambda prompt: {"Yes": log(0.6), "Maybe": log(0.3)}
    model = client(server)
    with pytest.warns(UserWarning, match=r"models.judge: 1 of 2 answers .* not among the 20 likeliest") as told:
        found = model.choices(["p"], ["Yes", "No"]) + model.choices(["q"], ["Yes", "No"])
    assert [exp(logp) for row in found for logp in row] == pytest.approx([0.6, 0.3] * 2)
    assert len(told) == 1


def test_a_server_without_log_probabilities_is_no_judge_by_them(server):
    with pytest.raises(EnvironmentProblem, match=r"tells no log-probabilities. Give the judge `verdict: text`"):
        client(server).choices(["p"], ["1", "2"])
    assert len(server.requests) == 1


def test_errors_that_pass_are_waited_for_with_growing_pauses(server):
    server.faults = [error(500, "out of memory"), error(503), error(429, "slow down", Retry_After="7"), error(408)]
    pauses = []
    assert ask(client(server, pauses), "abc") == [["3"]]
    assert pauses == [0.5, 1.0, 7.0, 4.0]


def test_a_pause_asked_for_has_a_bound_and_may_be_a_date(server):
    server.faults = [error(429, Retry_After="86400"), error(429, Retry_After="Fri, 31 Dec 2027 23:59:59 GMT")]
    pauses = []
    ask(client(server, pauses), "abc")
    assert pauses == [30.0, 1.0]


def test_errors_that_stay_end_the_run(server):
    server.faults = [error(500, "out of memory")] * 3
    pauses = []
    with pytest.raises(EnvironmentProblem) as caught:
        ask(client(server, pauses, retries=2), "abc")
    assert str(caught.value).startswith(
        f"models.judge: the server at {server.url}/chat/completions did not answer 3 times, at last: 500 out of "
        "memory. Start it or look into its log"
    )
    assert (len(server.requests), pauses) == (3, [0.5, 1.0])


def test_a_server_that_is_not_there(server):
    server.stop()
    pauses = []
    with pytest.raises(EnvironmentProblem, match=r"did not answer 3 times, at last: ConnectionRefusedError"):
        ask(client(server, pauses, retries=2), "abc")
    assert pauses == [0.5, 1.0]


def test_a_server_that_is_slow(server):
    server.delay = 0.6
    with pytest.raises(
        EnvironmentProblem, match=r"2 times, at last: no answer within 0.1 s.*a longer models.judge.timeo"
    ):
        ask(client(server, retries=1, timeout=0.1), "abc")
    assert ask(client(server, timeout=5), "abc") == [["3"]]


@pytest.mark.parametrize(
    ("fault", "quoted"),
    [
        (HTML, "'<html>'"),
        (WRONG_SHAPE, r'{"choices": \[\]}'),
        ((200, b"[1]", {}), r"\[1\]"),
        ((200, b'{"choices": [{"message": {"content": 3}}]}', {}), '"content": 3'),
    ],
)
def test_malformed_answers_are_asked_for_once_more(server, fault, quoted):
    server.faults = [fault]
    assert ask(client(server, retries=0), "abc") == [["3"]]
    server.faults = [fault] * 2
    with pytest.raises(RunFailed, match=f"answered .*{quoted}.* twice; expected a chat completion"):
        ask(client(server, retries=0), "abc")
    assert len(server.requests) == 4


def test_log_probabilities_of_another_shape_are_malformed(server):
    server.faults = [(200, b'{"choices": [{"message": {}, "logprobs": {"content": [{"token": "1"}]}}]}', {})] * 2
    with pytest.raises(RunFailed, match="twice; expected a chat completion"):
        client(server).choices(["p"], ["1", "2"])


def test_an_answer_of_nothing_is_empty(server):
    server.faults = [(200, b'{"choices": [{"message": {"role": "assistant", "content": null}}]}', {})]
    assert ask(client(server), "abc") == [[""]]


def test_a_key_comes_from_the_environment(server, monkeypatch):
    server.api_key = "abc"
    with pytest.raises(EnvironmentProblem, match=r"refused with 401 Incorrect API key.* in models.judge.token_env"):
        ask(client(server), "p")
    assert len(server.requests) == 1
    with pytest.raises(EnvironmentProblem, match=r"models.judge.token_env names 'JUDGE_KEY', and there is no such"):
        client(server, token_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "abc")
    assert ask(client(server, token_env="JUDGE_KEY"), "p") == [["1"]]
    assert server.tokens[-1] == "Bearer abc"


def test_a_model_of_another_name(server):
    with pytest.raises(
        EnvironmentProblem, match=r"404 The model `big` does not exist.* asked for the model 'big'; say in"
    ):
        ask(client(server, served_name="big"), "p")


def test_a_refused_request_stops_the_others(server):
    server.faults = [error(400, "prompt is too long")]
    server.delay = 0.05
    with pytest.raises(RunFailed, match="refused with 400 prompt is too long"):
        ask(client(server, max_requests=1), *["p"] * 50)
    assert len(server.requests) == 1
