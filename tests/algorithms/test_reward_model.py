"""Reward models by hand: pairs, lists, ties, ensembles, collaborators, attributes and steps, and what a run saves."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from alignkit import ops, testing
from alignkit.algorithms.reward_model import HELPER, RewardModel, RewardModelConfig, bag_weight
from alignkit.core import Completion, DataError, Forward, Group
from alignkit.core.types import Score
from alignkit.data.collate import collate
from alignkit.dist.world import LocalWorld
from alignkit.run import train
from alignkit.track.metrics import values
from tests.algorithms.fakes import reduce_terms

LN_2 = math.log(2)


def model(**keys) -> RewardModel:
    return RewardModel(RewardModelConfig(name="reward_model", **keys))


def group(rewards=(1.0, 0.0), lengths=None, name="g", **fields) -> Group:
    lengths = lengths or [2] * len(rewards)
    answers = [
        Completion(str(i), [10 + i] * n, reward=r) for i, (r, n) in enumerate(zip(rewards, lengths, strict=True))
    ]
    return Group(name, [], [7, 8], answers, fields)


def batch_of(algorithm, groups, scores, *, held_out=False):
    """A batch of these groups and a forward whose rows score `scores`, [N] or [N, H]; the leaf comes first."""
    batch = collate(algorithm.build(groups))
    leaf = torch.tensor(scores, dtype=torch.float64).reshape(len(scores), -1).requires_grad_()
    table = torch.zeros(*batch["mask"].shape, leaf.shape[1], dtype=torch.float64)
    rows = batch["mask"].any(-1)
    where = batch["mask"].to(torch.uint8).argmax(-1)
    table = table.index_put((rows.nonzero().flatten(), where[rows]), leaf[rows])
    batch = batch.with_columns({"policy.scores": table.detach()})
    annotate = algorithm.annotate_held_out if held_out else algorithm.annotate
    return leaf, Forward(logps=torch.zeros(batch["mask"].shape), scores=table), annotate(batch, LocalWorld())


def loss_of(algorithm, groups, scores):
    leaf, out, batch = batch_of(algorithm, groups, scores)
    terms, metrics = algorithm.loss(out, batch)
    loss = reduce_terms(terms, batch)
    loss.backward()
    return loss.item(), leaf.grad, algorithm.derive(values(metrics))


def plain(**keys) -> RewardModel:
    return model(center=0.0, **keys)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_a_row_is_scored_behind_its_last_token():
    ((chosen, rejected),) = plain().build([group(rewards=(0.0, 1.0), lengths=[1, 2])])
    assert chosen.tokens == [7, 8, 11, 11, 11]
    assert chosen.trained == [False, False, False, False, True]
    assert chosen.inputs == {"prompt": 2.0}
    assert rejected.tokens == [7, 8, 10, 10]


def test_equal_scores_lose_ln_2_and_gradients_are_opposite():
    loss, grad, metrics = loss_of(plain(), [group()], [0.4, 0.4])
    assert loss == pytest.approx(LN_2)
    assert grad.flatten().tolist() == pytest.approx([-0.5, 0.5])
    assert metrics["rewards/accuracies"] == 0.5, "a collapsed model is not right"
    loss, grad, metrics = loss_of(plain(), [group()], [1.5, -0.5])
    assert loss == pytest.approx(-math.log(sigmoid(2)))
    assert grad.flatten().tolist() == pytest.approx([-sigmoid(-2), sigmoid(-2)])
    assert metrics["rewards/accuracies"] == 1.0
    assert metrics["rewards/margins"] == pytest.approx(2.0)


def test_a_shift_of_all_scores_moves_the_centering_alone():
    pair = [group()]
    assert loss_of(plain(), pair, [1.5, -0.5])[0] == pytest.approx(loss_of(plain(), pair, [4.5, 2.5])[0])
    shifted = loss_of(model(center=0.1), pair, [4.5, 2.5])[0] - loss_of(plain(), pair, [4.5, 2.5])[0]
    assert shifted == pytest.approx(0.1 * 49)


def test_smoothing_margins_and_weights_by_hand():
    right, wrong = -math.log(sigmoid(2)), -math.log(sigmoid(-2))
    cases = [
        ({"label_smoothing": 0.1}, {}, 0.9 * right + 0.1 * wrong),
        ({"loss_type": "margin"}, {"margin": 3.0}, -math.log(sigmoid(-1))),
        ({"loss_type": "margin"}, {"strength": -3}, -math.log(sigmoid(-1))),
        ({"loss_type": "scaled"}, {"margin": 3.0}, 3 * right),
        ({}, {"weight": 0.25}, 0.25 * right),
        ({"tie_weight": 0.5}, {"is_tie": True}, 0.5 * 4),
    ]
    for keys, fields, expected in cases:
        assert loss_of(plain(**keys), [group(**fields)], [1.5, -0.5])[0] == pytest.approx(expected), keys


def test_margins_of_judged_pairs_are_the_differences_of_their_scores():
    pair = group()
    for answer, score in zip(pair.completions, (4.5, 3.0), strict=True):
        answer.scores["score"] = Score(score)
    assert loss_of(plain(loss_type="margin"), [pair], [1.5, -0.5])[0] == pytest.approx(-math.log(sigmoid(0.5)))


@pytest.mark.parametrize("fields", [{}, {"margin": -1.0}, {"margin": "much"}])
def test_a_margin_that_is_not_known_is_refused(fields):
    with pytest.raises(DataError, match=r"row 'g'.*(by how much|negative|expected a number)"):
        model(loss_type="margin").build([group(**fields)])


def test_a_tie_is_pulled_together_and_no_accuracy():
    loss, grad, metrics = loss_of(plain(), [group(is_tie=True), group(name="h")], [0.3, 0.3, 2.0, 0.0])
    assert loss == pytest.approx(-math.log(sigmoid(2)) / 2)
    assert grad[:2].abs().sum() == 0
    assert metrics["rewards/accuracies"] == 1.0


def test_the_pairs_of_a_prompt_count_as_one():
    """Three answers, three pairs, and a prompt of one pair: each prompt is half of the loss."""
    scores = [2.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    algorithm = plain(list_length=4)
    lists = [group((3.0, 2.0, 2.0)), group((1.0, 0.0), name="h")]
    by_hand = (-math.log(sigmoid(1)) - math.log(sigmoid(2)) + 1.0) / 3, -math.log(sigmoid(1))
    loss, grad, metrics = loss_of(algorithm, lists, scores)
    assert loss == pytest.approx(sum(by_hand) / 2), "of equal ranks the pair is a tie"
    assert grad[3].abs().sum() == 0 == grad[6:].abs().sum()
    assert metrics["mean_reward"] == pytest.approx(4 / 5)


def test_a_list_of_two_is_a_pair_however_long_lists_may_be():
    as_list = loss_of(model(list_length=3), [group()], [1.5, -0.5, 0.0])
    assert as_list[0] == pytest.approx(loss_of(model(), [group()], [1.5, -0.5])[0])


def test_long_lists_are_thinned_and_keep_their_ends():
    (unit,) = model(list_length=3).build([group((5.0, 4.0, 3.0, 2.0, 1.0))])
    assert [row.tokens[2] for row in unit] == [10, 12, 14]


def test_what_is_logged_by_hand():
    pairs = [group(lengths=[4, 2]), group(lengths=[1, 5], name="h"), group(lengths=[3, 3], name="i")]
    _, _, metrics = loss_of(plain(), pairs, [1.0, 0.0, 0.0, 1.0, 2.0, 0.0])
    assert metrics["rewards/longer_wins"] == pytest.approx(0.5)
    assert metrics["rewards/accuracies"] == pytest.approx(2 / 3)
    assert metrics["mean_reward"] == pytest.approx(4 / 6)
    assert metrics["std_reward"] == pytest.approx((6 / 6 - (4 / 6) ** 2) ** 0.5)
    # two claims of σ(1), one of them wrong, and one of σ(2), right
    assert metrics["calibration/ece"] == pytest.approx((abs(2 * sigmoid(1) - 1) + (1 - sigmoid(2))) / 3)
    assert not any(name.startswith(HELPER) for name in metrics)


def test_of_the_length_the_better_direction_counts():
    _, _, metrics = loss_of(plain(), [group(lengths=[1, 5])], [0.0, 0.0])
    assert metrics["rewards/longer_wins"] == 0.0
    assert metrics["rewards/length_accuracies"] == 1.0


def test_pairs_by_finite_differences():
    keys = {"loss_type": "margin", "center": 0.3, "label_smoothing": 0.1, "list_length": 3}
    algorithm = model(**keys)
    lists = [group((3.0, 2.0, 2.0)), group((1.0, 0.0), name="h")]
    for one in lists:
        for answer in one.completions:
            answer.scores["score"] = Score(answer.reward)
    _, out, batch = batch_of(algorithm, lists, [0.1] * 6)

    def terms_of(scores):
        table = torch.zeros_like(out.scores).masked_scatter(batch["mask"][..., None], scores)
        terms, _ = algorithm.loss(Forward(logps=out.logps, scores=table), batch)
        return tuple(term.value for term in terms.values())

    leaf = torch.tensor([0.5, -1.0, 0.3, 2.0, 1.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(terms_of, leaf)


def test_members_have_losses_of_their_own():
    pairs = [group(), group(name="h")]
    both = [[1.0, 0.2], [0.0, 0.7], [0.5, 2.0], [1.0, -1.0]]
    loss, grad, metrics = loss_of(model(members=2, bootstrap=False), pairs, both)
    alone = [loss_of(model(), pairs, [row[m] for row in both]) for m in range(2)]
    assert loss == pytest.approx(sum(one for one, _, _ in alone))
    for m in range(2):
        torch.testing.assert_close(grad[:, m : m + 1], alone[m][1])
    assert metrics["members/std"] == pytest.approx((0.4 + 0.35 + 0.75 + 1.0) / 4)
    assert metrics["members/disagreement"] == 1.0
    assert metrics["rewards/accuracies"] == 1.0, "means of 0.6 and 0.35, 1.25 and 0"


def test_members_draw_rows_as_a_bootstrap_does():
    counts = torch.tensor([[bag_weight(f"row-{i}", m) for i in range(2000)] for m in range(2)])
    assert counts.mean(1).tolist() == pytest.approx([1.0, 1.0], abs=0.08)
    assert (counts == 0).double().mean(1).tolist() == pytest.approx([math.exp(-1)] * 2, abs=0.04)
    assert counts.var(1).tolist() == pytest.approx([1.0, 1.0], abs=0.15)
    assert not torch.equal(counts[0], counts[1])


def test_a_bag_weighs_training_and_not_evaluation():
    algorithm = plain(members=2)
    pairs = [group(name=f"row-{i}") for i in range(6)]
    scores = [[0.0, 0.0]] * 12
    bags = [[bag_weight(f"row-{i}", m) for i in range(6)] for m in range(2)]
    assert loss_of(algorithm, pairs, scores)[0] == pytest.approx(LN_2 * sum(map(sum, bags)) / 6)
    _, out, batch = batch_of(algorithm, pairs, scores, held_out=True)
    assert reduce_terms(algorithm.loss(out, batch)[0], batch).item() == pytest.approx(2 * LN_2)


COLLABORATION = {"collaborative": {"noise_rate": 0.5, "warmup_steps": 2}}


def four_pairs(first, second):
    """Scores of four pairs with these margins of the two models."""
    return [side for pair in zip(first, second, strict=True) for side in (list(pair), [0.0, 0.0])]


def test_each_model_trains_on_what_the_other_finds_credible():
    algorithm = plain(**COLLABORATION)
    assert algorithm.needs.columns == {"policy.scores"}
    pairs = [group(name=str(i), is_noisy=i == 3) for i in range(4)]
    scores = four_pairs([4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0])
    kept = []
    for _ in range(4):
        _, out, batch = batch_of(algorithm, pairs, scores)
        kept.append([batch[f"kept_{m}"].tolist() for m in range(2)])
    assert kept[0] == [[True] * 4, [True] * 4]
    assert kept[1] == [[False, True, True, True], [True, True, True, False]]
    two = [[False, False, True, True], [True, True, False, False]]
    assert kept[2] == kept[3] == two, "the warm-up takes two rounds"
    terms, metrics = algorithm.loss(out, batch)
    reduce_terms(terms, batch)
    assert values(metrics)["collaborative/kept"] == 0.5
    assert values(metrics)["collaborative/clean"] == 0.75


def test_an_evaluation_moves_no_schedule_and_leaves_nothing_out():
    algorithm = plain(**COLLABORATION)
    pairs, scores = [group(name=str(i)) for i in range(4)], four_pairs([4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0])
    batch_of(algorithm, pairs, scores)
    before = algorithm.state_dict()
    _, _, batch = batch_of(algorithm, pairs, scores, held_out=True)
    assert algorithm.state_dict() == before == {"rounds": 1}
    assert batch["kept_0"].all()
    again = plain(**COLLABORATION)
    again.load_state_dict(before)
    resumed, gone_on = (batch_of(a, pairs, scores)[2]["kept_0"].tolist() for a in (again, algorithm))
    assert resumed == gone_on == [False, True, True, True]


def test_without_noise_two_collaborators_are_two_runs():
    pairs = [group(), group(name="h")]
    both = [[1.0, 0.2], [0.0, 0.7], [0.5, 2.0], [1.0, -1.0]]
    quiet = model(collaborative={"noise_rate": 0.0, "warmup_steps": 0})
    expected = loss_of(model(members=2, bootstrap=False), pairs, both)
    loss, grad, _ = loss_of(quiet, pairs, both)
    assert loss == pytest.approx(expected[0])
    torch.testing.assert_close(grad, expected[1])


GRADED = {"kind": "attribute_regression", "attributes": ["helpful", "long"]}


def test_grades_that_are_missing_do_not_count():
    """Entries known: 2 − 1, 0 − 0, 3 − 1 and none of `long` in the second row."""
    rows = [
        Group("a", [], [7], [Completion("", [9])], {"helpful": 1, "long": 0.0}),
        Group("b", [], [7], [Completion("", [9])], {"helpful": 1, "long": None}),
    ]
    loss, grad, metrics = loss_of(model(**GRADED), rows, [[2.0, 0.0], [3.0, 50.0]])
    assert loss == pytest.approx((1 + 0 + 4) / 3)
    assert grad.tolist() == [[pytest.approx(2 / 3), 0.0], [pytest.approx(4 / 3), 0.0]]
    assert metrics["mse/helpful"] == pytest.approx(2.5)
    assert "r2/helpful" not in metrics, "without variance nothing is explained"
    assert metrics["mean_reward"] == pytest.approx((1.0 + 26.5) / 2)


def test_explained_variance_and_goal_by_hand():
    rows = [Group(str(g), [], [7], [Completion("", [9])], {"helpful": g}) for g in (0, 2)]
    _, _, metrics = loss_of(model(**GRADED, goal={"helpful": 2.0, "long": -1.0}), rows, [[0.5, 1.0], [2.0, 1.0]])
    assert metrics["r2/helpful"] == pytest.approx(1 - 0.125 / 1)
    assert metrics["mean_reward"] == pytest.approx((0.0 + 3.0) / 2)


def test_grades_of_lists_and_of_judges():
    ranked = Group("r", [], [7], group((2.0, 1.0)).completions, {"attributes": {"helpful": [3, None], "long": [1, 2]}})
    judged = group((1.0, 0.0), name="j")
    judged.completions[0].scores["helpful"] = Score(4.0)
    judged.completions[1].scores["long"] = Score(0.0)
    algorithm = model(**GRADED)
    assert algorithm.count_units(ranked) == 2
    facts = [{k: v for k, v in row.scalar.items() if k != "length"} for (row,) in algorithm.build([ranked, judged])]
    assert facts == [
        {"known_0": 1.0, "known_1": 1.0, "grade_0": 3.0, "grade_1": 1.0},
        {"known_0": 0.0, "known_1": 1.0, "grade_0": 0.0, "grade_1": 2.0},
        {"known_0": 1.0, "known_1": 0.0, "grade_0": 4.0, "grade_1": 0.0},
        {"known_0": 0.0, "known_1": 1.0, "grade_0": 0.0, "grade_1": 0.0},
    ]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "has none of the attributes helpful, long"),
        ({"helpful": "very"}, "'helpful' is 'very', expected a number"),
        ({"attributes": {"long": [1, 2, 3]}}, "has 3 entries for 1 answers"),
    ],
)
def test_answers_without_grades_are_refused(fields, said):
    with pytest.raises(DataError, match=said):
        model(**GRADED).build([Group("a", [], [7], [Completion("", [9])], fields)])


def solution(labels, ends=(2, 3, 5), **fields) -> Group:
    answer = Completion("", [10, 11, 12, 13, 2], step_ends=list(ends))
    return Group("s", [], [7, 8], [answer], {"labels": labels, **fields})


def step_forward(batch, scores):
    leaf = torch.tensor(scores, dtype=torch.float64).requires_grad_()
    table = torch.zeros(*batch["mask"].shape, leaf.shape[-1], dtype=torch.float64)
    return leaf, Forward(torch.zeros(batch["mask"].shape), scores=table.masked_scatter(batch["mask"][..., None], leaf))


def test_steps_are_scored_behind_their_ends():
    ((row,),) = model(kind="prm").build([solution([True, False, 0.25])])
    assert row.tokens == [7, 8, 10, 11, 12, 13, 2, 2]
    assert [t for t, flag in enumerate(row.trained) if flag] == [4, 5, 7]
    assert [row.token["target"][t] for t in (4, 5, 7)] == [1.0, 0.0, 0.25]


def test_steps_by_hand():
    algorithm = model(kind="prm")
    batch = collate(algorithm.build([solution([True, True, False]), solution([True], ends=(5,))]))
    leaf, out = step_forward(batch, [[0.0, 2.0], [1.0, 0.0], [0.0, 0.0], [0.0, 3.0]])
    terms, metrics = algorithm.loss(out, batch)
    loss = reduce_terms(terms, batch)
    loss.backward()
    expected = [-math.log(sigmoid(2)), -math.log(sigmoid(-1)), LN_2, -math.log(sigmoid(3))]
    assert loss.item() == pytest.approx(sum(expected) / 4)
    assert leaf.grad[2].tolist() == pytest.approx([-0.125, 0.125])
    logged = algorithm.derive(values(metrics))
    assert logged["rewards/accuracies"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert logged["rewards/majority_accuracies"] == 0.75
    assert logged["steps/first_error"] == 0.0, "it says the second, and the third is"
    assert logged["steps/mean_count"] == 2.0


def test_labels_become_classes_by_a_threshold():
    ((row,),) = model(kind="prm", threshold=0.5).build([solution([0.2, 0.5, 7.0])])
    assert [row.token["target"][t] for t in (4, 5, 7)] == [0.0, 1.0, 1.0]


def test_values_by_hand():
    """The mean over a solution's steps first, then over solutions."""
    algorithm = model(kind="prm", form="value", gamma=0.5)
    groups = [solution([True, True, False], outcome=True), solution([True], ends=(5,), outcome=False)]
    batch = collate(algorithm.build(groups))
    _, out = step_forward(batch, [[0.0], [0.5], [3.0], [1.0]])
    terms, metrics = algorithm.loss(out, batch)
    assert reduce_terms(terms, batch).item() == pytest.approx(((0.0625 + 0 + 4) / 3 + 1) / 2)
    assert algorithm.derive(values(metrics))["mse/value"] == pytest.approx(5.0625 / 4)
    rates = model(kind="prm", form="value", targets="labels").build([solution([0.5, 0.75, 1.0])])
    assert rates[0][0].token["target"][7] == 1.0


