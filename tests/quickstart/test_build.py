"""The tokenizer and the untrained model."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.quickstart.build import CONTEXT, write_model
from alignkit.quickstart.corpus import texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("untrained")
    write_model(path, [row["text"] for row in texts(1000, seed=0)], vocab_size=800, seed=0)
    return path


def test_stories_take_about_a_token_a_word_and_fit(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row in texts(100, seed=5):
        tokens = tokenizer(row["text"])["input_ids"]
        assert tokens[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in tokens[1:]
        assert tokenizer.eos_token_id not in tokens
        assert len(tokens) < 1.5 * len(row["text"].split())
        assert len(tokens) < CONTEXT
        assert tokenizer.decode(tokens, skip_special_tokens=True) == row["text"]


def test_any_text_can_be_written(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Größe: 12 % 🙂\n\t{x}"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_the_continuation_is_tokenized_as_in_the_whole_text(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt, rest = "Mia the fox went to the park.", " She was glad."
    whole = tokenizer(prompt + rest)["input_ids"]
    assert whole == tokenizer(prompt)["input_ids"] + tokenizer(rest)["input_ids"][1:]


def test_model_is_tiny_repeatable_and_leaves_the_global_generator_alone(folder, tmp_path):
    before = torch.random.get_rng_state()
    write_model(tmp_path, [row["text"] for row in texts(1000, seed=0)], vocab_size=800, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())
    first, second = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path))
    assert 300_000 < sum(p.numel() for p in first.parameters()) < 800_000
    assert first.dtype == torch.float32
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)
