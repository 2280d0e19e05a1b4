"""Operations on rows: reward-augmented pairs, the text of a goal and back, and how a recipe names them."""

import copy
import json
from collections import Counter

import pytest
import torch
from pydantic import ValidationError

from alignkit import load_recipe
from alignkit.algorithms.dpo import DPO, DPOConfig
from alignkit.core import DataError, RecipeError, register
from alignkit.data.config import DataConfig
from alignkit.data.groups import load_groups
from alignkit.data.operations import Item, Operation, OperationConfig, build_operation
from alignkit.data.operations.multi_answer_prompt import MultiAnswerPrompt, MultiAnswerPromptConfig
from alignkit.data.operations.reward_augment import RewardAugment, RewardAugmentConfig
from alignkit.data.shapes import BadRow, to_example
from alignkit.plan import check
from alignkit.recipe import departures, dump_recipe, recipe_schema
from tests.algorithms.fakes import pair_batch, reduce_terms

CHAT = (
    "{% for m in messages %}<turn>{{ m.role }} {{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant {% endif %}"
)
PAIR = {"prompt": "q", "chosen": "good", "rejected": "poor", "score_chosen": 8.0, "score_rejected": 3.5}
CHATTING = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "more"},
]
PLACEMENTS = ["system", "user_prefix"]


def augment(**keys) -> RewardAugment:
    return RewardAugment(RewardAugmentConfig(name="reward_augment", **{"placement": "user_prefix", **keys}))


def item(row: dict, shape: str = "preference", **fields) -> Item:
    return Item("id", to_example(row, shape), fields)


def answers(made: list[Item]) -> list[tuple[str, str, str, str]]:
    """(pair, side, chosen, rejected) of every row."""
    return [
        (
            one.fields["pair_id"],
            one.fields["aug_side"],
            *(c if isinstance(c, str) else c[-1]["content"] for c in one.example.completions),
        )
        for one in made
    ]


def test_a_pair_becomes_two_each_under_the_score_of_what_it_prefers():
    made = augment(text="{goal} of {highest}:", separator=" ").apply(item(PAIR, scores=1, margin=2, topic="x"))
    assert [one.example.prompt for one in made] == ["8 of 10: q", "3.5 of 10: q"]
    assert answers(made) == [("id", "pos", "good", "poor"), ("id", "neg", "poor", "good")]
    assert [one.id for one in made] == ["id/pos", "id/neg"]
    assert [one.example.rewards for one in made] == [[1.0, 0.0]] * 2
    assert [one.example.scores for one in made] == [
        [{"score": 8.0}, {"score": 3.5}],
        [{"score": 3.5}, {"score": 8.0}],
    ]
    shared = {"topic": "x", "pair_id": "id"}
    assert made[0].fields == {**shared, "goal": 8.0, "aug_side": "pos", "score_chosen": 8.0, "score_rejected": 3.5}
    assert made[1].fields == {**shared, "goal": 3.5, "aug_side": "neg", "score_chosen": 3.5, "score_rejected": 8.0}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_answers_are_exchanged_in_both_placements(placement):
    made = augment(placement=placement).apply(item(PAIR | {"prompt": CHATTING}))
    (_, _, chosen, rejected), (_, _, turned_chosen, turned_rejected) = answers(made)
    assert (chosen, rejected) == (turned_rejected, turned_chosen) == ("good", "poor")
    assert made[0].example.prompt[-1]["content"] == made[1].example.prompt[-1]["content"] == "more"


def test_lists_give_both_sides_of_every_two_answers_that_differ():
    row = {"prompt": "q", "completions": ["a", "b", "c", "b"], "scores": [2, 9, 2, 5]}
    made = augment().apply(item(row, "ranked"))
    # of six pairs one has equal scores and one equal answers
    assert {(pair, chosen, rejected) for pair, side, chosen, rejected in answers(made) if side == "pos"} == {
        ("id/2-1", "b", "a"),
        ("id/2-3", "b", "c"),
        ("id/4-1", "b", "a"),
        ("id/4-3", "b", "c"),
    }
    turned = {(pair, rejected, chosen) for pair, side, chosen, rejected in answers(made) if side == "neg"}
    assert turned == {(pair, chosen, rejected) for pair, side, chosen, rejected in answers(made) if side == "pos"}
    assert all(one.fields["goal"] == one.example.scores[0]["score"] for one in made)


