"""Runs that begin where another ended: what stood on its backbone goes on, and what cannot write is not asked to."""

import pytest
import torch
from safetensors.torch import load_file

from alignkit.core.contracts import Heads
from alignkit.core.errors import RecipeError
from alignkit.models.config import ModelConfig
from alignkit.models.heads import HEADS_FILE, extra, save_heads
from alignkit.models.load import load_policy
from alignkit.run import sample, train
from alignkit.testing import Bench

VALUE = Heads(kind="token", names=("value",), hidden=True)


def test_a_hidden_score_layer_is_taken_up_again(tmp_path):
    bench = Bench("sft", folder=tmp_path)
    config = ModelConfig(name_or_path=str(bench.model), dtype="float32")
    first = load_policy(config, 0, VALUE)
    with torch.no_grad():
        extra(first).outer.bias.fill_(0.5)
    folder = tmp_path / "trained"
    first.save_pretrained(folder)
    save_heads(first, folder)
    again = load_policy(config.model_copy(update={"name_or_path": str(folder)}), 7, VALUE)
    for name, weight in load_file(folder / HEADS_FILE).items():
        assert torch.equal(extra(again).state_dict()[name], weight)
    fresh = load_policy(config, 7, VALUE)
    assert not torch.equal(extra(fresh).outer.bias, extra(again).outer.bias)


def test_beside_an_adapter_the_critic_starts_from_the_weights_under_it(tmp_path):
    bench = Bench("sft", folder=tmp_path)
    lora = {"lora": {"r": 4, "alpha": 8}}
    adapter = train(bench.recipe("adapter", model=lora, max_steps=1), quiet=True, report=False).folder
    online = Bench("ppo", folder=tmp_path / "online")
    started = {**lora, "name_or_path": str(adapter)}
    assert train(online.recipe("ppo", model=started, max_steps=1), quiet=True, report=False).steps == 1


def test_an_adapter_that_writes_is_not_asked_to_score(tmp_path):
    bench = Bench("sft", folder=tmp_path)
    lora = {"lora": {"r": 4, "alpha": 8}}
    adapter = train(bench.recipe("adapter", model=lora, max_steps=1), quiet=True, report=False).folder
    scorer = Bench("reward_model", folder=tmp_path / "scorer")
    with pytest.raises(RecipeError, match="is an adapter that writes text, and this method scores it"):
        train(scorer.recipe("scorer", model={**lora, "name_or_path": str(adapter)}), quiet=True, report=False)


def test_a_model_that_scores_is_not_asked_to_write(tmp_path):
    bench = Bench("reward_model", folder=tmp_path)
    folder = train(bench.recipe("scorer", max_steps=1), quiet=True, report=False).folder
    with pytest.raises(RecipeError, match="scores text and writes none"):
        sample(folder, ["a"])
