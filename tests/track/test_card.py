import ast

import pytest
import yaml

from alignkit.core.contracts import Heads
from alignkit.track.card import is_hub_id, write_card


def card_facts(**changes):
    return {
        "base_model": "acme/tiny",
        "datasets": ["acme/pairs", "/home/somebody/private/pairs.jsonl.gz", "acme/pairs"],
        "algorithm": "dpo",
        "paper": "Rafailov et al. 2023, arXiv 2305.18290.",
        "peft": False,
        "conversational": False,
        "versions": {"alignkit": "0.1.0", "torch": "2.13.0"},
        "metrics": {"loss": 0.31, "eval_rewards/accuracies": 0.97},
        "best": None,
        "heads": Heads(),
        "notes": [],
        **changes,
    }


def parts(path):
    _, front, body = path.read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def quick_start(body):
    return body.split("```python\n")[1].split("```")[0]


def test_the_card_tells_how_the_model_was_made(tmp_path):
    front, body = parts(write_card(tmp_path, card_facts()))
    assert front == {
        "base_model": "acme/tiny",
        "datasets": ["acme/pairs"],
        "library_name": "transformers",
        "model_name": tmp_path.name,
        "tags": ["generated_from_trainer", "alignkit", "dpo"],
        "pipeline_tag": "text-generation",
    }
    assert "Trained from `acme/tiny` on `acme/pairs`, `pairs.jsonl.gz` (a local file or folder) with" in body
    assert "somebody" not in body
    assert "Reference: Rafailov et al. 2023, arXiv 2305.18290." in body
    assert "| eval_rewards/accuracies | 0.97 |" in body
    assert "- torch 2.13.0" in body


def test_the_card_tells_which_weights_lie_where(tmp_path):
    best = {"metric": "eval_loss", "mode": "min", "value": 0.31, "step": 20, "last_step": 40, "stopped_early": True}
    _, body = parts(write_card(tmp_path, card_facts(best=best)))
    assert "of the last step, 40, where training stopped early. The folder `best` holds those of step 20" in body
    assert "`eval_loss` was best: 0.31." in body
    _, body = parts(write_card(tmp_path, card_facts(best={**best, "step": 40, "stopped_early": False})))
    assert "`best` hold the weights of the last step, 40; there `eval_loss` was best: 0.31." in body
    assert "`best`" not in parts(write_card(tmp_path, card_facts()))[1]


def test_an_adapter_is_loaded_through_peft(tmp_path):
    front, body = parts(write_card(tmp_path, card_facts(peft=True)))
    assert front["library_name"] == "peft"
    assert "AutoPeftModelForCausalLM.from_pretrained(folder)" in body
    assert "An adapter for `acme/tiny`" in body


def test_local_models_and_data_stay_out_of_what_the_hub_checks(tmp_path):
    front, body = parts(write_card(tmp_path, card_facts(base_model="/models/secret/tiny", datasets=["d.jsonl"])))
    assert "base_model" not in front
    assert "datasets" not in front
    assert "/models/secret" not in body


def test_the_hub_accepts_the_card(tmp_path):
    from huggingface_hub import ModelCard

    card = ModelCard.load(write_card(tmp_path, card_facts()))
    assert card.data.base_model == "acme/tiny"
    assert card.data.tags == ["generated_from_trainer", "alignkit", "dpo"]


@pytest.mark.parametrize("conversational", [True, False])
@pytest.mark.parametrize("peft", [True, False])
def test_the_quick_start_is_python(tmp_path, conversational, peft):
    code = quick_start(parts(write_card(tmp_path, card_facts(conversational=conversational, peft=peft)))[1])
    ast.parse(code)
    assert ("apply_chat_template" in code) is conversational


def test_the_quick_start_runs_on_a_saved_model(tmp_path, monkeypatch, capsys):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "Once": 1, "upon": 2, "a": 3, "time": 4}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    config = LlamaConfig(
        vocab_size=5, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, eos_token_id=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    code = quick_start(parts(write_card(tmp_path, card_facts()))[1])
    monkeypatch.chdir(tmp_path)
    exec(code.replace("max_new_tokens=128", "max_new_tokens=3"), {})
    assert capsys.readouterr().out.endswith("\n")


def test_sections_without_content_are_left_out(tmp_path):
    _, body = parts(write_card(tmp_path, card_facts(paper=None, metrics={})))
    assert "Last metrics" not in body
    assert "Reference" not in body


def test_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("Qwen/Qwen2.5-0.5B-Instruct")
    assert not is_hub_id("pairs.jsonl")
    assert not is_hub_id("./data/pairs")
    assert not is_hub_id("/a/b")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pairs").touch()
    assert not is_hub_id("data/pairs")


@pytest.mark.parametrize(
    ("heads", "loader", "told"),
    [
        (Heads("sequence", ("reward",)), "AutoModelForSequenceClassification", "It scores `reward`, read"),
        (Heads("sequence", ("a", "b")), "AutoPeftModelForSequenceClassification", "It scores `a`, `b`, read"),
        (Heads("token", ("bad", "good")), "AutoModelForTokenClassification", "`good` at every token"),
        (Heads("token", ("value",), hidden=True), "AutoModel", "hidden → ReLU → `value`"),
        (Heads("sequence", ("reward",), members=3), "AutoModelForSequenceClassification", "The 3 models"),
    ],
)
@pytest.mark.parametrize("conversational", [True, False])
def test_the_card_of_a_reward_model_scores(tmp_path, heads, loader, told, conversational):
    facts = card_facts(heads=heads, peft="Peft" in loader, conversational=conversational)
    front, body = parts(write_card(tmp_path, facts))
    code = quick_start(body)
    ast.parse(code)
    assert f"import {loader}\n" in code
    assert "generate" not in code
    assert ('folder = "member-0"' in code) == (heads.members > 1)
    assert front["pipeline_tag"] == ("text" if heads.kind == "sequence" else "token") + "-classification"
    assert told in body


def test_the_card_tells_of_heads_and_of_what_prompts_must_hold(tmp_path):
    _, body = parts(write_card(tmp_path, card_facts(heads=Heads(names=("short", "kind")), notes=["Ask for a 10."])))
    assert "the even mixture of the heads `short`, `kind`" in body
    assert "Ask for a 10." in body
