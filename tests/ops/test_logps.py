"""Log-probabilities: the shift, the mask, the edges."""

import math

import pytest
import torch

from alignkit import ops
from alignkit.ops import logps as ops_logps
from tests.shared import golden_case


def one_row(logits: list[list[float]], tokens: list[int], mask: list[int]) -> tuple[torch.Tensor, ...]:
    return torch.tensor([logits], dtype=torch.float64), torch.tensor([tokens]), torch.tensor([mask]).bool()


def test_position_t_of_the_logits_predicts_token_t_plus_one():
    # softmax of the position before each token: (1/4, 3/4) for token 1 = id 1, (1/2, 1/2) for token 2 = id 0.
    logits, tokens, mask = one_row([[0.0, math.log(3)], [2.0, 2.0], [9.0, -9.0]], [0, 1, 0], [0, 1, 1])
    logps, entropy, correct = ops.token_logps(logits, tokens, mask, entropy=True, correct=True)
    torch.testing.assert_close(logps, torch.tensor([[0.0, math.log(0.75), math.log(0.5)]], dtype=torch.float64))
    binary = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    torch.testing.assert_close(entropy, torch.tensor([[0.0, binary, math.log(2)]], dtype=torch.float64))
    assert correct.tolist() == [[0.0, 1.0, 1.0]]


def test_entropy_and_hits_are_none_unless_asked_for():
    logits, tokens, mask = one_row([[0.0, 1.0], [1.0, 0.0]], [0, 1], [0, 1])
    assert ops.token_logps(logits, tokens, mask)[1:] == (None, None)


def test_a_miss_is_not_a_hit():
    logits, tokens, mask = one_row([[0.0, 1.0], [0.0, 0.0]], [0, 0], [0, 1])
    assert ops.token_logps(logits, tokens, mask, correct=True)[2].tolist() == [[0.0, 0.0]]


def test_masked_positions_are_zero_and_get_no_gradient():
    logits = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.manual_seed(0), requires_grad=True)
    tokens = torch.randint(0, 7, (2, 5), generator=torch.manual_seed(1))
    mask = torch.tensor([[0, 0, 1, 0, 1], [0, 1, 1, 0, 0]]).bool()
    logps, _, _ = ops.token_logps(logits, tokens, mask)
    logps.sum().backward()
    assert (logps[~mask] == 0).all()
    assert (logps[mask] < 0).all()
    predicts = torch.zeros_like(mask)
    predicts[:, :-1] = mask[:, 1:]
    assert ((logits.grad != 0).any(-1) == predicts).all()


def test_padding_does_not_move_a_single_bit():
    logits = torch.randn(1, 4, 9, generator=torch.manual_seed(0))
    tokens = torch.tensor([[3, 1, 4, 1]])
    mask = torch.tensor([[0, 0, 1, 1]]).bool()
    alone, _, _ = ops.token_logps(logits, tokens, mask)
    garbage = torch.full((1, 3, 9), torch.nan)
    padded, _, _ = ops.token_logps(
        torch.cat([logits, garbage], 1),
        torch.cat([tokens, tokens[:, :3]], 1),
        torch.cat([mask, mask[:, :1].repeat(1, 3)], 1),
    )
    assert torch.equal(padded[:, :4], alone)
    assert torch.equal(padded[:, 4:], torch.zeros(1, 3))


def test_forbidden_tokens_with_logit_minus_infinity():
    inf = math.inf
    logits, tokens, mask = one_row([[0.0, 0.0, -inf], [-inf, 0.0, 0.0], [0.0] * 3], [0, 1, 0], [0, 1, 1])
    logits.requires_grad_()
    logps, entropy, _ = ops.token_logps(logits, tokens, mask, entropy=True)
    torch.testing.assert_close(logps, torch.tensor([[0.0, -math.log(2), -inf]], dtype=torch.float64))
    torch.testing.assert_close(entropy, torch.tensor([[0.0, math.log(2), math.log(2)]], dtype=torch.float64))
    logps[:, 1].sum().backward()
    assert logits.grad.isfinite().all()


def test_half_precision_logits_are_scored_in_float32():
    logits = torch.randn(1, 3, 50, generator=torch.manual_seed(0)).bfloat16()
    tokens, mask = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 1]]).bool()
    logps, _, _ = ops.token_logps(logits, tokens, mask)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, ops.token_logps(logits.float(), tokens, mask)[0], rtol=0, atol=0)