@pytest.mark.parametrize(
    ("row", "keys", "reason"),
    [
        (PAIR | {"score_rejected": 8.0}, {}, "no score gap"),
        (PAIR | {"score_rejected": 9.0}, {}, "no score gap"),
        (PAIR | {"score_rejected": 7.9}, {}, "no score gap"),  # 7.9 and 8 are one goal
        (PAIR, {"min_gap": 4.5}, "no score gap"),
        (PAIR, {"objective": "clarity"}, "missing value"),
        ({k: v for k, v in PAIR.items() if k != "score_chosen"}, {}, "missing value"),
        (PAIR | {"score_chosen": 11.0}, {}, "malformed"),
    ],
)
def test_rows_it_has_no_use_for_are_named(row, keys, reason):
    with pytest.raises(BadRow) as error:
        augment(**keys).apply(item(row))
    assert error.value.reason == reason
    assert len(augment(min_gap=4.4).apply(item(PAIR))) == 2


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("text", [RewardAugmentConfig(name="x").text, "[{goal}]", "({lowest}-{highest}) +{goal}?"])
def test_the_goal_is_read_back(placement, text):
    operation = augment(placement=placement, text=text, lowest=-2, highest=10)
    for goal in (-2.0, 0.0, 0.5, 7.0, 10.0):
        assert operation.goal_text(goal) == operation.goal_text(goal)
        assert operation.goal_of(operation.conditioned(CHATTING, goal)) == goal
    assert augment(text=text).goal_of("no such text") is None
    assert augment(text="[{goal}]").goal_text(8.0) == "[8]"


def test_where_the_goal_stands():
    before = copy.deepcopy(CHATTING)
    instructed = [{"role": "system", "content": "Be brief."}, *CHATTING]
    system, user = (augment(placement=placement, text="goal {goal}") for placement in PLACEMENTS)
    assert system.conditioned(CHATTING, 7) == [{"role": "system", "content": "goal 7"}, *CHATTING]
    assert system.conditioned(instructed, 7)[0]["content"] == "goal 7\n\nBe brief."
    assert [turn["content"] for turn in user.conditioned(instructed, 7)] == ["Be brief.", "goal 7\n\nq", "a", "more"]
    assert user.conditioned("q", 7) == "goal 7\n\nq"
    assert before == CHATTING
    with pytest.raises(DataError, match="plain-text prompts have no system turn; set `placement: user_prefix`"):
        system.conditioned("q", 7)
    with pytest.raises(BadRow, match="no user turn"):
        user.conditioned([{"role": "system", "content": "Be brief."}], 7)


def test_a_fixed_goal_makes_no_pairs():
    bare = Item("id", to_example({"prompt": "q"}, "prompt"), {})
    (made,) = augment(goal=10, text="{goal}").apply(bare)
    assert (made.id, made.example.prompt, made.example.completions) == ("id", "10\n\nq", [])
    (pair,) = augment(goal=10).apply(item(PAIR))
    assert pair.example.completions == ["good", "poor"]
    with pytest.raises(BadRow, match="missing value"):
        augment().apply(bare)


def test_without_a_goal_text_both_sides_cancel_where_policy_and_reference_agree():
    policy = torch.tensor([[-1.0], [-3.0]], dtype=torch.float64)
    rows = torch.cat([policy, policy.flip(0)])  # pos: good, poor; neg: poor, good
    leaf = rows.clone().requires_grad_()
    out, batch = pair_batch(leaf, rows, torch.ones(4, 1))
    dpo = DPO(DPOConfig(name="dpo"))
    reduce_terms(dpo.loss(out, batch.with_columns({"chosen": batch["mask"]}))[0], batch).backward()
    good, poor = leaf.grad[[0, 3]].sum(), leaf.grad[[1, 2]].sum()
    assert leaf.grad.abs().min() > 0
    assert good.item() == poor.item() == 0.0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"text": "no goal"}, "needs one {goal}"),
        ({"lowest": 10}, "`lowest` must be below `highest`"),
        ({"goal": 11}, "outside the scale from 1 to 10"),
        ({"min_gap": -1}, "min_gap"),
        ({"round_to": 0}, "round_to"),
    ],
)
def test_config_bounds(keys, message):
    with pytest.raises(ValidationError, match=message):
        augment(**keys)


@pytest.fixture
def load(tmp_path, make_renderer):
    """Groups and report of rows under operations."""

    def run(rows, *operations, template=None):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = DataConfig(path=str(path), operations=list(operations))
        stop = ("<end>",) if template else ("</s>",)
        return load_groups(config, make_renderer(template, stop=stop), max_length=128)

    return run


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_groups_twice_as_many_with_the_same_answers(load, make_renderer, placement):
    prompt = [{"role": "user", "content": "the fish"}]
    rows = [PAIR | {"prompt": prompt, "id": name, "score_chosen": score} for name, score in (("a", 8), ("b", 3.5))]
    rows.append(PAIR | {"prompt": prompt, "id": "c", "chosen": "best", "score_chosen": 10})
    untouched = copy.deepcopy(rows)
    groups, report = load(rows, {"name": "reward_augment", "placement": placement}, template=CHAT)
    assert rows == untouched
    assert [group.id for group in groups] == ["a/pos", "a/neg", "c/pos", "c/neg"]
    texts = Counter(completion.text for group in groups for completion in group.completions)
    assert texts == {"good": 2, "poor": 4, "best": 2}
    assert [completion.reward for completion in groups[1].completions] == [1.0, 0.0]
    assert groups[1].completions[0].scores["score"].value == 3.5
    decode = make_renderer(CHAT, stop=("<end>",)).decode
    assert "Target score: 3.5" in decode(groups[1].prompt)
    assert decode(groups[1].prompt).count("<turn>") == (3 if placement == "system" else 2)
    assert report.dropped["no score gap"].examples == ["line 2 (id b): scores 3.5, 3.5"]
    assert report.lines()[0].endswith("3 rows as preference, 5 after operations, 4 kept")
    assert report.bad_fraction == 1 / 5


