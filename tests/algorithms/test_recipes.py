"""The recipes that ship: each loads as it stands, survives being written down, and says what its comments say."""

from pathlib import Path

import pytest
import yaml

from alignkit.recipe import dump_recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(
    str(path.relative_to(RECIPES)) for method in ("dpo", "sft") for path in RECIPES.glob(f"{method}/*.yaml")
)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_loads_and_survives_being_written_down(name, tmp_path):
    recipe = load_recipe(RECIPES / name)
    assert recipe.algorithm.name == name.split("/")[0]
    written = tmp_path / "recipe.yaml"
    written.write_text(dump_recipe(recipe))
    assert load_recipe(written) == recipe


def test_no_two_recipes_write_to_the_same_folder():
    folders = [load_recipe(RECIPES / name).output_dir for name in SHIPPED]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_the_adapter_recipe_is_its_base_and_an_adapter(method):
    base, lora = (load_recipe(RECIPES / method / f"qwen-0.5b{suffix}.yaml") for suffix in ("", "-lora"))
    assert base.model.lora is None
    assert lora.model.lora.r == 16
    assert lora.data == base.data
    assert lora.algorithm == base.algorithm
    assert lora.train.learning_rate == pytest.approx(10 * base.train.learning_rate)


def test_the_stories_recipe_takes_its_files_from_the_command_line():
    overrides = ["model.name_or_path=M", "data.0.path=P.jsonl", "eval.data.0.path=H.jsonl", "train.learning_rate=5e-4"]
    recipe = load_recipe(RECIPES / "dpo" / "stories.yaml", overrides)
    assert (recipe.model.name_or_path, recipe.data[0].path, recipe.eval.data[0].path) == ("M", "P.jsonl", "H.jsonl")
    untouched = yaml.safe_load((RECIPES / "dpo" / "stories.yaml").read_text())
    assert recipe.train.learning_rate == untouched["train"]["learning_rate"] == 5e-4
