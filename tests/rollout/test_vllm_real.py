"""The engine against vLLM itself, which is installed in an environment of its own; see docs/rollouts.md."""

import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignkit.core.errors import RunFailed
from alignkit.core.types import Group
from alignkit.dist.world import LocalWorld
from alignkit.rollout.config import RolloutConfig
from alignkit.rollout.draw import support_logps
from alignkit.rollout.native import NativeEngine
from alignkit.rollout.vllm import VllmEngine

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vllm")]
PYTHON = os.environ.get("ALIGNKIT_VLLM_PYTHON")
STOP = 4
LETTERS = "".join(chr(ord("0") + i) for i in range(40))
PROMPTS = [[1, 7, 8], [1, 9], [1, 7, 8, 30, 31]]
START = 240.0
"""Seconds vLLM may take to start."""


def tiny(seed, hidden_size=64):
    """A Llama with heads as wide as vLLM's kernels for CPUs need them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=40,
                hidden_size=hidden_size,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=256,
                initializer_range=0.3,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=STOP,
            )
        ).float()


def save(model, folder):
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token=LETTERS[0]))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


class Server:
    """`alignkit rollout serve`, started, killed and started again on one port."""

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        save(tiny(99), folder / "start")
        (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n')
        self.recipe, self.log = folder / "recipe.yaml", folder / "server.log"
        self.recipe.write_text(
            f"output_dir: {folder}/run\nmodel: {{name_or_path: {folder}/start, dtype: float32}}\n"
            f"data: [{{path: {folder}/prompts.jsonl}}]\nalgorithm: {{name: grpo}}\nrewards: [{{name: length}}]\n"
            f"train: {{max_length: 200}}\nrollout: {{engine: vllm, url: '{self.url}', served_name: tiny}}\n"
        )
        self.process = None

    def start(self, flags=""):
        """Begin to start it; returns before it is ready."""
        small = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
        flags = f"--enforce-eager --max-num-seqs 8 {flags}"
        command = [sys.executable, "-m", "alignkit", "rollout", "serve", self.recipe, "--python", PYTHON]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--flags", flags],
                env={**os.environ, **small},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def wait(self):
        """Until it is ready, or has ended."""
        assert self.process.stdout.readline() == f"rollout.url={self.url}\n", self.log.read_text()[-3000:]

    def kill(self):
        """End vLLM's processes, as the kernel does when memory is short."""
        pids = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=True).stdout
        for pid in pids.split():
            os.killpg(int(pid), signal.SIGKILL)
        self.process.wait(60)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not PYTHON:
        pytest.skip("ALIGNKIT_VLLM_PYTHON is not set: it names the Python of an environment that has vLLM")
    running = Server(tmp_path_factory.mktemp("real"))
    running.start()
    running.wait()
    yield running
    running.stop()


class Run:
    """An engine, the policy it writes weights of, and what it said."""

    def __init__(self, server, folder, seed=0, **config):
        self.policy, self.said = tiny(seed), []
        config = {"max_completion_length": 40, "deadline": START, **config}
        self.engine = VllmEngine(
            RolloutConfig(engine="vllm", url=server.url, served_name="tiny", **config),
            model="recipe's",
            write=lambda target: save(self.policy, target),
            folder=folder,
            decode=lambda ids: "".join(LETTERS[i] for i in ids),
            stop_ids=[STOP],
            seed=5,
            world=LocalWorld(),
            say=self.said.append,
        )

    def fill(self, n):
        groups = [Group(f"row-{i}", [], list(prompt)) for i, prompt in enumerate(PROMPTS)]
        return [group.completions for group in self.engine.fill(groups, n)]

    def farthest(self, found):
        """Most nats by which the server is off the policy, over all tokens."""
        return max(
            abs(ours - theirs)
            for prompt, completions in zip(PROMPTS, found, strict=True)
            for completion in completions
            for ours, theirs in zip(completion.logps, self.expected(prompt, completion.tokens), strict=True)
        )

    def expected(self, prompt, tokens):
        with torch.no_grad():
            logits = self.policy(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        return support_logps(logits, self.engine.config).gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()


KNOBS = [{}, {"temperature": 0.6}, {"top_k": 5}, {"temperature": 1.5, "top_p": 0.8}, {"min_p": 0.2}]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_logps_are_the_policys_on_the_support_it_was_drawn_from(server, tmp_path, knobs):
    run = Run(server, tmp_path, **knobs)
    assert run.farthest(run.fill(8)) < 1e-4


def test_it_is_interchangeable_with_the_native_engine(server, tmp_path):
    knobs = {"temperature": 0.0, "stop_strings": [LETTERS[17], LETTERS[30]]}
    run = Run(server, tmp_path, **knobs)
    native = NativeEngine(
        run.policy,
        stop_ids=[STOP],
        pad_id=0,
        decode=run.engine.decode,
        sampling=RolloutConfig(max_completion_length=40, **knobs),
        seed=5,
    )
    groups = [Group(f"row-{i}", [], list(prompt)) for i, prompt in enumerate(PROMPTS)]
    groups.append(Group("long", [], [1] + [7] * 185))
    found = run.engine.fill(groups, 1)
    assert found[:3] == native.fill(groups[:3], 1)
    assert len(found[3].completions[0].tokens) <= 14  # of train.max_length


def test_a_completion_depends_on_its_own_seed_alone(server, tmp_path):
    together = Run(server, tmp_path / "a").fill(4)
    alone = Run(server, tmp_path / "b", max_requests=1).fill(4)
    assert [[c.tokens for c in group] for group in together] == [[c.tokens for c in group] for group in alone]
    long = [tuple(c.tokens) for group in together for c in group if len(c.tokens) > 4]
    assert len(set(long)) == len(long) >= 3


def test_weights_follow_the_version(server, tmp_path):
    run = Run(server, tmp_path)
    run.fill(1)
    run.policy = tiny(1)
    run.engine.sync(1)
    assert run.farthest(run.fill(4)) < 1e-4


def test_a_refused_prompt_harms_nobody(server, tmp_path):
    run = Run(server, tmp_path)
    with pytest.raises(RunFailed, match="out of vocabulary"):
        run.engine.fill([Group("odd", [], [1, 4000])], 1)
    assert run.farthest(run.fill(1)) < 1e-4


def test_a_killed_server_is_waited_for_and_the_round_is_the_same(server, tmp_path):
    expected = Run(server, tmp_path / "whole", max_completion_length=150).fill(16)
    run = Run(server, tmp_path / "broken", max_completion_length=150, max_requests=4)
    write, texts = run.engine.decode, []

    def decode(ids):
        texts.append(ids)
        if len(texts) == 10:
            server.kill()
            server.start()
        return write(ids)

    run.engine.decode = decode
    found = run.fill(16)
    server.wait()
    assert [[c.tokens for c in group] for group in found] == [[c.tokens for c in group] for group in expected]
    assert run.farthest(found) < 1e-4
    assert len(run.said) == 2
    assert "works again" in run.said[1]


def test_a_server_that_counts_otherwise_is_refused(server, tmp_path):
    assert server.stop() == 0
    server.start("--logprobs-mode raw_logprobs")
    server.wait()
    with pytest.raises(RunFailed, match="instead of 0"):
        Run(server, tmp_path / "a").fill(1)
    run = Run(server, tmp_path / "b")
    run.policy = tiny(0, hidden_size=128)
    with pytest.raises(RunFailed, match=r"refused /collective_rpc: 500 .*It must hold a model of the same shape"):
        run.fill(1)
