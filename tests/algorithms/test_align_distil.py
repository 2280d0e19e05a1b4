"""AlignDistil: the properties of its loss, hand-worked numbers, what it asks of a run, and what is refused."""

import math

import pytest
import torch
from pydantic import ValidationError

from alignkit import ops, testing
from alignkit.algorithms.align_distil import AlignDistil, AlignDistilConfig
from alignkit.core import Completion, Forward, Group, RecipeError
from alignkit.loop.reduction import emptied
from alignkit.recipe import load_recipe
from tests.algorithms.fakes import averages, reduce_terms
from tests.algorithms.rounds import round_of

MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
VOCABULARY = 7


def align(**keys) -> AlignDistil:
    return AlignDistil(AlignDistilConfig(name="align_distil", **keys))


def drawn(seed: int, size: int = VOCABULARY):
    """[3, 4, V] logits, 0 where nothing is trained."""
    numbers = torch.randn(3, 4, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.where(prompted(MASK)[..., None], 0.0)


def prompted(mask):
    return torch.cat([torch.zeros_like(mask[:, :1]), mask], 1).bool()


STUDENT, TEACHER, CONTRAST, REFERENCE = (drawn(seed) for seed in range(4))


def batch_of(teacher=TEACHER, contrast=CONTRAST, reference=REFERENCE):
    names = ("teacher.logits", "contrast.logits", "reference.logits")
    return round_of(MASK).with_columns(dict(zip(names, (teacher, contrast, reference), strict=True)))


def step(algorithm, batch, student=STUDENT):
    """Loss, gradient on the logits and metrics as logged."""
    logits = student.clone().requires_grad_()
    terms, metrics = algorithm.loss(Forward(torch.zeros_like(logits[..., 0]), logits=logits), batch)
    loss = reduce_terms(terms, batch)
    loss.backward()
    logged = averages(metrics) | {name: float(m.sum) for name, m in metrics.items() if m.how == "max"}
    return loss.item(), logits.grad, logged


def mean_of_answers(tokens):
    """[3, 4] → the mean over answers of the mean over tokens."""
    return ops.sequence_mean(tokens, prompted(MASK)).mean().item()


FIXED = {"weight": "fixed", "loss_reweight": "none"}


def test_without_extrapolation_it_is_plain_distillation():
    loss, _, _ = step(align(**FIXED, fixed_weight=0.0), batch_of())
    assert loss == pytest.approx(mean_of_answers(ops.kl_divergence(STUDENT, TEACHER)), rel=1e-12)


@pytest.mark.parametrize("gain", [0.0, 3.0, 50.0])
def test_without_a_contrast_the_teacher_is_the_teacher_whatever_the_gain(gain):
    loss, _, metrics = step(align(adapt_gain=gain, loss_reweight="none"), batch_of(contrast=TEACHER))
    assert loss == pytest.approx(mean_of_answers(ops.kl_divergence(STUDENT, TEACHER)), rel=1e-12)
    assert metrics["align_distil/disagreement"] == metrics["align_distil/teacher_reward"] == 0.0


@pytest.mark.parametrize("anchor", ["dpo", "ref"])
def test_by_its_formula(anchor):
    keys = {"anchor": anchor, "beta": 0.2, "adapt_gain": 4.0, "tau": 1.5}
    apart = (TEACHER.softmax(-1) - CONTRAST.softmax(-1)).abs().sum(-1)
    weight = (4 * apart + 0.001)[..., None]
    teacher = ((TEACHER if anchor == "dpo" else REFERENCE) + weight * (TEACHER - CONTRAST)) / 1.5
    log_p, log_q = STUDENT.log_softmax(-1), teacher.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    loss, _, metrics = step(align(**keys), batch_of())
    assert loss == pytest.approx(mean_of_answers(0.2 / weight[..., 0] * divergence), rel=1e-9)
    assert metrics["align_distil/coefficient_max"] == pytest.approx((0.2 / weight[prompted(MASK)]).max().item())
    summed, _, _ = step(align(**keys, reward_len_norm=False), batch_of())
    assert summed == pytest.approx((0.2 / weight[..., 0] * divergence)[prompted(MASK)].sum().item() / 3, rel=1e-9)


def test_metrics_are_means_over_tokens_by_hand():
    """One token of two symbols: student even, teacher 3 to 1, contrast 1 to 3, so what is taught is 9 to 1."""
    mask = torch.tensor([[1]])
    biased = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0]]], dtype=torch.float64)
    columns = {"teacher.logits": biased, "contrast.logits": biased.flip(-1)}
    _, _, metrics = step(
        align(weight="fixed", fixed_weight=0.5, beta=0.1, mode="off_policy"),
        round_of(mask).with_columns(columns),
        torch.zeros_like(biased),
    )
    assert metrics == pytest.approx(
        {
            "align_distil/reward": 0.0,
            "align_distil/teacher_reward": 0.1 * 0.5 * math.log(3),
            "align_distil/kl_teacher": math.log(0.5) - 0.5 * (math.log(0.9) + math.log(0.1)),
            "align_distil/kl_contrast": math.log(2 / math.sqrt(3)),
            "align_distil/weight": 0.5,
            "align_distil/disagreement": 1.0,
            "align_distil/coefficient_max": 0.2,
            "completions/mean_length": 1.0,
        },
        abs=1e-12,
    )