def test_a_batch_without_any_wanted_token_is_all_zero():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    logps, entropy, correct = ops.token_logps(
        logits, torch.ones(2, 3, dtype=torch.long), mask, entropy=True, correct=True
    )
    assert not logps.any()
    assert not entropy.any()
    assert not correct.any()
    logps.sum().backward()
    assert not logits.grad.any()


@pytest.mark.parametrize("length", [0, 2])
def test_the_first_token_has_no_prediction(length):
    mask = torch.ones(1, length, dtype=torch.bool)
    with pytest.raises(ValueError, match="first token"):
        ops.token_logps(torch.zeros(1, length, 3), torch.zeros(1, length, dtype=torch.long), mask)


def test_gradient_of_logps_by_finite_differences():
    logits = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.manual_seed(2), requires_grad=True)
    tokens = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 1]]).bool()
    assert torch.autograd.gradcheck(lambda x: ops.token_logps(x, tokens, mask)[0], logits)


def test_shifted_puts_the_prediction_beside_its_token():
    logits = torch.arange(12.0).reshape(1, 3, 4)
    moved = ops.shifted(logits)
    assert not moved[0, 0].any()
    assert torch.equal(moved[0, 1:], logits[0, :2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_picked_logps_are_those_of_whole_rows_without_the_shift(dtype):
    logits = torch.randn(2, 4, 9, generator=torch.manual_seed(0)).to(dtype)
    tokens = torch.randint(0, 9, (2, 4), generator=torch.manual_seed(1))
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 1]]).bool()
    picked = ops_logps.picked_logps(logits[:, :-1][mask[:, 1:]], tokens[mask], entropy=True, correct=True)
    for one, rows in zip(picked[:3], ops.token_logps(logits, tokens, mask, entropy=True, correct=True), strict=True):
        assert torch.equal(one, rows[mask])
        assert one.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert ops_logps.picked_logps(logits[0], tokens[0])[1:] == (None, None, None)


def test_hits_are_outside_the_graph_and_entropy_is_in_it():
    logits = torch.randn(3, 5, dtype=torch.float64, generator=torch.manual_seed(0), requires_grad=True)
    picked = ops_logps.picked_logps(logits, torch.tensor([0, 1, 2]), entropy=True, correct=True)
    assert [x.requires_grad for x in picked[:3]] == [True, True, False]
    p = logits.detach().softmax(-1)
    (found,) = torch.autograd.grad(picked.entropy.sum(), logits)
    torch.testing.assert_close(found, -p * (p.log() + picked.entropy.detach()[:, None]))


def test_of_two_equally_likely_tokens_both_are_hits():
    logits = torch.tensor([[1.0, 1.0, 0.0]]).expand(3, 3)
    assert ops_logps.picked_logps(logits, torch.arange(3), correct=True).correct.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("name", ["random", "large_logits", "row_without_completion"])
def test_golden_logps(name):
    case = golden_case("logps.json", name)
    logits = torch.tensor(case["inputs"]["logits"], dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor(case["inputs"]["input_ids"])
    mask = torch.tensor(case["inputs"]["completion_mask"]).bool()
    expected = case["outputs"]
    logps, entropy, _ = ops.token_logps(logits, tokens, mask, entropy=True)
    sums = ops.sequence_sum(logps, mask)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(sums, torch.tensor(expected["sum_logps"], dtype=torch.float64), **close)
    # the source of the numbers divides by zero on an empty row; ours is 0 there
    means = torch.tensor([float(x) for x in expected["mean_logps"]], dtype=torch.float64).nan_to_num(0.0)
    torch.testing.assert_close(ops.sequence_mean(logps, mask), means, **close)
    their_entropy = torch.tensor(expected["token_entropy"], dtype=torch.float64)
    torch.testing.assert_close(entropy[:, 1:], their_entropy[:, :-1].where(mask[:, 1:], 0.0), **close)
    sums.sum().backward()
    torch.testing.assert_close(
        logits.grad, torch.tensor(expected["grad_logits_of_total_sum"], dtype=torch.float64), **close
    )
