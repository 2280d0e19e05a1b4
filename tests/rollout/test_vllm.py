"""The vLLM engine against the small server: what is asked for, weights by version, outages, refusals, several ranks."""

import math
import os
import re
import signal
import socket
import sys
import threading
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignkit import cli
from alignkit.core.errors import DataError, EnvironmentProblem, RunFailed
from alignkit.core.rng import key
from alignkit.core.types import Completion, Group
from alignkit.dist.world import LocalWorld
from alignkit.models.config import ModelConfig
from alignkit.rollout import vllm
from alignkit.rollout.config import RolloutConfig
from alignkit.rollout.draw import support_logps
from alignkit.rollout.native import NativeEngine
from alignkit.rollout.serve import serve
from alignkit.rollout.vllm import VllmEngine
from tests.rollout.vllm_server import Refused, VllmServer

STOP, CONTEXT = 4, 32
LETTERS = "".join(chr(ord("0") + i) for i in range(40))
PROMPTS = [[1, 7, 8], [1, 9], [1, 7, 8, 30, 31]]


@cache  # torch's seed is the process's, and some of these tests run on threads
def tiny(seed):
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=STOP,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()


def save(model, folder):
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token=LETTERS[0]))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The weights a server starts with, which no engine of these tests ever has."""
    folder = tmp_path_factory.mktemp("start")
    save(tiny(99), folder)
    return folder


@pytest.fixture
def server(start):
    with VllmServer(start) as running:
        yield running


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(vllm, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(vllm, "LONGEST_PAUSE", 0.1)


def groups():
    return [Group(f"row-{i}", [], list(prompt)) for i, prompt in enumerate(PROMPTS)]


class Run:
    """An engine, the policy it writes weights of, and what it said."""

    def __init__(self, server, folder, world=None, **config):
        self.policy, self.said, self.server = tiny(0), [], server
        config = {"url": server.url, "max_completion_length": 6, "deadline": 20.0, **config}
        self.engine = VllmEngine(
            RolloutConfig(engine="vllm", **config),
            model="tiny",
            write=self.write,
            folder=folder,
            decode=lambda ids: "".join(LETTERS[i] for i in ids),
            stop_ids=[STOP],
            seed=5,
            world=world or LocalWorld(),
            say=self.said.append,
        )

    def write(self, folder):
        save(self.policy, folder)

    def fill(self, n=2):
        return [group.completions for group in self.engine.fill(groups(), n)]

    def asked(self):
        """Completions that were asked for, without those that only try the server out."""
        return [body for path, body in self.server.requests if path == "/v1/completions" and "seed" in body]


def logps_of(model, prompt, tokens, sampling):
    """[T] log-probabilities of the completion on the support it was drawn from."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return support_logps(logits, sampling).gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()


SAMPLINGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 5},
    "top-p": {"temperature": 1.5, "top_p": 0.8},
    "min-p": {"min_p": 0.2},
}


@pytest.mark.parametrize("knobs", SAMPLINGS.values(), ids=SAMPLINGS)
def test_logps_are_the_policys_on_the_support_it_was_drawn_from(server, tmp_path, knobs):
    run = Run(server, tmp_path, **knobs)
    for prompt, completions in zip(PROMPTS, run.fill(4), strict=True):
        assert len(completions) == 4
        for completion in completions:
            expected = logps_of(run.policy, prompt, completion.tokens, run.engine.config)
            assert completion.logps == pytest.approx(expected, abs=1e-5)
            assert completion.version == 0
            assert completion.ended == (completion.tokens[-1] == STOP)