@pytest.mark.parametrize(
    ("keys", "row", "said"),
    [
        ({}, solution([True, False]), "2 labels for 3 steps"),
        ({}, solution([True] * 3, ends=(2, 3, 9)), "no `overlong: cut`"),
        ({}, replace(solution([True]), completions=[Completion("", [10, 2])]), "1 labels for 0 steps"),
        ({}, solution([1, 0, 3]), "no probabilities"),
        ({"form": "value"}, solution([True] * 3), "has no `outcome`"),
    ],
)
def test_steps_that_do_not_fit_are_refused(keys, row, said):
    with pytest.raises(DataError, match=said):
        model(kind="prm", **keys).build([row])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"attributes": ["a"]}, "`attributes` belongs to `kind: attribute_regression`"),
        ({"kind": "prm", "center": 0.1}, "`center` belongs to `kind: bradley_terry`"),
        ({"kind": "prm", "gamma": 0.5}, "`gamma` belongs to `form: value`"),
        ({"kind": "prm", "form": "value", "threshold": 0.5}, "`threshold` belongs to `form: classifier`"),
        ({"kind": "attribute_regression"}, "at least one, and each once"),
        ({"kind": "attribute_regression", "attributes": ["a", "a"]}, "at least one, and each once"),
        ({"kind": "attribute_regression", "attributes": ["a"], "goal": {"b": 1.0}}, "weighs 'b'"),
        ({"collaborative": {}, "members": 3}, "two models on pairs"),
        ({"collaborative": {"noise": 0.1}}, "noise"),
    ],
)
def test_keys_of_another_kind_are_refused(keys, said):
    with pytest.raises(ValidationError, match=said):
        model(**keys)


