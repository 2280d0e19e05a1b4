"""GRPO-S: α by hand and at its limits, categories, the state that averages are, and the reward of demonstrations."""

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from alignkit.algorithms.grpo import GRPO, GRPOConfig
from alignkit.algorithms.grpo_s import GRPOS, GRPOSConfig, bag_of_words, sentences
from alignkit.core import Completion, DataError, Group, RecipeError
from alignkit.core.config import CombineConfig
from alignkit.core.contracts import RolloutFacts
from alignkit.core.types import Forward
from alignkit.data.collate import collate
from alignkit.dist.world import LocalWorld
from tests.algorithms.fakes import averages, reduce_terms

NAN = float("nan")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def group(name: str, texts: list[str], rewards: list[float], demonstration: str = "a b", shown: float = 1.0, **fields):
    completions = [Completion(text, [5] * len(text.split()), reward=r) for text, r in zip(texts, rewards, strict=True)]
    fields = {"demonstration": demonstration, "demonstration.reward": shown, **fields}
    return Group(name, [{"role": "user", "content": name}], [1, 2], completions, fields)


NEAR = group("near", ["a b", "a b"], [0.0, 1.0])
FAR = group("far", ["c d", "a d"], [0.5, 1.0])


def algorithm(**keys) -> GRPOS:
    made = GRPOS(GRPOSConfig(name="grpo_s", **keys))
    made.take_facts(RolloutFacts(2, 8, {"r": 1.0}, CombineConfig()))
    return made


def annotated(made, groups, prepare=True):
    if prepare:
        made.prepare(groups)
    batch = collate(made.build(groups))
    columns = {name: torch.zeros(batch["mask"].shape) for name in ("policy.logps", "reference.logps")}
    batch = batch.with_columns({**columns, "behaviour.weight": torch.ones(batch["mask"].shape)})
    return made.annotate(batch, LocalWorld())


def test_alpha_by_hand():
    # coverage of a prompt: near (1 + 1)/2, far (0 + ½)/2 (one of its two words is in the demonstration: cos ½)
    # gap: near 1 − ½, far 1 − ¾; two gaps lie equally far from their mean, so none is an outlier
    batch = annotated(algorithm(), [NEAR, FAR])
    distances, gaps = (0.0, 0.75), (0.5, 0.25)
    assert batch["coverage"].tolist() == pytest.approx([1, 1, 0.25, 0.25])
    assert batch["gap"].tolist() == pytest.approx([gaps[0]] * 2 + [gaps[1]] * 2)
    alphas = [sigmoid(distance) / sigmoid(sum(distances) / 2) for distance in distances]
    assert batch["alpha"].tolist() == pytest.approx([alphas[0]] * 2 + [alphas[1]] * 2)
    assert alphas[0] < 1 < alphas[1]


def test_outliers_move_alpha_of_the_model():
    rewards = [0.0, 0.1, -0.1, 8.0]  # gaps 1, 0.9, 1.1, −7: the last is out of τ = 4 around the mean of −1
    made = algorithm(alpha_granularity="response", tau=4.5, tau_mode="absolute", ema=0)
    batch = annotated(made, [group("g", ["a b"] * 4, rewards)])
    assert batch["kept"].tolist() == [True, True, True, False]
    assert batch["alpha.model"].tolist() == pytest.approx([sigmoid(1.0) / sigmoid(-1.0)] * 4, rel=1e-5)
    assert batch["alpha"].tolist() == [2.0] * 4  # 2.72 is out of bounds


def test_a_boundless_tau_and_equal_answers_leave_one():
    assert annotated(algorithm(tau=1e9), [NEAR, FAR])["alpha.model"].tolist() == [1.0] * 4
    alike = [replace(NEAR, id="one"), replace(NEAR, id="two")]
    assert annotated(algorithm(), alike)["alpha"].tolist() == [1.0] * 4


def test_a_constant_on_all_rewards_changes_nothing():
    def shifted(one, by):
        completions = [replace(c, reward=c.reward + by) for c in one.completions]
        fields = {**one.fields, "demonstration.reward": one.fields["demonstration.reward"] + by}
        return replace(one, completions=completions, fields=fields)

    before, after = (annotated(algorithm(), [shifted(g, by) for g in (NEAR, FAR)])["alpha"] for by in (0.0, 4.0))
    torch.testing.assert_close(before, after)


