"""The flat script itself: its split of tokens, its padding, and its command line on real files."""

import gzip
import json
import sys
from itertools import chain

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.acceptance import toys
from tests.parity.flat_script import tiny_dpo


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return toys.write_model(tmp_path_factory.mktemp("model"), seed=0)


def test_a_pair_is_split_where_the_prompt_ends(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    pair = tiny_dpo.tokenize({"prompt": "ab:", "chosen": "AB", "rejected": "a"}, tokenizer)
    assert tokenizer.decode(pair.prompt) == "ab:"
    assert tokenizer.decode(pair.chosen) == "AB</s>"
    assert tokenizer.decode(pair.rejected) == "a</s>"


def test_padding_does_not_change_a_row(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    short, long = tiny_dpo.Pair([3, 4], [5, 2], [6, 2]), tiny_dpo.Pair([3] * 9, [7] * 9, [8, 2])
    with torch.no_grad():
        together = torch.stack(tiny_dpo.completion_logps(model, [short, long]))[:, 0]
        alone = torch.stack(tiny_dpo.completion_logps(model, [short]))[:, 0]
    torch.testing.assert_close(together, alone)


def test_every_pair_is_seen_once_an_epoch():
    pairs = [tiny_dpo.Pair([i], [i], [i]) for i in range(5)]
    batches = tiny_dpo.shuffled_batches(pairs, size=2, epochs=2, seed=0)
    assert [len(batch) for batch in batches] == [2, 2, 1, 2, 2, 1]
    epochs = [list(chain(*batches[:3])), list(chain(*batches[3:]))]
    assert [sorted(epoch) for epoch in epochs] == [pairs, pairs]
    assert epochs[0] != epochs[1]


def test_the_command_line_trains_and_saves(model_folder, tmp_path, monkeypatch, capsys):
    data = tmp_path / "pairs.jsonl.gz"
    prompts = toys.style_prompts(0, "train", 8)
    rows = [*toys.style_pairs(0, prompts), {"prompt": "a" * 70, "chosen": "A", "rejected": "b"}]
    with gzip.open(data, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    flags = {"--output": tmp_path / "out", "--batch-size": 4, "--epochs": 3, "--max-length": 64, "--lr": 1e-3}
    arguments = [str(part) for pair in flags.items() for part in pair]
    monkeypatch.setattr(sys, "argv", ["tiny_dpo.py", str(model_folder), str(data), *arguments])
    tiny_dpo.main()

    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "8 pairs, 1 left out as longer than 64 tokens"
    losses = [float(line.split()[-1]) for line in printed if line.startswith("step")]
    assert len(losses) == 6
    assert losses[0] == pytest.approx(0.693147)
    assert losses[-1] < 0.69
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    start = AutoModelForCausalLM.from_pretrained(model_folder)
    assert not trained.lm_head.weight.equal(start.lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "</s>"