def test_operations_follow_each_other(load):
    first = {"name": "reward_augment", "placement": "user_prefix", "text": "{goal}", "separator": " "}
    groups, _ = load([PAIR], first, {"name": f"{__name__}:Twice"})
    names = [f"rows.jsonl:1/{side}{end}" for side in ("pos", "neg") for end in ("", "+")]
    assert [group.id for group in groups] == names


class Twice(Operation[OperationConfig]):
    """Every row, and once more."""

    def apply(self, item: Item) -> list[Item]:
        return [item, Item(f"{item.id}+", item.example, item.fields)]


RECIPE = {"output_dir": "runs/x", "model": {"name_or_path": "owner/model"}, "algorithm": {"name": "dpo"}}


def test_a_recipe_names_them_with_their_keys(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(PAIR) + "\n", encoding="utf-8")
    written = tmp_path / "mine.yaml"
    written.write_text(
        "output_dir: runs/x\nmodel: {name_or_path: owner/model}\nalgorithm: {name: dpo}\n"
        f"data: [{{path: {rows}, operations: [{{name: reward_augment, min_gap: 1, placement: user_prefix}}]}}]\n",
        encoding="utf-8",
    )
    recipe = load_recipe(written)
    (operation,) = recipe.data[0].operations
    assert operation == RewardAugmentConfig(name="reward_augment", min_gap=1.0, placement="user_prefix")
    assert isinstance(build_operation(operation), RewardAugment)
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(again) == recipe
    assert load_recipe(recipe.model_dump(by_alias=True)) == recipe
    assert departures(recipe)["data"][0]["operations"] == [
        {"name": "reward_augment", "placement": "user_prefix", "min_gap": 1.0}
    ]
    assert any("the number of steps is known once the data is read" in line for line in check(recipe))


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        ({"name": "reward_augmnt"}, "unknown operation 'reward_augmnt': did you mean 'reward_augment'"),
        ({"name": "reward_augment", "placment": "system"}, "did you mean 'placement'"),
        ({"name": "reward_augment", "placement": "top"}, "expected one of system, user_prefix"),
        ({"name": "reward_augment", "goal": 11}, "outside the scale"),
        ({"name": "alignkit.algorithms.dpo:DPO"}, "expected a subclass of alignkit.data.operations.Operation"),
        ({"min_gap": 1}, "missing key"),
    ],
)
def test_mistakes_are_told(operation, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe({**RECIPE, "data": [{"path": "owner/pairs", "operations": [operation]}]})


def test_the_schema_knows_their_keys():
    choices = recipe_schema()["$defs"]["OperationConfig"]["oneOf"]
    assert {choice["title"] for choice in choices} == {*register.operation.names(), "your own"}
    (ours,) = [choice for choice in choices if choice["title"] == "reward_augment"]
    assert ours["properties"]["placement"]["enum"] == ["system", "user_prefix"]


def test_several_answers_are_asked_for_where_the_user_spoke_last():
    def asking(**keys) -> MultiAnswerPrompt:
        return MultiAnswerPrompt(MultiAnswerPromptConfig(name="multi_answer_prompt", **keys))

    short = asking(text="up to {max_answers} of {1}", separator=" ", max_answers=3)
    (made,) = short.apply(item({"prompt": "q"}, "prompt", answer="x"))
    assert (made.example.prompt, made.fields) == ("q up to 3 of {1}", {"answer": "x"})
    row = item({"prompt": CHATTING}, "prompt")
    (made,) = short.apply(row)
    assert made.example.prompt == [*CHATTING[:2], {"role": "user", "content": "more up to 3 of {1}"}]
    assert row.example.prompt == CHATTING
    assert "up to 8 different answers" in asking().note()
    with pytest.raises(BadRow, match="no user turn"):
        short.apply(item({"prompt": [{"role": "system", "content": "s"}]}, "prompt"))
    with pytest.raises(ValidationError, match="`text` is empty"):
        asking(text="")
