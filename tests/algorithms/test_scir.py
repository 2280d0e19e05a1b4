"""SCIR: golden numbers by its functions and through the class, what becomes a unit, what is selected, and when."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from alignkit import ops
from alignkit.algorithms.scir import SCIR, SCIRConfig
from alignkit.core import Batch, Completion, Forward, Group, RecipeError
from alignkit.core.config import CombineConfig
from alignkit.core.contracts import RolloutFacts
from alignkit.data.collate import collate, select_units
from alignkit.dist.world import LocalWorld
from alignkit.loop.reduction import emptied
from alignkit.track.metrics import values
from tests.shared import golden_case

BIAS = 0.7
"""Nats by which the judge of these tests likes what stands first."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
NAN = float("nan")


def drawn(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@pytest.fixture
def make(tmp_path):
    """SCIR that asks `<a>|<b>?` and knows of no warm-up unless told."""
    (tmp_path / "short.txt").write_text("{prompt}:{first}|{second}?")
    (tmp_path / "long.txt").write_text("Of {prompt}: {first} or {second}, {first_label} or {second_label}?{principles}")

    def scir(*, max_length: int = 64, judges: int = 1, **keys) -> SCIR:
        names = [str(tmp_path / f"{name}.txt") for name in ("short", "long")[:judges]]
        config = {"name": "scir", "template": names if judges > 1 else names[0], "warmup_steps": 0, **keys}
        algorithm = SCIR(SCIRConfig(**config))
        facts = RolloutFacts(4, 8, {}, CombineConfig(), max_length=max_length, render=tokens, encode=tokens)
        algorithm.take_facts(facts)
        return algorithm

    return scir


def answer(text: str, reward: float = NAN, version: int = 0) -> Completion:
    return Completion(
        text, tokens(text), logps=[-1.0] * len(text) if version == 0 else None, reward=reward, version=version
    )


def group(*answers: Completion, name: str = "g") -> Group:
    return Group(name, [{"role": "user", "content": "q"}], tokens("q"), list(answers))


def pair(name: str = "g") -> Group:
    return group(answer("ab", 1.0), answer("cd", 0.0), name=name)


def at_logits(algorithm: SCIR, batch: Batch, implicit: Tensor, judges: Tensor) -> Tensor:
    """[N, L] of a policy with these logits [U] and [judges, U], over a base of zeros, in its rows' first tokens."""
    sums = torch.zeros(batch.num_units, batch.k, dtype=implicit.dtype)
    sums[:, 0] = implicit / algorithm.config.beta
    for m, logit in enumerate(judges):
        sums[:, 2 + 4 * m] = BIAS + logit
        sums[:, 4 + 4 * m] = BIAS - logit
    logps = torch.zeros(batch["mask"].shape, dtype=implicit.dtype)
    place = batch["mask"].int().argmax(1)
    logps[torch.arange(len(place)), place] = sums.reshape(-1)
    return logps


def round_at(algorithm: SCIR, implicit, judges, groups=None) -> tuple[Tensor, Batch]:
    """A leaf of the policy and the batch as the loss sees it, for one pair a logit."""
    units = algorithm.build(groups or [pair(f"g{i}") for i in range(len(implicit))])
    batch = algorithm.annotate(collate(units), LocalWorld())
    logps = at_logits(algorithm, batch, implicit, torch.atleast_2d(judges)).requires_grad_()
    told = {"policy.logps": logps.detach(), "base.logps": torch.zeros_like(logps)}
    return logps, algorithm.relabel(batch.with_columns(told), LocalWorld())


def total(terms, batch: Batch) -> Tensor:
    """The loss as the trainer forms it: 0, attached, where a column counts nothing."""
    shares = [
        t.weight * t.value.where(batch[t.over], 0.0).sum() / max(1, int(batch[t.over].sum())) for t in terms.values()
    ]
    return torch.stack(shares).sum()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["random", "agree", "saturated"])