@pytest.mark.parametrize("keys", [FIXED, {"weight": "fixed", "fixed_weight": 2.0}, {}, {"anchor": "ref"}])
def test_its_minimum_is_the_extrapolated_teacher(keys):
    """The token loss is least, 0, at the teacher it names, and nowhere else has it a gradient of 0."""
    algorithm = align(**keys)
    config, apart = algorithm.config, ops.disagreement(TEACHER, CONTRAST)
    weight = torch.full_like(apart, config.fixed_weight)
    if config.weight == "adaptive":
        weight = config.adapt_gain * apart + 0.001
    anchor = REFERENCE if config.anchor == "ref" else TEACHER
    best = ops.extrapolated(anchor, TEACHER, CONTRAST, weight)
    loss, gradient, _ = step(algorithm, batch_of(), best)
    assert loss == pytest.approx(0.0, abs=1e-12)
    assert gradient.abs().max() < 1e-10
    assert step(algorithm, batch_of(), STUDENT)[0] > 1e-3


def test_constants_and_whatever_stands_at_other_places_change_nothing():
    algorithm = align(anchor="ref")
    loss, gradient, _ = step(algorithm, batch_of())
    off = ~prompted(MASK)[..., None]
    moved = [x + 3.0 * i for i, x in enumerate((TEACHER, CONTRAST, REFERENCE), 1)]
    moved = [x.masked_fill(off, float("inf")) for x in moved]
    other, same, _ = step(algorithm, batch_of(*moved), (STUDENT - 2.0).masked_fill(off, 0.5))
    assert other == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(same, gradient)
    assert not gradient.where(off, 0.0).any()


def test_a_larger_vocabulary_of_one_model_is_cut():
    padded = torch.cat([CONTRAST, torch.full_like(CONTRAST[..., :3], 9.0)], -1)
    assert step(align(), batch_of(contrast=padded))[0] == step(align(), batch_of())[0]


def test_only_the_student_has_a_gradient():
    models = [x.clone().requires_grad_() for x in (TEACHER, CONTRAST, REFERENCE)]
    step(align(anchor="ref"), batch_of(*models))
    assert [x.grad for x in models] == [None] * 3


@pytest.mark.parametrize("keys", [{}, {"anchor": "ref", "reward_len_norm": False}])
def test_gradient_by_finite_differences(keys):
    algorithm, batch = align(**keys), batch_of()

    def loss(logits):
        return reduce_terms(algorithm.loss(Forward(torch.zeros_like(logits[..., 0]), logits=logits), batch)[0], batch)

    assert torch.autograd.gradcheck(loss, STUDENT.clone().requires_grad_())


def test_a_micro_batch_nobody_counts_has_a_gradient_of_0():
    batch = emptied(batch_of())
    logits = STUDENT[:1].clone().requires_grad_()
    terms, metrics = align().loss(Forward(torch.zeros_like(logits[..., 0]), logits=logits), batch)
    terms["distillation"].value.sum().backward()
    assert not logits.grad.any()
    assert all(metric.count == 0 for metric in metrics.values())


def test_what_it_asks_for_depends_on_the_config():
    assert align().needs.late == {"teacher.logits", "contrast.logits"}
    assert align(anchor="ref").needs.late == {"teacher.logits", "contrast.logits", "reference.logits"}
    assert (align().needs.rewards, align().needs.scored) == (True, False)
    assert not align(mode="off_policy").needs.rewards


def test_units_are_all_answers_written_or_the_best_given():
    answers = [Completion("", [i, 2], reward=float(-i)) for i in (5, 6, 7)]
    groups = [Group("g", [], [3], answers), Group("bad", [], [3], answers[:1], fields={"label": False})]
    written, given = align(), align(mode="off_policy")
    assert [row.tokens for (row,) in written.build(groups[:1])] == [[3, 5, 2], [3, 6, 2], [3, 7, 2]]
    assert [row.tokens for (row,) in given.build(groups)] == [[3, 5, 2]]
    assert (written.count_units(groups[0]), given.count_units(groups[0])) == (3, 1)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"weight": "fixed", "fixed_weight": 0.0}, "set loss_reweight: none"),
        ({"mode": "off_policy", "rounds": 3}, "are of mode: on_policy"),
        ({"mode": "off_policy", "prompts_per_round": 8}, "are of mode: on_policy"),
        ({"tau": 0.0}, "tau"),
    ],
)
def test_what_does_not_go_together_is_refused(keys, complaint):
    with pytest.raises(ValidationError, match=complaint):
        align(**keys)


@pytest.mark.parametrize(
    "keys", [{"mode": "off_policy"}, {"anchor": "ref", "weight": "fixed", "reward_len_norm": False}]
)
def test_its_other_forms_have_one_gradient_for_any_micro_batch(keys, tmp_path):
    testing.check_micro_batches(testing.Bench("align_distil", config=keys, folder=tmp_path))


def recipe(models, **keys):
    return {
        "output_dir": "runs/x",
        "model": {"name_or_path": "owner/model"},
        "data": [{"path": "owner/pairs"}],
        "algorithm": {"name": "align_distil", **keys},
        "models": models,
        "rollout": {"num_generations": 1},
    }


@pytest.mark.parametrize(
    ("models", "keys", "complaint"),
    [
        ({}, {}, r"(?s)models\.contrast  align_distil learns from weights other.*models\.teacher"),
        ({"teacher": {"from": "owner/dpo"}, "contrast": {}}, {}, r"models\.contrast.*name them: `from: PATH`"),
        ({}, {"anchor": "ref"}, r"models\.teacher"),
        (
            {"teacher": {"from": "a/b"}, "contrast": {"from": "a/c"}},
            {"mode": "off_policy"},
            r"rollout.*remove the block",
        ),
    ],
)
def test_a_recipe_names_the_models_it_learns_from(models, keys, complaint):
    with pytest.raises(RecipeError, match=complaint):
        load_recipe(recipe(models, **keys))


def test_against_the_reference_the_start_itself_may_be_the_contrast():
    keys = {"anchor": "ref", "weight": "fixed"}
    assert load_recipe(recipe({"teacher": {"from": "owner/dpo"}}, **keys)).algorithm.anchor == "ref"
