"""Rewards over HTTP, from a server in a thread of this process."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from alignkit.core.errors import EnvironmentProblem, RecipeError, RunFailed
from alignkit.rewards.config import RewardConfig
from alignkit.rewards.endpoint import Http, HttpConfig
from alignkit.rewards.pipeline import build_sources, score_groups
from tests.rewards.test_pipeline import groups, rewards
from tests.rewards.test_rules import batch


class Server:
    """Answers every post with what `answer(body)` returns: (status, text), and remembers what it was sent."""

    def __init__(self):
        self.requests, self.headers = [], []
        self.answer = lambda body: (200, json.dumps({"scores": [float(len(t)) for t in body["completions"]]}))
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(body)
                server.headers.append(dict(self.headers))
                status, text = server.answer(body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # a client that has left is part of a test
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


def test_completions_columns_and_step_are_sent_in_batches(server):
    source = Http(HttpConfig(url=server.url, columns=["answer"], batch_size=2))
    output = source.score(batch("a", "bb", "ccc", answer=[7, 8, 9], other=[0, 0, 0]), None)
    assert output.score.tolist() == [1.0, 2.0, 3.0]
    assert source.requires == ("answer",)
    assert server.requests == [
        {
            "prompts": [[{"role": "user", "content": "p"}]] * len(texts),
            "completions": texts,
            "columns": {"answer": answers},
            "step": 0,
        }
        for texts, answers in ((["a", "bb"], [7, 8]), (["ccc"], [9]))
    ]


def test_null_is_not_valid_and_components_are_kept(server):
    server.answer = lambda body: (200, '{"scores": [1, null], "components": {"style": [0.5, 0]}}')
    output = Http(HttpConfig(url=server.url)).score(batch("a", "b"), None)
    assert output.valid.tolist() == [True, False]
    assert output.components["style"].tolist() == [0.5, 0.0]


def test_openrlhfs_protocol(server):
    server.answer = lambda body: (200, json.dumps({"rewards": [len(q) for q in body["query"]]}))
    source = Http(HttpConfig(url=server.url, protocol="openrlhf", columns=["label"]))
    assert source.score(batch("ab", "c", label=["x", "y"]), None).score.tolist() == [3.0, 2.0]
    assert server.requests == [{"query": ["pab", "pc"], "prompts": ["p", "p"], "labels": ["x", "y"]}]


def test_the_token_comes_from_the_environment(server, monkeypatch):
    with pytest.raises(EnvironmentProblem, match="'REWARD_TOKEN', and there is no such environment variable"):
        Http(HttpConfig(url=server.url, token_env="REWARD_TOKEN"))
    monkeypatch.setenv("REWARD_TOKEN", "abc")
    Http(HttpConfig(url=server.url, token_env="REWARD_TOKEN")).score(batch("a"), None)
    assert server.headers[0]["Authorization"] == "Bearer abc"


@pytest.mark.parametrize(
    ("status", "text", "message"),
    [
        (500, "out of memory", r"answered 500 .*'out of memory'"),
        (404, "", r"answered 404"),
        (200, "<html>", r"answered '<html>', which is no JSON"),
        (200, "[1, 2]", r"answered \[1, 2\]; expected an object with 'scores'"),
        (200, '{"scores": [1]}', r"'http' returned 1 values for 2 completions"),
        (200, '{"scores": [1, NaN]}', r"'http' returned nan for row 1 \(completion 'bb'\)"),
        (200, '{"scores": [1, "x"]}', r"'http' returned 'x' for row 1"),
        (200, '{"scores": [1, 2], "components": {"a": [1]}}', r"returned 1 values"),
    ],
)
def test_answers_that_are_none(server, status, text, message):
    server.answer = lambda body: (status, text)
    with pytest.raises(RunFailed, match=message):
        Http(HttpConfig(url=server.url)).score(batch("a", "bb"), None)


def source(url, **keys):
    return build_sources([RewardConfig(name="http", args={"url": url, "timeout_s": 0.5}, **keys)])


def test_a_server_that_recovers_is_asked_again(server, monkeypatch):
    monkeypatch.setattr("alignkit.rewards.calls.MAX_PAUSE", 0.01)
    left = [(503, "busy"), (200, '{"scores": [1, 2, 3]}')]
    server.answer = lambda body: left.pop(0)
    scored = groups()
    score_groups(scored, source(server.url, retries=1), 0, stop_ids=[])
    assert rewards(scored) == [[1.0, 2.0], [3.0]]


def test_a_server_that_hangs_is_late(server):
    hold = threading.Event()
    server.answer = lambda body: (200, json.dumps({"scores": [hold.wait(5)] * 3}))
    with pytest.raises(RunFailed, match=r"'http' failed with OSError: http://127.0.0.1.* within 0.5 s.*timed out"):
        score_groups(groups(), source(server.url), 0, stop_ids=[])
    hold.set()


def test_a_server_that_is_not_there(server):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(RunFailed, match=r"'http' failed with OSError: .*refused"):
        score_groups(groups(), source(server.url), 0, stop_ids=[])


def test_what_is_no_address_is_refused():
    with pytest.raises(RecipeError, match=r"'http': args.url"):
        source("file:///etc/passwd")
