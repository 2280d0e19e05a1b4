"""Teachers made of logits: worked by hand, identities on random ones, and what no number may depend on."""

import math

import pytest
import torch

from alignkit import ops


def drawn(*shape: int, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand():
    """Even chances against three to one."""
    even, biased = torch.zeros(2, dtype=torch.float64), torch.tensor([3.0, 1.0], dtype=torch.float64).log()
    assert ops.disagreement(even, biased).item() == pytest.approx(0.5)
    assert ops.kl_divergence(even, biased).item() == pytest.approx(math.log(2 / math.sqrt(3)))
    assert ops.kl_divergence(biased, even).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert ops.expected_log_ratio(biased, biased, even).item() == pytest.approx(ops.kl_divergence(biased, even).item())
    beyond = ops.extrapolated(biased, biased, even, torch.tensor(2.0, dtype=torch.float64)).softmax(-1)
    assert beyond.tolist() == pytest.approx([27 / 28, 1 / 28])  # odds of 3 to the power of 1 + 2


def test_disagreement_is_between_0_and_2_and_has_no_direction():
    first, second = drawn(200, 9), 20 * drawn(200, 9, seed=1)
    found = ops.disagreement(first, second)
    assert found.min() > 0
    assert found.max() < 2
    assert found.equal(ops.disagreement(second, first))
    apart = torch.tensor([200.0, 0.0])
    assert ops.disagreement(apart, apart.flip(0)).item() == 2.0
    assert not ops.disagreement(first, first).any()


def test_vocabularies_are_cut_to_what_all_have_and_never_stay_half_precise():
    found = ops.same_vocabulary(torch.zeros(2, 5, dtype=torch.bfloat16), drawn(2, 3), torch.zeros(2, 4))
    assert [x.shape for x in found] == [(2, 3)] * 3
    assert [x.dtype for x in found] == [torch.float32, torch.float64, torch.float32]
    large = torch.tensor([3e38, 0.0], dtype=torch.bfloat16)
    assert ops.same_vocabulary(large)[0].isfinite().all()


@pytest.mark.parametrize(
    "number",
    [
        lambda x, y, z: ops.disagreement(x, y),
        ops.expected_log_ratio,
        lambda x, y, z: ops.kl_divergence(x, y),
        lambda x, y, z: ops.extrapolated(x, y, z, drawn(4, 7, seed=3)).softmax(-1),
    ],
)
def test_a_constant_added_to_all_logits_of_a_place_changes_nothing(number):
    logits = [drawn(4, 7, 9, seed=seed) for seed in (0, 1, 2)]
    moved = [x + drawn(4, 7, 1, seed=10 + i) for i, x in enumerate(logits)]
    torch.testing.assert_close(number(*moved), number(*logits), rtol=1e-12, atol=1e-12)


def test_rlhf_of_a_token_is_distillation_of_an_extrapolated_teacher():
    """b·KL(p ‖ p*) = −E_p[r] + b·KL(p ‖ p_ref) + a number without p, for r = b0·log(p_d/p_ref) and p* of a = b0/b."""
    reference, preferred = drawn(9), drawn(9, seed=1)
    reward_scale, penalty = 0.7, 0.3
    ratio = torch.tensor(reward_scale / penalty, dtype=torch.float64)
    teacher = ops.extrapolated(reference, preferred, reference, ratio)
    torch.testing.assert_close(teacher, ratio * preferred + (1 - ratio) * reference)
    left, right = [], []
    for seed in range(20):
        student = 2 * drawn(9, seed=seed)
        left.append(penalty * ops.kl_divergence(student, teacher))
        reward = reward_scale * ops.expected_log_ratio(student, preferred, reference)
        right.append(-reward + penalty * ops.kl_divergence(student, reference))
    difference = torch.stack(left) - torch.stack(right)
    assert float(difference.std()) < 1e-12
    assert float(torch.stack(left).std()) > 0.1


def test_divergence_by_finite_differences():
    student, teacher = drawn(3, 5).requires_grad_(), drawn(3, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(ops.kl_divergence, (student, teacher))