def test_it_is_interchangeable_with_the_native_engine(server, tmp_path):
    """What needs no luck is equal token by token; lengths, stops, texts and temperature 0 included."""
    config = {"temperature": 0.0, "max_completion_length": 12, "stop_strings": [LETTERS[17] + LETTERS[17]]}
    run = Run(server, tmp_path, **config)
    native = NativeEngine(
        run.policy,
        stop_ids=[STOP],
        pad_id=0,
        decode=run.engine.decode,
        sampling=RolloutConfig(**config),
        seed=5,
    )
    given = [Group("full", [], [1], [Completion("x", [9])]), *groups(), Group("long", [], [1] + [7] * 28)]
    ours, theirs = run.engine.fill(given, 1), native.fill(given, 1)
    assert ours == theirs
    assert ours[0] is given[0]
    assert len(ours[-1].completions[0].tokens) == CONTEXT - 29
    assert {len(group.completions[0].tokens) for group in ours[1:]} != {1}


def test_a_stop_token_stays_in_the_tokens_and_out_of_the_text(server, tmp_path):
    run = Run(server, tmp_path, max_completion_length=25)
    found = [completion for completions in run.fill(8) for completion in completions]
    ended = [completion for completion in found if completion.tokens[-1] == STOP]
    assert ended
    assert all(STOP not in completion.tokens[:-1] for completion in found)
    for completion in ended:
        assert completion.text == "".join(LETTERS[i] for i in completion.tokens[:-1])


def test_a_completion_depends_on_its_own_seed_alone(server, tmp_path):
    together = Run(server, tmp_path).fill(3)
    alone = Run(server, tmp_path, max_requests=1)
    separate = [alone.engine.fill([group], 3)[0].completions for group in reversed(groups())][::-1]
    assert separate == together
    later = Run(server, tmp_path)
    later.engine.sync(1)
    assert [c.tokens for g in later.fill(3) for c in g] != [c.tokens for g in together for c in g]
    assert {body["seed"] for body in alone.asked() if body["prompt"] == PROMPTS[1]} >= {
        key(5, "sample", 0, "row-1", i) for i in range(3)
    }
    half = [Group(g.id, [], g.prompt, completions[:1]) for g, completions in zip(groups(), together, strict=True)]
    assert [group.completions for group in alone.engine.fill(half, 3)] == together


def test_every_knob_is_sent_so_that_no_default_of_the_server_counts(server, tmp_path):
    Run(server, tmp_path, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, stop_strings=["ab"]).fill(1)
    body = next(body for path, body in server.requests if path == "/v1/completions" and "seed" in body)
    assert (
        body.items()
        >= {
            "model": "tiny",
            "max_tokens": 6,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 3,
            "min_p": 0.1,
            "stop": ["ab"],
            "include_stop_str_in_output": True,
            "stop_token_ids": [STOP],
            "ignore_eos": True,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }.items()
    )


def test_requests_run_side_by_side_as_far_as_allowed(server, tmp_path):
    server.delay = 0.05
    Run(server, tmp_path, max_requests=4).fill(4)
    assert server.most_at_once == 4