def test_alpha_of_one_is_grpo_bit_for_bit():
    def loss(made):
        batch = annotated(made, [NEAR, FAR]) if isinstance(made, GRPOS) else plain(made)
        logps = torch.linspace(-1, 0, batch["mask"].numel()).reshape(batch["mask"].shape).where(batch["mask"], 0.0)
        return reduce_terms(made.loss(Forward(logps), batch)[0], batch)

    def plain(made):
        batch = collate(made.build([NEAR, FAR]))
        columns = {name: torch.zeros(batch["mask"].shape) for name in ("policy.logps", "reference.logps")}
        columns["behaviour.weight"] = torch.ones(batch["mask"].shape)
        return made.annotate(batch.with_columns(columns), LocalWorld())

    grpo = GRPO(GRPOConfig(name="grpo"))
    assert torch.equal(loss(algorithm(alpha_clip=(1, 1))), loss(grpo))
    assert not torch.equal(loss(algorithm()), loss(grpo))


def test_categories_do_not_know_each_other():
    groups = [replace(g, id=f"{g.id}{c}", fields={**g.fields, "category": c}) for g in (NEAR, FAR) for c in ("p", "q")]
    both = annotated(algorithm(), groups)
    torch.testing.assert_close(both["alpha"][[0, 1, 4, 5]], annotated(algorithm(), [NEAR, FAR])["alpha"])
    torch.testing.assert_close(both["alpha"][[0, 1, 4, 5]], both["alpha"][[2, 3, 6, 7]])
    alone = [replace(g, fields={**g.fields, "category": g.id}) for g in (NEAR, FAR)]
    assert annotated(algorithm(), alone)["alpha"].tolist() == [1.0] * 4


def test_granularity_combination_and_direction():
    by_answer = annotated(algorithm(alpha_granularity="response"), [NEAR, FAR])
    assert by_answer["coverage"].tolist() == pytest.approx([1, 1, 0, 0.5])
    turned = annotated(algorithm(invert_hardness=True), [NEAR, FAR])["alpha"]
    assert turned[0] > 1 > turned[2]
    found = annotated(algorithm(combine="sum", tau=0.0, tau_mode="absolute"), [NEAR, FAR])
    torch.testing.assert_close(found["alpha"], (found["alpha.data"] + found["alpha.model"]) / 2)


def test_answers_without_a_reward_are_in_no_gap():
    silent = group("silent", ["c d", "c d"], [NAN, NAN])
    half = group("half", ["a b", "c d"], [NAN, 0.25])
    batch = annotated(algorithm(), [silent, half, NEAR])
    assert batch["scored"].tolist() == [False, False, True, True, True, True]
    assert batch["gap"].tolist()[2:4] == [0.75, 0.75]
    assert batch["alpha"].isfinite().all()
    _, metrics = algorithm().loss(Forward(torch.zeros(batch["mask"].shape)), batch)
    logged = averages({name: m for name, m in metrics.items() if float(m.count)})
    assert logged["categories/all/gap"] == pytest.approx((0.75 + 0.5) / 2)
    assert logged["categories/all/demonstration_wins"] == pytest.approx((1 + 1 + 0.5) / 3)


def test_averages_move_with_rounds_and_not_with_measuring():
    made = algorithm(ema=0.5)
    annotated(made, [NEAR])
    assert made.state_dict()["averages"]["distance"] == {"all": pytest.approx(0.0)}
    batch = annotated(made, [FAR], prepare=False)
    assert made.state_dict()["averages"]["distance"]["all"] == pytest.approx(0.375)
    before = made.state_dict()
    again = made.annotate_held_out(batch, LocalWorld())
    assert made.state_dict() == before
    assert not torch.equal(again["alpha"], batch["alpha"])
    other = algorithm(ema=0.5)
    other.load_state_dict(before)
    assert other.state_dict() == before


def test_texts():
    assert sentences("One. Two!\nthree; ") == ["One", "Two", "three"]
    first, second, empty = bag_of_words(["The cat", "cat THE", "…"])
    assert torch.equal(first, second)
    assert (first.sum(), empty.sum()) == (2, 0)
    assert annotated(algorithm(), [group("empty", ["", ""], [0.0, 1.0])])["coverage"].tolist() == [0.0, 0.0]


def wide(texts):
    return torch.ones(1, 3)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValidationError, match="alpha_clip"):
        algorithm(alpha_clip=(0, 1))
    with pytest.raises(RecipeError, match="encoder: 'clip' is none"):
        algorithm(encoder="clip")
    with pytest.raises(RecipeError, match=r"made \(1, 3\) of"):
        annotated(algorithm(encoder=f"{__name__}:wide"), [NEAR])
    made = algorithm()
    made.prepare([NEAR])
    with pytest.raises(DataError, match="its category 'new' is none of all"):
        made.build([replace(NEAR, fields={**NEAR.fields, "category": "new"})])
