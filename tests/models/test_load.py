"""Which tokens end a completion, and what is refused at the door."""

import json
import shutil

import pytest

from alignkit.core.errors import DataError, RecipeError
from alignkit.models.config import ModelConfig
from alignkit.models.load import adapter_base, fingerprint, load_policy, load_renderer, load_tokenizer, stop_ids
from alignkit.testing import build_tiny_model


@pytest.fixture
def model(tmp_path):
    return build_tiny_model(tmp_path / "model")


def config_of(folder):
    return ModelConfig(name_or_path=str(folder), dtype="float32")


def set_key(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def ids_of(folder):
    config = config_of(folder)
    return stop_ids(config, load_tokenizer(config))


def test_every_eos_of_the_generation_config_stops(model):
    set_key(model / "generation_config.json", eos_token_id=[7, 9])
    assert ids_of(model) == {2, 7, 9}
    assert load_renderer(config_of(model)).stop_ids == {2, 7, 9}


def test_single_eos_of_the_generation_config_stops(model):
    set_key(model / "generation_config.json", eos_token_id=7)
    assert ids_of(model) == {2, 7}


def test_model_without_generation_config_has_its_tokenizers_eos(model):
    (model / "generation_config.json").unlink()
    assert ids_of(model) == {2}


def without_eos(model):
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer.pop("eos_token")
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def test_eos_of_the_generation_config_alone_will_do(model):
    without_eos(model)
    set_key(model / "generation_config.json", eos_token_id=[9, 7])
    renderer = load_renderer(config_of(model))
    assert renderer.stop_ids == {7, 9}
    assert renderer.eos_id == 7


def test_model_without_any_eos_is_refused(model):
    without_eos(model)
    (model / "generation_config.json").unlink()
    with pytest.raises(DataError, match=r"names no end-of-text token.*tokenizer_config.json"):
        load_renderer(config_of(model))


def test_folder_without_a_model_is_explained(tmp_path, model):
    with pytest.raises(RecipeError, match=r"model.name_or_path: cannot load the model from .*Expected a folder"):
        load_policy(config_of(tmp_path / "nothing"))
    (model / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"model.name_or_path: cannot load the model from"):
        load_policy(config_of(model))


def test_chat_template_of_the_recipe_replaces_the_models_own(model, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0].content }}")
    config = config_of(model).model_copy(update={"chat_template": str(template)})
    assert load_tokenizer(config).chat_template == "{{ messages[0].content }}"


def test_adapter_folder_names_its_base(tmp_path, model):
    assert adapter_base(str(model)) is None
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/model"}))
    assert adapter_base(str(tmp_path)) == "some/model"


def test_fingerprint_is_of_the_weights_alone(model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    first = fingerprint(load_policy(config_of(model)))
    assert fingerprint(load_policy(config_of(tmp_path / "copy"))) == first
    assert fingerprint(load_policy(config_of(build_tiny_model(tmp_path / "other", seed=1)))) != first