def test_weights_follow_the_version(server, tmp_path):
    run = Run(server, tmp_path)
    run.fill(1)
    run.fill(1)
    run.policy = tiny(1)
    run.engine.sync(1)
    for prompt, [completion] in zip(PROMPTS, run.fill(1), strict=True):
        assert completion.version == 1
        assert completion.logps == pytest.approx(
            logps_of(run.policy, prompt, completion.tokens, run.engine.config), abs=1e-5
        )
    steps = ("/pause", "/collective_rpc", "/reset_prefix_cache", "/resume", "/update_weight_version")
    assert [path for path, _ in server.requests if path in steps] == [*steps, *steps]  # once a version, in this order
    for version in (2, 3):
        run.engine.sync(version)
        run.fill(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version-2", "version-3"]
    run.engine.close()
    assert not tmp_path.exists()


def test_weights_of_an_earlier_process_are_written_anew(server, tmp_path):
    for name in ("version-0", "version-7", ".writing-version-3"):
        save(tiny(50), tmp_path / name)
    (tmp_path / "mine").touch()
    run = Run(server, tmp_path)
    [completion] = run.engine.fill(groups()[:1], 1)[0].completions
    assert completion.logps == pytest.approx(
        logps_of(run.policy, PROMPTS[0], completion.tokens, run.engine.config), abs=1e-5
    )
    assert {path.name for path in tmp_path.iterdir()} == {"version-0", "mine"}


def test_a_folder_for_weights_may_be_shared_and_holds_other_things(server, tmp_path):
    (tmp_path / "shared" / "version-0").mkdir(parents=True)
    runs = [Run(server, tmp_path / name, weights_folder=str(tmp_path / "shared")) for name in "ab"]
    for run in runs:
        run.fill(1)
    runs[0].engine.close()
    assert {len(list(path.iterdir())) for path in (tmp_path / "shared").iterdir()} == {0, 1}
    runs[1].engine.close()
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["version-0"]


def test_nothing_is_asked_when_nothing_is_missing(server, tmp_path):
    full = [Group("a", [], [1], [Completion("x", [9])])]
    assert Run(server, tmp_path).engine.fill(full, 1) == full
    assert server.requests == []


def test_a_server_killed_mid_round_is_waited_for_and_the_round_is_the_same(server, tmp_path):
    expected = Run(server, tmp_path / "whole").fill(6)
    run = Run(server, tmp_path / "broken", max_requests=3)
    run.fill(1)
    server.die_after = 7
    back = threading.Timer(0.8, server.start)  # with the weights it was first started with
    back.start()
    assert run.fill(6) == expected
    back.join()
    assert len(run.said) == 2
    assert re.search(r"/v1/completions failed with \w+: .*; trying for 20 s \(rollout.deadline\)", run.said[0])
    assert re.search(r"works again after [01] s", run.said[1])


def test_a_server_that_is_not_there_yet_is_waited_for(server, tmp_path):
    run = Run(server, tmp_path)
    server.kill()
    threading.Timer(0.3, server.start).start()
    assert [len(completions) for completions in run.fill(2)] == [2, 2, 2]
    assert "Connection refused" in run.said[0]
    assert "works again" in run.said[1]


def test_completions_of_a_server_with_other_weights_do_not_count(server, tmp_path):
    """As when it was started anew, or another run used it, between two requests."""
    expected = Run(server, tmp_path / "whole").fill(4)
    run = Run(server, tmp_path / "broken", max_requests=1)
    run.fill(1)
    other, count = tiny(3), len(run.asked())

    def meddle(body):
        if "seed" in body and len(run.asked()) == count + 3:
            server.weights, server.version = other, "somebody else's"

    server.answers["/v1/completions"] = meddle
    assert run.fill(4) == expected
    assert "it lost the weights it was given" in run.said[0]


def test_two_runs_on_one_server_end_at_the_deadline(server, tmp_path):
    run = Run(server, tmp_path, deadline=0.5)
    server.answers["/v1/completions"] = lambda body: setattr(server, "version", "theirs") if "seed" in body else None
    with pytest.raises(RunFailed, match=r"did not do its work for 0.5 s .* lost the weights .* serves another run too"):
        run.fill(1)


def test_a_server_that_stays_away_fails_the_run_at_its_deadline(server, tmp_path):
    run = Run(server, tmp_path, deadline=0.4)
    server.kill()
    began = time.monotonic()
    with pytest.raises(RunFailed, match=r"0.4 s \(rollout.deadline\).*refused.*rollout serve.*alignkit resume"):
        run.fill(1)
    assert 0.4 <= time.monotonic() - began < 2.0
    assert len(run.said) == 1


def test_a_server_that_hangs_fails_the_run_at_its_deadline(server, tmp_path):
    run = Run(server, tmp_path, deadline=0.5)
    server.delay = 3.0
    began = time.monotonic()
    with pytest.raises(RunFailed, match=r"no answer to /v1/completions within 0.5 s"):
        run.fill(1)
    assert time.monotonic() - began < 2.0


def test_one_lost_connection_costs_one_request(server, tmp_path):
    run = Run(server, tmp_path, max_requests=1)
    run.fill(1)
    before = len(run.asked())

    def once(body):
        del server.answers["/v1/completions"]
        return {"choices": [{"token_ids": [7], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "abort"}]}

    server.answers["/v1/completions"] = once
    assert [len(completions) for completions in run.fill(2)] == [2, 2, 2]
    assert len(run.asked()) == before + 6 + 1
    assert "gave up a completion (abort)" in run.said[0]


def refusal(server, tmp_path, path, answer, n=1, **config):
    run = Run(server, tmp_path, **config)
    server.answers[path] = answer
    began = time.monotonic()
    with pytest.raises(RunFailed) as raised:
        run.fill(n)
    assert time.monotonic() - began < 3.0  # at once: waiting would not help
    return str(raised.value)


def choice(tokens, logps):
    return {"choices": [{"token_ids": tokens, "logprobs": {"token_logprobs": logps}, "finish_reason": "stop"}]}


def test_what_a_server_refuses_ends_the_run_with_its_words(server, tmp_path):
    words = "This model's maximum context length is 7 tokens"
    assert f"400 {words}" in refusal(server, tmp_path, "/v1/completions", Refused(400, words))
    assert "500 out of cheese" in refusal(server, tmp_path, "/v1/completions", Refused(500, "out of cheese"))
    text = refusal(server, tmp_path, "/collective_rpc", Refused(500, "size mismatch for lm_head"))
    assert "size mismatch for lm_head" in text
    assert f"be able to read {tmp_path}" in text


@pytest.mark.parametrize("logp", [None, math.nan, -math.inf, -9999.0])
def test_a_log_probability_that_is_no_number_is_refused(server, tmp_path, logp):
    answer = lambda body: choice([7, 8], [-1.0, logp]) if "seed" in body else None  # noqa: E731
    assert f"drew token 8 with log-probability {logp}" in refusal(server, tmp_path, "/v1/completions", answer)


def test_an_answer_without_token_ids_is_refused(server, tmp_path):
    answer = {"choices": [{"text": "a", "logprobs": None, "finish_reason": "stop"}]}
    assert "without the token_ids and log-probabilities" in refusal(server, tmp_path, "/v1/completions", answer)
    assert "1 tokens with 2 log-prob" in refusal(server, tmp_path, "/v1/completions", choice([7], [-1.0, -1.0]))


def test_a_503_of_a_server_that_is_well_is_final_and_a_429_is_not(server, tmp_path):
    assert "503 busy" in refusal(server, tmp_path, "/v1/completions", Refused(503, "busy"))
    run, told = Run(server, tmp_path), []

    def busy(body):
        told.append(body)
        return Refused(429, "too many") if len(told) < 3 else None

    server.answers["/v1/completions"] = busy
    assert [len(completions) for completions in run.fill(1)] == [1, 1, 1]


def test_a_server_of_another_mode_model_or_kind_is_refused(server, start, tmp_path):
    server.mode = "raw_logprobs"
    text = refusal(server, tmp_path, "/health", None)
    assert "instead of 0" in text
    assert "--logprobs-mode processed_logprobs" in text
    server.mode = "processed_logprobs"
    assert "serves 'tiny', and this run's is 'other'" in refusal(server, tmp_path, "/", None, served_name="other")
    server.dev_mode = False
    assert "VLLM_SERVER_DEV_MODE=1" in refusal(server, tmp_path, "/", None)
    assert "Is it a vLLM server?" in refusal(server, tmp_path, "/v1/models", Refused(404, "Not Found"))
    assert "which no vLLM server does" in refusal(server, tmp_path, "/v1/models", b"<html>hello</html>")


def test_an_api_key_is_sent(start, tmp_path, monkeypatch):
    with VllmServer(start, api_key="secret") as server:
        assert "rollout.token_env" in refusal(server, tmp_path, "/", None)
        with pytest.raises(EnvironmentProblem, match=r"rollout.token_env names 'MY_KEY'"):
            Run(server, tmp_path, token_env="MY_KEY")
        monkeypatch.setenv("MY_KEY", "secret")
        assert [len(completions) for completions in Run(server, tmp_path, token_env="MY_KEY").fill(1)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("prompt", "said"), [([], "has no tokens"), ([1] * CONTEXT, "32 tokens and the context of the vLLM server is 32")]
)
def test_a_prompt_without_room_is_refused(server, tmp_path, prompt, said):
    with pytest.raises(DataError, match=f"'odd'.*{said}"):
        Run(server, tmp_path).engine.fill([*groups(), Group("odd", [], prompt)], 1)


def test_weights_that_cannot_be_written_are_the_machines_fault(server, tmp_path):
    run = Run(server, tmp_path)

    def full(folder):
        raise OSError(28, "No space left on device")

    run.engine.write = full
    with pytest.raises(EnvironmentProblem, match=r"No space left on device.*rollout.weights_folder"):
        run.fill(1)


def test_a_fault_of_ours_is_raised_as_it_is(server, tmp_path):
    run = Run(server, tmp_path)
    run.engine.decode = lambda ids: {}["nothing"]
    with pytest.raises(KeyError, match="nothing"):
        run.fill(1)


def test_guides_are_refused_where_the_recipe_is_read():
    with pytest.raises(ValidationError, match="a vLLM server knows no guides"):
        RolloutConfig(engine="vllm", guides=[{"name": "head_weighted", "head_index": 0}])


class ThreadWorld(LocalWorld):
    """A rank among threads; gathers what all of them bring."""

    def __init__(self, rank, size, shared):
        self.rank, self.size, self.shared = rank, size, shared

    def gather(self, obj):
        barrier, slots = self.shared
        slots[self.rank] = obj
        barrier.wait(20)
        found = list(slots)
        barrier.wait(20)
        return found


def on_two_ranks(work):
    """What `work(world)` returns or raises on each of two ranks."""
    shared = (threading.Barrier(2), [None, None])
    results = [None, None]

    def one(rank):
        try:
            results[rank] = work(ThreadWorld(rank, 2, shared))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_ranks_write_what_one_writes_and_the_first_gives_the_weights(server, tmp_path):
    expected = Run(server, tmp_path / "one").fill(2)
    writers = []

    def work(world):
        run = Run(server, tmp_path / "two", world)
        run.engine.write = lambda folder: (writers.append(world.rank), save(run.policy, folder))
        mine = groups()[:1] if world.rank == 0 else groups()[1:]
        found = [group.completions for group in run.engine.fill(mine, 2)]
        return found, run.said

    (first, _), (second, said) = on_two_ranks(work)
    assert first + second == expected
    assert writers == [0]
    assert said == []


def test_an_outage_or_error_of_one_rank_is_everybodys(server, tmp_path):
    expected = Run(server, tmp_path / "one").fill(4)
    server.die_after = 5
    threading.Timer(0.5, server.start).start()

    def work(world):
        run = Run(server, tmp_path / "two", world, max_requests=1)
        mine = groups()[:2] if world.rank == 0 else groups()[2:]
        return [group.completions for group in run.engine.fill(mine, 4)], len(run.said)

    (first, told), (second, silent) = on_two_ranks(work)
    assert first + second == expected
    assert (told, silent) == (2, 0)

    def fail(world):
        run = Run(server, tmp_path / "three", world)
        mine = groups()[:2] if world.rank == 0 else [Group("odd", [], [])]
        return run.engine.fill(mine, 1)

    assert [(type(error), "'odd'" in str(error)) for error in on_two_ranks(fail)] == [(DataError, True)] * 2


@pytest.fixture
def python(tmp_path, monkeypatch):
    """A Python whose vLLM is the small server, or what else `main` says."""

    def build(main="from tests.rollout.vllm_server import main\nmain()\n"):
        package = tmp_path / "site" / "vllm" / "entrypoints" / "openai"
        package.mkdir(parents=True)
        (package / "api_server.py").write_text(main)
        root = Path(__file__).parents[2]
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{root}")
        return sys.executable

    return build


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_serve_starts_what_the_engine_speaks_to_and_ends_it(start, tmp_path, python, capfd):
    port, found = free_port(), []

    class Address:
        url = f"http://127.0.0.1:{port}"

    def ready(url):
        assert url == Address.url
        run = Run(Address, tmp_path / "weights", max_completion_length=100)
        found.extend(run.engine.fill([Group("a", [], [1, 7]), Group("b", [], [1] * 23)], 3))
        os.kill(os.getpid(), signal.SIGTERM)

    config = RolloutConfig(engine="vllm", url=f"{Address.url}/", served_name="tiny")
    model = ModelConfig(name_or_path=str(start), dtype="float32")
    serve(model, config, 24, python=python(), port=None, flags=[], ready=ready)
    assert [len(completion.tokens) for completion in found[1].completions] == [1, 1, 1]  # of 24 tokens 23 are taken
    assert max(len(completion.tokens) for completion in found[0].completions) <= 22
    assert "serving tiny in float32" in capfd.readouterr().err  # the server's log
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_serve_asks_vllm_for_what_the_recipe_says(tmp_path, python, capfd, monkeypatch):
    base = tmp_path / "adapter"
    base.mkdir()
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    monkeypatch.setenv("MY_KEY", "secret")
    show = "import os, sys; e = os.environ; print(*sys.argv[1:], e['VLLM_SERVER_DEV_MODE'], e['VLLM_API_KEY']); exit(3)"
    config = RolloutConfig(engine="vllm", token_env="MY_KEY")
    model = ModelConfig(name_or_path=str(base), revision="v1", trust_remote_code=True)
    port = free_port()
    with pytest.raises(EnvironmentProblem, match="ended by itself, with exit code 3; its log is above"):
        serve(model, config, 512, python=python(show), port=port, flags=["--enforce-eager"], ready=pytest.fail)
    assert capfd.readouterr().err.split() == [
        *("--model", "owner/base", "--served-model-name", str(base), "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "bfloat16", "--max-model-len", "512", "--logprobs-mode", "processed_logprobs"),
        *("--generation-config", "vllm", "--revision", "v1", "--trust-remote-code", "--enforce-eager", "1", "secret"),
    ]


@pytest.mark.parametrize(
    ("python_path", "words"),
    [
        ("/nowhere/python", "/nowhere/python cannot be run"),
        (sys.executable, "there is no vLLM in"),
        (None, "be served"),
    ],
)
def test_serve_says_why_there_is_no_server(python, python_path, words):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = RolloutConfig(url=f"http://127.0.0.1:{taken.getsockname()[1]}")
        found = python_path or python()
        with pytest.raises(EnvironmentProblem, match=words):
            serve(ModelConfig(name_or_path="m"), config, 8, python=found, port=None, flags=[], ready=pytest.fail)


def test_the_command_line_serves_a_recipe(start, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "recipe.yaml").write_text(
        f"output_dir: {tmp_path}/run\nmodel: {{name_or_path: {start}}}\ndata: [{{path: {tmp_path}/prompts.jsonl}}]\n"
        "algorithm: {name: grpo}\nrewards: [{name: length}]\ntrain: {max_length: 200}\nrollout: {engine: vllm}\n"
    )
    asked = {}

    def stand_in(model, rollout, max_length, **options):
        asked.update(options, model=model.name_or_path, url=rollout.url, max_length=max_length)
        options["ready"]("http://there:9")

    monkeypatch.setattr("alignkit.rollout.serve.serve", stand_in)
    arguments = ["rollout", "serve", str(tmp_path / "recipe.yaml"), "rollout.url=http://there:8"]
    monkeypatch.setattr(sys, "argv", ["alignkit", *arguments, "--port", "9", "--python", "p", "--flags", "--a 1 --b"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert capsys.readouterr().out == "rollout.url=http://there:9\n"
    del asked["ready"]
    assert asked == {
        "model": str(start),
        "url": "http://there:8",
        "max_length": 200,
        "port": 9,
        "python": "p",
        "flags": ["--a", "1", "--b"],
    }
    monkeypatch.setattr(sys, "argv", ["alignkit", *arguments, "--flags", "it's"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "--flags it's: No closing quotation" in capsys.readouterr().err