def letters(draw, shortest, longest):
    return "".join(draw.choices(testing.SYMBOLS[:26], k=draw.randint(shortest, longest)))


def stepwise_rows():
    draw = random.Random(1)
    return [
        {
            "prompt": letters(draw, 2, 9),
            "completions": [letters(draw, 2, 6) for _ in range(1 + i % 3)],
            "labels": [bool(draw.randint(0, 1)) for _ in range(1 + i % 3)],
            "outcome": bool(i % 2),
        }
        for i in range(7)
    ]


def graded_rows():
    return [
        {"prompt": "abc" + "de" * (i % 3), "completion": "x" * (1 + i), "good": i % 5, **({"long": i} if i % 2 else {})}
        for i in range(7)
    ]


def ranked_rows():
    draw = random.Random(3)
    return [
        {
            "prompt": "abc" + "de" * (i % 3),
            "completions": [letters(draw, 2, 6) for _ in range(2 + i % 3)],
            "scores": [draw.randint(0, 3) for _ in range(2 + i % 3)],
        }
        for i in range(7)
    ]


KINDS = {
    "ensemble": ({"members": 2}, None),
    "collaborative": ({"collaborative": {"warmup_steps": 2, "noise_rate": 0.3}}, None),
    "lists": ({"list_length": 4, "loss_type": "scaled"}, ranked_rows()),
    "attributes": ({"kind": "attribute_regression", "attributes": ["good", "long"]}, graded_rows()),
    "steps": ({"kind": "prm"}, stepwise_rows()),
    "values": ({"kind": "prm", "form": "value"}, stepwise_rows()),
}


