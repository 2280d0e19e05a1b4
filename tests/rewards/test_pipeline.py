"""From the recipe's list of rewards to scores on completions."""

import math
import subprocess
import sys

import pytest
import torch

from alignkit.core.errors import DataError, RecipeError, RunFailed
from alignkit.core.types import Completion, Group, RewardOutput
from alignkit.rewards.config import RewardConfig
from alignkit.rewards.pipeline import build_sources, reward_batch, reward_name, score_groups
from alignkit.rewards.rules import WordValence

STOP = 9


def groups():
    """Two prompts with two and one completions."""
    return [
        Group("a", [{"role": "user", "content": "p"}], [1], [Completion("x", [5, STOP]), Completion("yy", [5])]),
        Group("b", [{"role": "user", "content": "q"}], [1], [Completion("zzz", [5, 6, STOP])], {"answer": 42}),
    ]


def characters(completions):
    return [float(len(text)) for text in completions]


def only_long(completions):
    return [1.0 if len(text) > 1 else None for text in completions]


def knows_answer(completions, answer):
    return [float(a) for a in answer]


class Answers:
    """A source that answers what it was given."""

    requires: tuple[str, ...] = ()

    def __init__(self, output):
        self.output = output

    def score(self, rows, models):
        return self.output


def sources(*pairs):
    return build_sources([RewardConfig(name=f"{__name__}:{name}", weight=weight) for name, weight in pairs])


def test_reward_is_the_weighted_sum_of_valid_scores():
    scored = groups()
    score_groups(scored, sources(("characters", 2.0), ("only_long", -0.5)), 3, stop_ids=[STOP])
    first, second, third = (c for group in scored for c in group.completions)
    assert [c.scores["characters"].value for c in (first, second, third)] == [1.0, 2.0, 3.0]
    assert [c.scores["only_long"].valid for c in (first, second, third)] == [False, True, True]
    assert [first.reward, second.reward, third.reward] == [2.0, 3.5, 5.5]


def test_a_completion_nobody_scored_keeps_nan():
    scored = groups()
    score_groups(scored, sources(("only_long", 1.0)), 0, stop_ids=[])
    assert math.isnan(scored[0].completions[0].reward)
    assert scored[0].completions[1].reward == 1.0


def test_without_sources_rewards_stay_as_they_came():
    scored = [Group("a", [], [1], [Completion("x", [5], reward=1.0)])]
    score_groups(scored, [], 0, stop_ids=[])
    assert scored[0].completions[0].reward == 1.0
    score_groups([Group("a", [], [1])], sources(("characters", 1.0)), 0, stop_ids=[])


def test_rows_are_flat_padded_and_aligned():
    batch = reward_batch(groups(), 7, [STOP])
    assert batch.completions == ["x", "yy", "zzz"]
    assert [prompt[0]["content"] for prompt in batch.prompts] == ["p", "p", "q"]
    assert batch.completion_ids.tolist() == [[5, STOP, 0], [5, 0, 0], [5, 6, STOP]]
    assert batch.completion_mask.tolist() == [[True, True, False], [True, False, False], [True] * 3]
    assert batch.group.tolist() == [0, 0, 1]
    assert batch.ended.tolist() == [True, False, True]
    assert batch.columns == {"answer": [None, None, 42]}
    assert batch.step == 7


def test_missing_column_is_named_before_the_function_is_called():
    with pytest.raises(DataError, match=r"knows_answer.*reads the column 'answer'.*group 'a' lacks.*none"):
        score_groups(groups(), sources(("knows_answer", 1.0)), 0, stop_ids=[])


def test_registered_names_are_built_with_their_args(tmp_path):
    path = tmp_path / "words.tsv"
    path.write_text("zzz\t3\n")
    built = build_sources([RewardConfig(name="word_valence", args={"lexicon": str(path)})])
    assert isinstance(built[0][1], WordValence)
    scored = groups()
    score_groups(scored, built, 0, stop_ids=[])
    assert [c.reward for group in scored for c in group.completions] == [0.0, 0.0, 3.0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "word_valance"}, r"unknown reward 'word_valance': did you mean 'word_valence'"),
        ({"name": "length", "args": {"unit": "tokens"}}, r"'length': args.unit: .*'words'.*got 'tokens'"),
        ({"name": "length", "args": {"units": "words"}}, r"args.units: Extra inputs.*\nknown args are unit"),
        ({"name": f"{__name__}:characters", "args": {"x": 1}}, r"args \['x'\] were given, but a plain function"),
        ({"name": f"{__name__}:STOP"}, r"is a int; expected a function"),
        ({"name": f"{__name__}:Answers"}, r"the class Answers has no `config_type`"),
        ({"name": "no_such_module:f"}, r"there is no module 'no_such_module'"),
    ],
)
def test_mistakes_in_the_recipe(config, message):
    with pytest.raises(RecipeError, match=message):
        build_sources([RewardConfig(**config)])


def test_two_rewards_of_one_name_are_refused():
    with pytest.raises(RecipeError, match="'characters' is listed 2 times"):
        sources(("characters", 1.0), ("characters", 2.0))


def test_components_and_dense_rewards_are_kept():
    scored = groups()
    output = RewardOutput(
        score=torch.tensor([1.0, 2.0, 3.0]),
        valid=torch.tensor([True, True, False]),
        per_token=torch.tensor([[0.5, 0.5, 0.0], [2.0, 0.0, 0.0], [1.0, 1.0, 1.0]]),
        components={"style": torch.tensor([0.1, 0.2, 0.3])},
    )
    score_groups(scored, [(RewardConfig(name="mine"), Answers(output))], 0, stop_ids=[])
    first, second, third = (c for group in scored for c in group.completions)
    assert first.scores["mine"].per_token == [0.5, 0.5]
    assert second.scores["mine"].per_token == [2.0]
    assert second.scores["mine/style"].value == pytest.approx(0.2)
    assert not third.scores["mine/style"].valid


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (torch.tensor([1.0, float("nan"), 0.0]), r"'mine' answered nan in 'mine' for row 1 \(completion 'yy'\)"),
        (torch.tensor([1.0, 0.0]), r"'mine' answered 'mine' of shape \(2,\) for 3 completions"),
    ],
)
def test_broken_sources_stop_the_run(score, message):
    source = Answers(RewardOutput(score=score, valid=torch.ones(3, dtype=torch.bool)))
    with pytest.raises(RunFailed, match=message):
        score_groups(groups(), [(RewardConfig(name="mine"), source)], 0, stop_ids=[])


def test_names_of_functions_are_their_own():
    assert reward_name(RewardConfig(name="my_pkg.rewards:exact")) == "exact"
    assert reward_name(RewardConfig(name="word_valence")) == "word_valence"


def test_building_rewards_imports_no_torch():
    code = """
import sys
from alignkit.rewards.config import RewardConfig
from alignkit.rewards.pipeline import build_sources
build_sources([RewardConfig(name="word_valence"), RewardConfig(name="length")])
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
