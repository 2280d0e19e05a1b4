"""From the recipe's list of rewards to scores on completions."""

import math
import subprocess
import sys
import threading
import time

import pytest
import torch
from pydantic import ValidationError

from alignkit.core.config import CombineConfig
from alignkit.core.errors import DataError, RecipeError, RunFailed
from alignkit.core.types import Completion, Group, RewardOutput
from alignkit.rewards.config import RewardConfig
from alignkit.rewards.pipeline import (
    build_sources,
    check_columns,
    reward_batch,
    reward_metrics,
    reward_name,
    score_groups,
)
from alignkit.rewards.rules import WordValence
from alignkit.rewards.transforms import Transform

STOP = 9


def groups():
    """Two prompts with two and one completions."""
    return [
        Group(
            "a",
            [{"role": "user", "content": "p"}],
            [1],
            [Completion("x", [5, STOP]), Completion("yy", [5])],
            plain=True,
        ),
        Group(
            "b", [{"role": "user", "content": "q"}], [1], [Completion("zzz", [5, 6, STOP])], {"answer": 42}, plain=True
        ),
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
        ({"name": "length", "args": {"unit": "lines"}}, r"'length': args.unit: .*'words'.*got 'lines'"),
        ({"name": "length", "args": {"units": "words"}}, r"args.units: Extra inputs.*\nknown args are form, unit"),
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


def test_one_source_is_listed_twice_under_two_labels():
    configs = [RewardConfig(name=f"{__name__}:characters", label=label) for label in ("first", "second")]
    scored = groups()
    score_groups(scored, build_sources(configs), 3, stop_ids=[STOP])
    assert scored[0].completions[1].scores.keys() == {"first", "second"}
    assert [completion.reward for completion in scored[0].completions] == [2.0, 4.0]
    with pytest.raises(ValidationError):
        RewardConfig(name="exact", label="a/b")


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


def one(name, **keys):
    return build_sources([RewardConfig(name=f"{__name__}:{name}", **keys)])


def rewards(scored):
    return [[completion.reward for completion in group.completions] for group in scored]


def test_transforms_rewrite_a_score_and_leave_the_raw_one_beside_it():
    scored = groups()
    transforms = [{"name": "clip", "high": 2.0}, {"name": "soft_clip", "bound": 2.0}]
    score_groups(scored, one("characters", weight=10.0, transforms=transforms), 0, stop_ids=[])
    last = scored[1].completions[0]
    assert last.scores["characters/raw"].value == 3.0
    assert last.scores["characters"].value == pytest.approx(2 * math.tanh(1.0))
    assert last.reward == pytest.approx(20 * math.tanh(1.0))


def test_the_worst_case_and_the_product():
    pair = sources(("characters", 1.0), ("only_long", 2.0))
    for mode, expected in {"min": [[1.0, 2.0], [2.0]], "product": [[1.0, 4.0], [6.0]]}.items():
        scored = groups()
        score_groups(scored, pair, 0, stop_ids=[], combine=CombineConfig(mode=mode))
        assert rewards(scored) == expected


def routed_groups():
    maths, chat = groups()
    maths.fields["task"], chat.fields["task"] = "maths", 7
    return [chat, maths]


def test_a_route_sends_each_row_to_the_rewards_of_its_value():
    configs = [
        RewardConfig(name=f"{__name__}:knows_answer", when="7"),
        RewardConfig(name=f"{__name__}:characters", when="maths"),
        RewardConfig(name=f"{__name__}:only_long", weight=10.0),
    ]
    scored = routed_groups()
    score_groups(scored, build_sources(configs), 0, stop_ids=[], combine=CombineConfig(route="task"))
    assert rewards(scored) == [[52.0], [1.0, 12.0]]
    assert not scored[1].completions[0].scores["knows_answer"].valid


def test_routes_that_lead_nowhere_are_refused():
    maths = one("characters", when="maths")
    with pytest.raises(
        DataError, match=r"group 'b' has 7 in the column 'task', and no reward scores such rows; .*maths"
    ):
        check_columns(routed_groups(), maths, CombineConfig(route="task"))
    with pytest.raises(RecipeError, match=r"`when: maths` needs `combine.route`"):
        check_columns(groups(), maths)
    with pytest.raises(RecipeError, match="no reward has a `when`"):
        check_columns(groups(), one("characters"), CombineConfig(route="task"))


def fails_on_z(completions):
    if any("z" in text for text in completions):
        raise KeyError("z")
    return [1.0] * len(completions)


def nan_on_z(completions):
    return [math.nan if "z" in text else 1.0 for text in completions]


def hangs(completions):
    threading.Event().wait(20)


def test_a_reward_that_raises_stops_the_run_by_default():
    with pytest.raises(RunFailed, match=r"'fails_on_z' failed with KeyError: 'z', for 3 completions, the first 'x'"):
        score_groups(groups(), one("fails_on_z"), 0, stop_ids=[])


@pytest.mark.parametrize("name", ["fails_on_z", "nan_on_z"])
def test_one_bad_text_costs_one_group(name):
    scored = groups()
    kept = score_groups(scored, one(name, on_error="drop_group"), 0, stop_ids=[])
    assert [group.id for group in kept] == ["a"]
    assert rewards(kept) == [[1.0, 1.0]]
    lost = scored[1].completions[0]
    assert math.isnan(lost.reward)
    assert not lost.scores[name].valid
    assert "z" in lost.scores[name].note


def test_a_dropped_group_has_no_reward_from_others_either():
    configs = [RewardConfig(name=f"{__name__}:fails_on_z", on_error="drop_group")]
    scored = groups()
    score_groups(scored, build_sources([*configs, RewardConfig(name=f"{__name__}:characters")]), 0, stop_ids=[])
    assert math.isnan(scored[1].completions[0].reward)


def test_a_failed_row_can_be_given_a_value():
    scored = groups()
    kept = score_groups(scored, one("nan_on_z", on_error="value", error_value=-3.0), 0, stop_ids=[])
    assert rewards(kept) == [[1.0, 1.0], [-3.0]]


@pytest.mark.parametrize(("on_error", "expected"), [("value", [[-1.0, -1.0], [-1.0]]), ("drop_group", [])])
def test_a_reward_that_hangs_is_left_behind(on_error, expected):
    started = time.monotonic()
    source = one("hangs", on_error=on_error, error_value=-1.0, timeout=0.1)
    assert rewards(score_groups(groups(), source, 0, stop_ids=[])) == expected
    assert time.monotonic() - started < 5
    with pytest.raises(RunFailed, match=r"'hangs' did not answer within 0.1 s for 3 completions, the first 'x'"):
        score_groups(groups(), one("hangs", timeout=0.1), 0, stop_ids=[])


def test_what_hangs_does_not_keep_a_process_from_ending():
    code = """
import threading
from alignkit.rewards.calls import in_thread
try:
    in_thread(lambda: threading.Event().wait(), 0.05)
except TimeoutError:
    print("late")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "late\n"


def test_a_failed_call_is_made_again(monkeypatch):
    pauses, calls = [], []
    monkeypatch.setattr(time, "sleep", pauses.append)

    class Flaky:
        requires: tuple[str, ...] = ()

        def score(self, rows, models):
            calls.append(len(rows.completions))
            if len(calls) < 3:
                raise ConnectionError("away")
            return RewardOutput(torch.ones(3), torch.ones(3, dtype=torch.bool))

    scored = groups()
    score_groups(scored, [(RewardConfig(name="flaky", retries=2), Flaky())], 0, stop_ids=[])
    assert (calls, pauses) == ([3, 3, 3], [1.0, 2.0])
    assert rewards(scored) == [[1.0, 1.0], [1.0]]
    calls.clear()
    with pytest.raises(RunFailed, match=r"'flaky' failed 2 times, at last with ConnectionError: away"):
        score_groups(groups(), [(RewardConfig(name="flaky", retries=1), Flaky())], 0, stop_ids=[])


def test_an_infinite_transform_names_reward_row_and_text():
    transforms = [{"name": f"{__name__}:Broken"}]
    with pytest.raises(RunFailed, match=r"'characters': the transform .*Broken' made inf of row 1 \(completion 'yy'\)"):
        score_groups(groups(), one("characters", transforms=transforms), 0, stop_ids=[])


class Broken(Transform):
    def apply(self, scores, valid, table, world):
        return scores / (scores - 2.0)


def test_transforms_say_what_columns_they_read():
    transforms = [{"name": "calibrate"}]
    with pytest.raises(DataError, match="'ref_rewards', which group 'a' lacks"):
        score_groups(groups(), one("characters", transforms=transforms), 0, stop_ids=[])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"transforms": [{"name": "clip", "low": 0.0}, {"name": "calibrate"}]}, "'clip' stands before it"),
        ({"transforms": [{"name": "clip"}]}, "clip needs `low`"),
        ({"transforms": [{"name": "clip", "lo": 1}]}, "lo"),
        ({"on_error": "ignore"}, "on_error"),
        ({"timeout": 0}, "timeout"),
        ({"error_value": math.nan}, "error_value"),
    ],
)
def test_config_bounds(keys, message):
    with pytest.raises(ValidationError, match=message):
        RewardConfig(name="length", **keys)


def test_advantages_are_no_place_for_the_worst_case():
    with pytest.raises(ValidationError, match="rewards stay apart"):
        CombineConfig(level="advantage", mode="min")


def test_metrics_by_hand():
    scored, pair = groups(), sources(("characters", 1.0), ("only_long", 0.0))
    score_groups(scored, pair, 0, stop_ids=[])
    found = {name: metric.sum / metric.count for name, metric in reward_metrics(scored, pair).items() if metric.count}
    assert found == pytest.approx(
        {
            "rewards/characters/invalid": 0.0,
            "rewards/characters/mean": 2.0,
            "rewards/characters/std": math.sqrt(0.5),
            "rewards/only_long/invalid": 1 / 3,
            "rewards/only_long/mean": 1.0,
            "reward": 2.0,
            "reward_std": math.sqrt(0.5),
            "frac_reward_zero_std": 0.0,
        }
    )


def test_no_groups_are_scored_without_a_call():
    assert score_groups([], one("fails_on_z", transforms=[{"name": "whiten"}]), 0, stop_ids=[]) == []
