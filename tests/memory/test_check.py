"""`alignkit check` about tokens and memory."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from alignkit.core.errors import DataError, RecipeError
from alignkit.memory.given import GIB, find_config, parse_memory
from alignkit.plan import check, check_tokens
from alignkit.recipe import load_recipe, shipped_recipes
from alignkit.testing import build_tiny_model
from tests.test_cli import run

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
"""A model of 7.6 billion weights."""
CLUSTER = sorted(name for name in shipped_recipes() if "/7b-" in name)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    Path("config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    row = {"prompt": "say it", "chosen": " yes", "rejected": " no"}
    Path("pairs.jsonl").write_text((json.dumps(row) + "\n") * 70, encoding="utf-8")


def test_what_does_not_fit_is_refused_with_changes_that_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("config.json").write_text(json.dumps({**CONFIG, "vocab_size": 32000}), encoding="utf-8")
    recipe = ["dpo/qwen-0.5b", "train.micro_batch_tokens=4096", "--config", "config.json", "--world-size", "8"]
    recipe += ["--gpu-memory", "80GB"]
    assert run(monkeypatch, "check", *recipe) == 2
    said = capsys.readouterr()
    assert "6.75 B weights, 6.75 B of them trained" in said.out
    assert not said.out.endswith("ok\n")
    assert "do not fit into 80 GiB, of which 8% are left to CUDA and to gaps" in said.err
    changes = re.findall(r"^  (\S.*?)  +([\d.]+) GiB$", said.err, re.MULTILINE)
    assert len(changes) == 3
    for overrides, peak in changes:
        assert float(peak) <= 80 * 0.92
        assert run(monkeypatch, "check", *recipe, *overrides.split()) == 0, overrides
        assert f"fits        {peak} GiB in 80 GiB" in capsys.readouterr().out
    assert run(monkeypatch, "check", *recipe[:-1], "1GB") == 2
    assert "Neither gradient checkpointing" in capsys.readouterr().err


@pytest.mark.parametrize("name", CLUSTER)
def test_cluster_recipes_fit_eight_gpus(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "check", name, "--config", "config.json", "--gpu-memory", "80GB") == 0
    said = capsys.readouterr().out
    assert "on each of 8 GPUs" in said
    assert "8 processes ×" in said
    assert "uneven" not in said
    assert re.search(r"^fits ", said, re.MULTILINE)


def test_there_are_cluster_recipes_for_both_ways_of_sharding() -> None:
    backends = {load_recipe(name).dist.backend for name in CLUSTER}
    assert backends == {"fsdp2", "zero3"}
    assert "vllm" in {load_recipe(name).rollout.engine for name in CLUSTER}


def test_seven_billion_weights_are_checked_in_ten_seconds() -> None:
    command = [sys.executable, "-m", "alignkit", "check", "sft/7b-fsdp2", "--config", "config.json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "memory " in done.stdout
    # Processor time: what else the machine is doing does not count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


def test_a_model_that_is_not_here_is_not_predicted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "check", "dpo/qwen-0.5b") == 0
    said = capsys.readouterr().out
    assert "memory      not predicted: Qwen/Qwen2.5-0.5B-Instruct is not on this machine; `--config FILE`" in said
    assert "template    unchecked: the tokenizer of Qwen/Qwen2.5-0.5B-Instruct is not on this machine" in said
    assert run(monkeypatch, "check", "dpo/qwen-0.5b", "--gpu-memory", "80GB") == 2
    assert "nobody can say whether it fits: Qwen/Qwen2.5-0.5B-Instruct is not on" in capsys.readouterr().err
    assert run(monkeypatch, "check", "dpo/qwen-0.5b", "--gpu-memory", "plenty") == 2
    assert "expected one such as 80GB" in capsys.readouterr().err
    assert run(monkeypatch, "check", "sft/7b-fsdp2", "--world-size", "4") == 2
    assert "dist.world_size: 8, and --world-size asks about 4" in capsys.readouterr().err


def test_a_model_that_cannot_be_followed_is_not_predicted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
    Path("config.json").write_text(json.dumps(shape), encoding="utf-8")
    assert run(monkeypatch, "check", "dpo/qwen-0.5b-lora", "--config", "config.json") == 0  # peft knows none
    assert "memory      not predicted: the model's code cannot be followed" in capsys.readouterr().out


def test_amounts_of_memory() -> None:
    assert parse_memory("80GB") == parse_memory("80") == parse_memory(" 80 GiB ") == 80 * GIB
    assert parse_memory("512mb") == GIB // 2
    assert parse_memory("1.5g") == 3 * GIB // 2
    for wrong in ("", "0", "80 tons", "-1GB"):
        with pytest.raises(RecipeError, match="no amount of memory"):
            parse_memory(wrong)


def test_where_a_config_is_found(tmp_path: Path) -> None:
    assert find_config(str(tmp_path)) == str(tmp_path)
    assert find_config("owner/unknown-model") is None
    assert find_config("nowhere/near/here") is None
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    assert find_config(str(adapter)) is None
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    assert find_config(str(adapter)) == str(tmp_path)


def test_rows_are_written_as_tokens_and_read_back(tmp_path: Path) -> None:
    recipe = {
        "output_dir": "run",
        "model": {"name_or_path": str(build_tiny_model(tmp_path / "model"))},
        "data": [{"path": "pairs.jsonl"}],
        "algorithm": {"name": "dpo"},
    }
    # a character a token: "say it" and " no" or " yes", and the end
    (line,) = check_tokens(load_recipe(recipe))
    assert line == "template    data.0: 128 rows of 10 to 11 tokens; read back, all is there"
    # the tokenizer knows letters alone
    Path("pairs.jsonl").write_text(json.dumps({"prompt": "p", "chosen": " q", "rejected": " 7?"}) + "\n")
    (line,) = check_tokens(load_recipe(recipe))
    assert line.endswith("2 rows of 4 to 5 tokens; read back, 1 of them do not say all that the row does, first '7?'")
    Path("pairs.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "", "rejected": ""}) + "\n")
    (line,) = check_tokens(load_recipe(recipe))
    assert line == "template    data.0: none of the first 1 rows can be used"
    asked = [{"role": "user", "content": "hi"}]
    answers = {name: [*asked, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    Path("pairs.jsonl").write_text(json.dumps(answers) + "\n")
    with pytest.raises(DataError, match="no chat template"):
        check_tokens(load_recipe(recipe))


def test_batch_arithmetic_and_what_is_uneven() -> None:
    def lines(name: str, world: int, *overrides: str) -> list[str]:
        told = check(load_recipe(name, overrides), world)
        return [line for line in told if line.startswith(("arithmetic", "uneven"))]

    assert lines("dpo/7b-fsdp2", 8) == ["arithmetic  8 processes × 4 forwards × 4 units = 128 units an update"]
    assert lines("grpo/qwen-0.5b", 4) == [
        "arithmetic  32 prompts × 8 samples = 256 units a round = 1 update of 256",
        "arithmetic  4 processes × 4 forwards × 16 units = 256 units an update",
    ]
    assert lines("grpo/qwen-0.5b", 6)[1:] == [
        "uneven      32 prompts on 6 processes; 30 or 36 prompts a round would be even",
        "arithmetic  6 processes × 3 forwards × 16 units ≥ 256 units an update",
        "uneven      256 units on 6 processes; 240 or 264 units an update would be even",
    ]
    # 12 prompts of 8 are 96 units: one update of 64 and one of 32; 8 or 16 prompts are whole updates
    assert lines("grpo/qwen-0.5b", 1, "train.batch_size=64", "algorithm.prompts_per_round=12")[1] == (
        "uneven      the last update of a round has 32 of 64 units; 8 or 16 prompts a round would be even"
    )


def test_steps_of_a_round_count_the_answers_of_the_data() -> None:
    """Of 70 + 10 prompts a round has 16; each gives a pair of what is written, and every eighth one of the data's."""
    Path("prompts.jsonl").write_text('{"prompt": "say it"}\n' * 70, encoding="utf-8")
    row = {"prompt": "say it", "chosen": " yes", "rejected": " no"}
    Path("pairs.jsonl").write_text((json.dumps(row) + "\n") * 10, encoding="utf-8")
    recipe = {
        "output_dir": "run",
        "model": {"name_or_path": "o/m"},
        "models": {"base": {"from": "o/base"}},
        "data": [{"path": "prompts.jsonl"}, {"path": "pairs.jsonl"}],
        "algorithm": {"name": "scir", "rounds": 5, "pairing": "all", "max_pairs": 1},
        "rollout": {"num_generations": 2, "max_completion_length": 64},
        "train": {"batch_size": 2, "max_length": 512},
    }
    # 16 · (1 + 10 / 80) = 18 pairs, 9 steps of 2
    assert "up to 9 optimizer steps" in "\n".join(check(load_recipe(recipe)))