class TestGolden:
    @pytest.fixture(autouse=True)
    def opened(self, name, dtype):
        case = golden_case("scir.json", name)
        self.weight, self.out = case["params"]["entropy_weight"], case["outputs"]
        self.implicit, self.judge = (
            torch.tensor(case["inputs"][f"{which}_logit"], dtype=dtype) for which in ("implicit", "judge")
        )

    def same(self, found: Tensor, name: str) -> None:
        expected = torch.tensor(self.out[name], dtype=found.dtype)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[found.dtype], atol=TOLERANCE[found.dtype])

    def test_functions(self):
        self.implicit.requires_grad_(), self.judge.requires_grad_()
        logits = torch.stack([self.implicit, self.judge])
        self.same(ops.bernoulli_symmetric_kl(self.implicit, self.judge), "symmetric_kl")
        self.same(ops.bernoulli_entropy(logits).mean(0), "mean_entropy")
        penalty = ops.inconsistency(logits, self.weight).mean()
        self.same(penalty, "penalty")
        penalty.backward()
        self.same(self.implicit.grad, "grad_implicit_logit")
        self.same(self.judge.grad, "grad_judge_logit")
        assert ops.consensus(logits.detach(), 0.0)[1].tolist() == self.out["consistent"]

    def test_through_the_class(self, make):
        algorithm = make(entropy_weight=self.weight)
        logps, batch = round_at(algorithm, self.implicit, self.judge)
        terms, metrics = algorithm.loss(Forward(logps), batch)
        self.same(terms["inconsistency"].value.mean(), "penalty")
        (gradient,) = torch.autograd.grad(terms["inconsistency"].value.mean(), logps)
        rows = batch.by_unit(gradient.sum(-1) / batch["mask"].sum(-1))
        # A verdict's logit is the mean over two orders.
        self.same(rows[:, 0] / algorithm.config.beta, "grad_implicit_logit")
        self.same(2 * rows[:, 2], "grad_judge_logit")
        self.same(-2 * rows[:, 4], "grad_judge_logit")
        assert batch["consistent"].tolist() == self.out["consistent"]
        assert values(metrics)["scir/symmetric_kl"] == pytest.approx(
            sum(self.out["symmetric_kl"]) / len(self.judge), rel=1e-5
        )


def test_the_closed_form_of_the_divergence_is_its_definition():
    a, b = drawn(200), drawn(200, seed=1)
    kls = [
        p.sigmoid() * (p.sigmoid() / q.sigmoid()).log() + (-p).sigmoid() * ((-p).sigmoid() / (-q).sigmoid()).log()
        for p, q in ((a, b), (b, a))
    ]
    torch.testing.assert_close(ops.bernoulli_symmetric_kl(a, b), sum(kls) / 2, rtol=1e-9, atol=1e-12)


def test_equal_predictions_have_no_divergence_and_no_gradient():
    z = torch.stack([drawn(9)] * 3).requires_grad_()
    apart = ops.inconsistency(z, 0.0)
    assert not apart.any()
    (gradient,) = torch.autograd.grad(apart.sum(), z)
    assert not gradient.any()


def test_the_penalty_knows_no_order_of_models_or_of_answers():
    z = drawn(3, 50)
    expected = ops.inconsistency(z, 0.1)
    torch.testing.assert_close(ops.inconsistency(z[[2, 0, 1]], 0.1), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ops.inconsistency(-z, 0.1), expected, rtol=1e-12, atol=1e-15)
    assert (ops.inconsistency(z, 0.0) > 0).all()


def test_entropy_is_between_0_and_ln_2_and_right_far_out():
    z = torch.linspace(-60, 60, 241, dtype=torch.float64)
    entropy = ops.bernoulli_entropy(z)
    assert entropy.min() > 0
    assert entropy.max().item() == entropy[120].item() == pytest.approx(math.log(2), abs=1e-15)
    assert ops.bernoulli_entropy(torch.tensor(60.0)).item() == pytest.approx(61 * math.exp(-60), rel=1e-5)


def test_consensus_by_hand():
    z = torch.tensor([[2.0, 2.0, -1.0, 0.0, -3.0], [1.0, -1.0, -0.5, 1.0, -0.1], [3.0, 1.0, -2.0, 1.0, -4.0]])
    label, same, sure = ops.consensus(z, 0.4)  # |2p − 1| ≥ 0.4 from a logit of log(7/3) = 0.85 on
    assert label.tolist() == [1, 1, -1, 1, -1]
    assert same.tolist() == [True, False, True, False, True]
    assert sure.tolist() == [True, False, False, False, False]
    assert ops.consensus(z, 0.0)[2].equal(same)


def test_one_model_labels_for_itself():
    z = drawn(1, 30)
    label, same, sure = ops.consensus(z, 0.0)
    assert label.equal(z[0].sign())
    assert same.all()
    assert sure.all()
    torch.testing.assert_close(ops.inconsistency(z, 0.3), 0.3 * ops.bernoulli_entropy(z[0]))


def test_full_confidence_selects_nothing_however_sure():
    assert not ops.consensus(torch.full((2, 1), 1e30), 1.0)[2].any()
    assert ops.consensus(torch.full((2, 1), 40.0), 1 - 1e-12)[2].all()