def bench_of(kind, folder):
    config, rows = KINDS[kind]
    return testing.Bench("reward_model", config=config, rows=rows, folder=folder)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_the_contract(kind, tmp_path):
    """The default, one model on pairs, goes through all of it in tests/contract."""
    bench = bench_of(kind, tmp_path)
    testing.check_config(bench)
    testing.check_micro_batches(bench)
    testing.check_order(bench)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_the_rest_of_the_contract(kind, tmp_path):
    bench = bench_of(kind, tmp_path)
    testing.check_overfits(bench)
    testing.check_layouts(bench)
    testing.check_resume(bench)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ensemble", "collaborative", "attributes"])
def test_statistics_of_every_kind_are_of_all_processes(kind, tmp_path):
    testing.check_world_size(bench_of(kind, tmp_path), 2)


def test_plain_transformers_loads_the_steps_of_a_run(tmp_path):
    """A padded batch of texts gives the scores the run evaluates."""
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    bench = bench_of("steps", tmp_path)
    held_out = tmp_path / "held.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in bench.rows[:2]), encoding="utf-8")
    recipe = bench.recipe("run", max_steps=2)
    recipe = recipe.model_copy(update={"eval": recipe.eval.model_validate({"data": [{"path": str(held_out)}]})})
    run = train(recipe, quiet=True, report=False)
    loaded = AutoModelForTokenClassification.from_pretrained(run.folder)
    assert loaded.config.id2label == {0: "wrong", 1: "right"}
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    found = []
    for row in bench.rows[:2]:
        for count in range(1, len(row["completions"]) + 1):
            last = count == len(row["completions"])
            text = row["prompt"] + "\n\n".join(row["completions"][:count]) + ("" if last else "\n\n")
            ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * last
            logits = loaded(input_ids=torch.tensor([ids])).logits[0, -1].detach()
            found.append(float(logits.softmax(-1)[1]))
    record = next(r for r in reversed(testing.read_metrics(run.folder)) if "eval_mean_reward" in r)
    assert record["eval_mean_reward"] == pytest.approx(sum(found) / len(found), abs=1e-5)
    assert record["eval_max_reward"] == pytest.approx(max(found), abs=1e-5)


