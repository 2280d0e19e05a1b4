"""The flat script itself: its padding, its advantages, its answers, and its command line on real files."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.acceptance import toys
from tests.parity.flat_script import tiny_grpo


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return toys.write_model(tmp_path_factory.mktemp("model"), seed=0)


def test_padding_does_not_change_a_row(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    short, long = tiny_grpo.Answer([3, 4], [5, 2]), tiny_grpo.Answer([3] * 9, [7] * 9)
    with torch.no_grad():
        together, mask = tiny_grpo.token_logps(model, [short, long])
        alone, _ = tiny_grpo.token_logps(model, [short])
    assert mask[0].tolist() == [False, True, True, *([False] * 14)]
    torch.testing.assert_close(together[0, :3], alone[0])


def test_advantages_are_within_a_prompt():
    found = tiny_grpo.group_advantages([[0.0, 1.0], [5.0, 5.0]])
    assert found.tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5, 0.0, 0.0], abs=1e-3)


def test_an_answer_ends_at_its_stop_token_or_at_the_limit(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    answers = tiny_grpo.sample(model, tokenizer, [5, 6], 200, 6)
    ended = [answer.completion for answer in answers if tokenizer.eos_token_id in answer.completion]
    assert all(ids.index(tokenizer.eos_token_id) == len(ids) - 1 for ids in ended)
    assert 0 < len(ended) < len(answers) == 200
    assert {len(a.completion) for a in answers if a.completion not in ended} == {6}


def test_every_prompt_comes_before_any_comes_again():
    drawn = [prompt for some in tiny_grpo.rounds([[i] for i in range(6)], 3, 4, seed=0) for prompt in some]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == [[i] for i in range(6)]
    assert drawn[:6] != drawn[6:]


def test_the_command_line_learns_and_saves(model_folder, tmp_path, monkeypatch, capsys):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in toys.style_prompts(0, "train", 8)))
    flags = {
        "--output": tmp_path / "out",
        "--word": "e",
        "--max-tokens": 8,
        "--rounds": 15,
        "--lr": 1e-2,
        "--answers": 16,
    }
    arguments = [str(part) for pair in flags.items() for part in pair]
    monkeypatch.setattr(sys, "argv", ["tiny_grpo.py", str(model_folder), str(data), *arguments])
    tiny_grpo.main()
    printed = capsys.readouterr().out.splitlines()
    rewards = [float(line.split()[3]) for line in printed if line.startswith("round")]
    assert len(rewards) == 15
    assert sum(rewards[-3:]) > 3 * 0.5 > sum(rewards[:3])
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    start = AutoModelForCausalLM.from_pretrained(model_folder)
    assert not trained.lm_head.weight.equal(start.lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "</s>"