def test_a_unit_is_both_answers_and_every_verdict_in_both_orders(make):
    (unit,) = make(judges=2, answers=("A", "BB")).build([pair()])
    assert SCIR.rows_per_unit(make(judges=2).config) == len(unit) == 10
    texts = ["".join(map(chr, row.tokens)) for row in unit]
    assert texts == [
        "qab",
        "qcd",
        "q:ab|cd?A",
        "q:ab|cd?BB",
        "q:cd|ab?A",
        "q:cd|ab?BB",
        "Of q: ab or cd, A or BB?A",
        "Of q: ab or cd, A or BB?BB",
        "Of q: cd or ab, A or BB?A",
        "Of q: cd or ab, A or BB?BB",
    ]
    trained = ["".join(chr(t) for t, on in zip(row.tokens, row.trained, strict=True) if on) for row in unit]
    assert trained == ["ab", "cd", *["A", "BB"] * 4]
    assert not any(row.token for row in unit)  # what the writer said of its tokens is nobody's business here
    assert {row.group for row in unit} == {"g"}


def test_answers_that_quote_a_fence_or_think_are_judged_without(make):
    (unit,) = make().build([group(answer("<think>hm</think>x<<end of answer 1>>", 1.0), answer("y", 0.0))])
    assert "".join(map(chr, unit[2].tokens)) == "q:x|y?1"


@pytest.mark.parametrize(
    ("keys", "rewards", "expected"),
    [
        ({}, [0.1, 0.9, 0.5, 0.9], ["ba"]),
        ({}, [0.5, 0.5, 0.5, 0.5], ["ad"]),  # it is the models that tell them apart
        ({}, [NAN, 0.2, NAN, 0.4], ["db"]),
        ({}, [NAN, 0.2, NAN, NAN], []),
        ({"pairing": "first"}, [NAN] * 4, ["ab"]),
        ({"pairing": "all"}, [NAN] * 4, ["ab", "bc", "cd", "ac"]),
        ({"pairing": "all", "max_pairs": 6}, [NAN] * 4, ["ab", "bc", "cd", "ac", "bd", "ad"]),
    ],
)
def test_which_answers_are_pairs(keys, rewards, expected, make):
    algorithm = make(**keys)
    answers = [answer(text, reward) for text, reward in zip("abcd", rewards, strict=True)]
    units = algorithm.build([group(*answers)])
    assert [chr(unit[0].tokens[-1]) + chr(unit[1].tokens[-1]) for unit in units] == expected
    assert algorithm.count_units(group(*[Completion("", [])] * 4)) >= len(expected)


def test_equal_answers_are_no_pair(make):
    assert make().build([group(answer("ab", 1.0), answer("ab", 0.0))]) == []
    units = make(pairing="all").build([group(answer("a"), answer("a"), answer("b"))])
    assert len(units) == 2


def test_pairs_that_leave_judges_no_room_are_counted(make):
    algorithm = make(max_length=len("q:ab|cd?1"))
    assert len(algorithm.build([pair()])) == 1
    long = group(answer("abc", 1.0), answer("cd", 0.0))
    assert algorithm.build([long]) == []
    batch = algorithm.annotate(collate(algorithm.build([long, pair(), pair(), long])), LocalWorld())
    logps = torch.zeros(batch["mask"].shape)
    batch = algorithm.relabel(batch.with_columns({"policy.logps": logps, "base.logps": logps}), LocalWorld())
    assert float(algorithm.loss(Forward(logps), batch)[1]["scir/too_long"].sum) == 2
    assert float(algorithm.loss(Forward(logps[: batch.k]), emptied(batch))[1]["scir/too_long"].sum) == 0


def given(*rewards: float) -> list[Completion]:
    return [answer("wxyz"[i], reward, version=-1) for i, reward in enumerate(rewards)]


def test_the_datas_own_pairs_are_labelled_as_the_data_has_them_whatever_scored_them(make):
    algorithm = make()
    data = group(*given(0.0, 2.0, 1.0))
    algorithm.prepare([data, group(name="bare")])
    assert algorithm.count_units(group(*[Completion("", [])] * 2, *data.completions)) == 2
    scored = [answer("a", 1.0), answer("b", 0.0)]
    units = algorithm.build([group(*scored, *(answer(c.text, 5.0, -1) for c in data.completions), name="g@2")])
    assert [unit[0].scalar["labelled"] for unit in units] == [0.0, 1.0]
    assert ["".join(chr(row.tokens[-1]) for row in unit[:2]) for unit in units] == ["ab", "xw"]