def test_ops_know_the_loss_by_its_own_name():
    chosen, rejected, margin = torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([0.25])
    torch.testing.assert_close(ops.bradley_terry(chosen, rejected, margin), ops.logistic_pair(margin))


def test_demonstrations_and_samples_by_hand():
    # −(r(w) − r(l))/β + (r(w)² + r(l)²)/2β of two pairs, β = 0.1
    groups = [group(name="a"), group(name="b")]
    loss, gradient, metrics = loss_of(model(kind="irl"), groups, [0.5, -1.0, 0.0, 2.0])
    assert loss == pytest.approx(10 * ((-1.5 + 0.625) + (2.0 + 2.0)) / 2)
    assert gradient.flatten().tolist() == pytest.approx([-2.5, 0.0, -5.0, 15.0])
    assert (metrics["rewards/accuracies"], metrics["rewards/margins"]) == (0.5, -0.25)
    _, at_end, _ = loss_of(model(kind="irl"), groups, [1.0, -1.0, 1.0, -1.0])
    assert at_end.abs().max() == 0
    wide, _, _ = loss_of(model(kind="irl", beta=0.5, regularizer=4.0), [groups[0]], [0.5, -1.0])
    assert wide == pytest.approx(2 * -1.5 + 4 * 0.625)


def test_demonstrations_in_pairs_are_bradley_terry_without_centre():
    groups, scores = [group(name="a"), group(name="b", weight=3.0)], [0.5, -1.0, 0.0, 2.0]
    pairwise, gradient, _ = loss_of(model(kind="irl", pairwise=True), groups, scores)
    expected, same, _ = loss_of(plain(), groups, scores)
    assert pairwise == pytest.approx(expected)
    torch.testing.assert_close(gradient, same)
    with pytest.raises(ValidationError, match="has no `regularizer`"):
        model(kind="irl", pairwise=True, regularizer=1.0)
    with pytest.raises(ValidationError, match="belongs to `kind: irl`"):
        model(beta=1.0)