@pytest.mark.parametrize("rewards", [(), (1.0,), (1.0, 1.0), (NAN, NAN), (1.0, NAN)])
def test_data_that_tells_nothing_apart_is_no_anchor(rewards, make):
    algorithm, data = make(), group(*given(*rewards))
    algorithm.prepare([data])
    assert algorithm.build([data]) == []


def test_without_a_weight_there_are_no_anchors(make):
    algorithm, data = make(anchor_weight=0.0), group(*given(1.0, 0.0))
    algorithm.prepare([data])
    assert algorithm.build([data]) == []


def with_anchor(algorithm: SCIR) -> list[Group]:
    """A pair of the policy, and one of the data alone."""
    data = group(*given(1.0, 0.0), name="data")
    algorithm.prepare([data])
    return [pair(), data]


def test_anchors_teach_judges_and_are_never_preferred(make):
    algorithm = make(anchor_weight=0.5, consistency_weight=0.0, judges=2)
    implicit, judges = torch.tensor([1.0, 2.0]).double(), torch.tensor([[2.0, -1.0], [1.0, 3.0]]).double()
    logps, batch = round_at(algorithm, implicit, judges, with_anchor(algorithm))
    assert batch["labelled"].tolist() == [False, True]
    assert batch["selected"].tolist() == [True, False]
    terms, metrics = algorithm.loss(Forward(logps), batch)
    leanings = [-1 + BIAS, -1 - BIAS, 3 + BIAS, 3 - BIAS]  # of either judge in either order
    anchor = sum(math.log1p(math.exp(-leaning)) for leaning in leanings) / 4
    assert total(terms, batch).item() == pytest.approx(math.log1p(math.exp(-1.0)) + 0.5 * anchor)
    told = values(metrics)
    accuracies = {name.rpartition("/")[2]: x for name, x in told.items() if "labelled_accuracy" in name}
    assert accuracies == {"implicit": 1.0, "short": 0.0, "long": 1.0, "consensus": 1.0}
    assert told["scir/consistency"] == told["scir/selected"] == 1.0  # of the written pair alone


def test_the_loss_is_dpo_towards_the_consensus_and_the_penalty_of_all(make):
    implicit, judge = torch.tensor([2.0, -1.0, 1.5]).double(), torch.tensor([1.0, -3.0, -0.5]).double()
    algorithm = make(consistency_weight=0.7, entropy_weight=0.2)
    logps, batch = round_at(algorithm, implicit, judge)
    assert batch["label"].tolist() == [1.0, -1.0, 1.0]
    assert batch["selected"].tolist() == [True, True, False]
    terms, metrics = algorithm.loss(Forward(logps), batch)
    preferred = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2
    penalty = ops.inconsistency(torch.stack([implicit, judge]), 0.2).mean().item()
    assert total(terms, batch).item() == pytest.approx(preferred + 0.7 * penalty)
    told = values(metrics)
    assert told["scir/consistency"] == told["scir/selected"] == pytest.approx(2 / 3)
    assert told["scir/flips"] == pytest.approx(1 / 3)  # 0.5 in the one pair is below the bias
    assert told["scir/confidence/implicit"] == pytest.approx((implicit.sigmoid() - 0.5).abs().mean().item())
    assert told["scir/confidence/short"] == pytest.approx((judge.sigmoid() - 0.5).abs().mean().item())
    assert told["logps/chosen"] == pytest.approx((2.0 / 0.1 + 0.0) / 2)
    assert told["logps/rejected"] == pytest.approx((0.0 - 1.0 / 0.1) / 2)


def test_without_its_penalty_it_is_dpo_on_labels_of_the_moment(make):
    implicit = drawn(20)
    algorithm = make(consistency_weight=0.0)
    logps, batch = round_at(algorithm, implicit, implicit)
    loss = total(algorithm.loss(Forward(logps), batch)[0], batch)
    assert batch["selected"].all()
    assert loss.item() == pytest.approx(ops.logistic_pair(implicit.abs()).mean().item())


@pytest.mark.parametrize(
    ("trained", "moves"), [("both", (True, True)), ("judge", (False, True)), ("implicit", (True, False))]
)
def test_what_the_penalty_moves(trained, moves, make):
    algorithm = make(penalty_trains=trained)
    logps, batch = round_at(algorithm, drawn(5), drawn(5, seed=1))
    (gradient,) = torch.autograd.grad(algorithm.loss(Forward(logps), batch)[0]["inconsistency"].value.sum(), logps)
    rows = batch.by_unit(gradient.abs().sum(-1))
    assert (bool(rows[:, :2].all()), bool(rows[:, 2:].all())) == moves
    assert (bool(rows[:, :2].any()), bool(rows[:, 2:].any())) == moves


def test_orders_apart_are_models_of_their_own_to_the_penalty_alone(make):
    algorithm, implicit, judge = make(orders="apart"), drawn(6), drawn(6, seed=1)
    logps, batch = round_at(algorithm, implicit, judge)
    terms, _ = algorithm.loss(Forward(logps), batch)
    expected = ops.inconsistency(torch.stack([implicit, judge + BIAS, judge - BIAS]), 0.1)
    torch.testing.assert_close(terms["inconsistency"].value, expected, rtol=1e-9, atol=1e-12)
    assert batch["consistent"].equal(implicit.sign() == judge.sign())


def test_where_nothing_is_selected_the_preference_is_0_and_attached(make):
    algorithm = make(consistency_weight=0.0)
    logps, batch = round_at(algorithm, torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0]))
    assert not batch["selected"].any()
    loss = total(algorithm.loss(Forward(logps), batch)[0], batch)
    assert loss.item() == 0.0
    loss.backward()
    assert not logps.grad.any()


def test_the_rounding_of_a_policy_that_is_still_the_base_is_no_opinion(make):
    algorithm = make()
    batch = algorithm.annotate(collate(algorithm.build([pair()])), LocalWorld())
    base = torch.full(batch["mask"].shape, -7.3)
    policy = at_logits(algorithm, batch, torch.zeros(1), torch.ones(1, 1)) + base

    def label(policy: Tensor) -> Batch:
        return algorithm.relabel(batch.with_columns({"policy.logps": policy, "base.logps": base}), LocalWorld())

    almost = policy.clone()
    almost[0, 1] = torch.nextafter(almost[0, 1], torch.tensor(0.0))
    assert not label(policy)["consistent"].any()
    assert not label(almost)["consistent"].any()
    almost[0, 1] += 1e-3
    assert label(almost)["selected"].all()


def test_the_warm_up_selects_nothing_and_is_kept(make):
    implicit = torch.ones(3)
    algorithm = make(warmup_steps=2)
    algorithm.observe({})
    _, batch = round_at(algorithm, implicit, implicit)
    assert batch["consistent"].all()
    assert not batch["selected"].any()
    resumed = make(warmup_steps=2)
    resumed.load_state_dict(algorithm.state_dict())
    resumed.observe({})
    _, batch = round_at(resumed, implicit, implicit)
    assert batch["selected"].all()


def test_padding_is_never_selected(make):
    algorithm = make()
    _, batch = round_at(algorithm, torch.ones(2), torch.ones(2))
    idle = algorithm.relabel(emptied(batch), LocalWorld())
    assert not any(bool(idle[name].any()) for name in ("selected", "consistent", "written"))


def test_a_unit_does_not_see_the_others(make):
    algorithm = make()
    logps, batch = round_at(algorithm, drawn(4), drawn(4, seed=1))
    whole, _ = algorithm.loss(Forward(logps), batch)
    for i in range(4):
        alone = select_units(batch, [i])
        rows = logps.view(4, batch.k, -1)[i, :, : alone["mask"].shape[1]]
        terms, _ = algorithm.loss(Forward(rows), alone)
        for name, term in terms.items():
            torch.testing.assert_close(term.value, whole[name].value[i : i + 1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"template": []}, "one judge at least"),
        ({"template": ["a/same.txt", "b/same.txt"]}, "each by another name"),
        ({"answers": ("1", "1")}, "two texts that differ"),
        ({"answers": ("1", " ")}, "two texts that differ"),
        ({"rounds": None}, "give prompts_per_round"),
    ],
)
def test_what_makes_no_sense_is_refused(keys, complaint):
    with pytest.raises(ValidationError, match=complaint):
        SCIRConfig(name="scir", **keys)


def test_a_template_must_hold_both_answers(tmp_path):
    (tmp_path / "half.txt").write_text("{prompt} {first}")
    with pytest.raises(RecipeError, match="lacks the slot 'second'"):
        SCIR(SCIRConfig(name="scir", template=str(tmp_path / "half.txt")))


@pytest.mark.parametrize("encode", [lambda text: [3], lambda text: tokens(text)[: text == "1"]])
def test_verdicts_must_be_two_texts_to_the_tokenizer_too(encode, tmp_path):
    (tmp_path / "short.txt").write_text("{prompt}:{first}|{second}?")
    algorithm = SCIR(SCIRConfig(name="scir", template=str(tmp_path / "short.txt")))
    with pytest.raises(RecipeError, match="tell no verdicts apart"):
        algorithm.take_facts(RolloutFacts(4, 8, {}, CombineConfig(), 64, render=tokens, encode=encode))
