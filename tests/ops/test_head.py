"""The head in chunks: the same numbers and gradients as whole logits under plain autograd, whatever the chunks."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, softplus
from torch.utils._python_dispatch import TorchDispatchMode

from alignkit.ops import logps as engine
from alignkit.ops.logps import Head, TokenScores, chunked_logps, one_pass_loss, picked_logps, unit_chunks

VOCABULARY, WIDTH = 23, 8
SIZES = (3, 0, 5, 1, 7, 2)
"""Scored tokens of each unit; one has none."""
KINDS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.4},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "scale": 0.4, "softcap": 2.0},
}
CUTS = {
    "one chunk": (100, 100, 1000),
    "some units a chunk": (8, 100, 1000),
    "a unit a chunk, in blocks": (1, 100, 2),
    "units over the limit": (2, 4, 3),
    "nothing fits": (1, 0, 1),
}
"""Rows of logits in a chunk, in a single unit's chunk at most, and in a block."""


class Case(NamedTuple):
    """Leaves of the graph and what is asked of them."""

    hidden: Tensor
    head: Head
    targets: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.head.weight, self.head.bias) if x is not None]

    def to(self, dtype: torch.dtype) -> "Case":
        hidden, weight, bias = (
            None if x is None else x.detach().to(dtype).requires_grad_()
            for x in (self.hidden, self.head.weight, self.head.bias)
        )
        return Case(hidden, Head(weight, bias, self.head.scale, self.head.softcap), self.targets)

    def gradients(self) -> list[Tensor]:
        return [x.grad for x in self.leaves]


def build(size=sum(SIZES), vocabulary=VOCABULARY, width=WIDTH, *, bias=False, scale=1.0, softcap=None) -> Case:
    draw = torch.Generator().manual_seed(size)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw).requires_grad_()

    head = Head(leaf(vocabulary, width), leaf(vocabulary) if bias else None, scale, softcap)
    return Case(leaf(size, width), head, torch.randint(vocabulary, (size,), generator=draw))


def whole(case: Case) -> TokenScores:
    """The definition."""
    logits = linear(case.hidden, case.head.weight, case.head.bias) * case.head.scale
    if case.head.softcap is not None:
        logits = case.head.softcap * torch.tanh(logits / case.head.softcap)
    return picked_logps(logits, case.targets, entropy=True, correct=True)


def unit_losses(logps: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """A loss that couples the tokens of a unit."""
    return torch.stack([softplus(-0.3 * unit.sum()) + (unit**2).sum() for unit in logps.split(sizes)]).sum()


def whole_loss(case: Case, sizes=SIZES) -> Tensor:
    return unit_losses(whole(case).logps, sizes)


def one_pass(case: Case, sizes=SIZES, **wants: bool) -> tuple[Tensor, list[TokenScores]]:
    """The same loss through the engine, and the scores each chunk was shown."""
    units = unit_chunks(sizes, case.head.weight.shape[0] * 4)
    bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    shown: dict[int, TokenScores] = {}

    def share(i: int, scores: TokenScores) -> Tensor:
        shown[i] = scores
        first, stop = units[i]
        return unit_losses(scores.logps, sizes[first:stop])

    chunks = [(bounds[first], bounds[stop]) for first, stop in units]
    loss = one_pass_loss(case.hidden, case.head, case.targets, chunks, share, **wants)
    return loss, [shown[i] for i in range(len(chunks))]


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """Relative L2, all tensors together."""
    difference = sum((a.double() - b.double()).pow(2).sum().item() for a, b in zip(found, expected, strict=True))
    return math.sqrt(difference / sum(b.double().pow(2).sum().item() for b in expected))


@pytest.fixture
def cut(monkeypatch):
    """Make chunks of that many rows of logits (of four bytes an element; half as many in float64)."""

    def cut(rows, most, block, vocabulary=VOCABULARY):
        monkeypatch.setattr(engine, "CHUNK_BYTES", rows * vocabulary * 4)
        monkeypatch.setattr(engine, "MAX_CHUNK_BYTES", most * vocabulary * 4)
        monkeypatch.setattr(engine, "BLOCK_ELEMENTS", {"cpu": block * vocabulary})

    return cut


@pytest.mark.parametrize("chunks", CUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("logged", [False, True])
def test_one_pass_is_the_loss_and_gradient_of_whole_logits(cut, kind, chunks, dtype, allowed, logged):
    cut(*CUTS[chunks])
    truth, case = build(**KINDS[kind]), build(**KINDS[kind]).to(dtype)
    expected = whole_loss(truth)
    expected.backward()
    loss, shown = one_pass(case, entropy=logged, correct=logged)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=allowed * 4)
    assert apart(case.gradients(), truth.gradients()) <= allowed
    names = ("logps", "entropy", "correct") if logged else ("logps",)
    for name in names:
        found = torch.cat([getattr(scores, name) for scores in shown])
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), getattr(whole(truth), name), rtol=allowed * 10, atol=allowed * 10)
    if not logged:
        assert all(scores.entropy is None and scores.correct is None for scores in shown)


@pytest.mark.parametrize("chunks", CUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=str)
def test_one_pass_carries_the_gradients_of_entropy_and_values(cut, kind, chunks, dtype, allowed):
    cut(*CUTS[chunks])
    truth, case = build(**KINDS[kind]), build(**KINDS[kind]).to(dtype)
    values = torch.linspace(-1, 1, sum(SIZES), dtype=torch.float64).requires_grad_()
    same = values.detach().to(dtype).requires_grad_()

    def loss(scores: TokenScores, sizes: tuple[int, ...]) -> Tensor:
        return unit_losses(scores.logps, sizes) - 0.7 * scores.entropy.sum() + (scores.values * scores.logps).sum()

    expected = loss(whole(truth)._replace(values=values), SIZES)
    expected.backward()
    units = unit_chunks(SIZES, VOCABULARY * 4)
    bounds = [0, *torch.tensor(SIZES).cumsum(0).tolist()]
    found = one_pass_loss(
        case.hidden,
        case.head,
        case.targets,
        [(bounds[first], bounds[stop]) for first, stop in units],
        lambda i, scores: loss(scores, SIZES[units[i][0] : units[i][1]]),
        values=same,
        entropy=True,
    )
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=allowed * 4)
    assert apart([*case.gradients(), same.grad], [*truth.gradients(), values.grad]) <= allowed


@pytest.mark.parametrize("chunks", CUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=str)
def test_logps_first_and_loss_later_are_the_same_too(cut, kind, chunks, dtype, allowed):
    cut(*CUTS[chunks])
    truth, case = build(**KINDS[kind]), build(**KINDS[kind]).to(dtype)
    expected = whole(truth)
    unit_losses(expected.logps, SIZES).backward()
    found = chunked_logps(case.hidden, case.head, case.targets, entropy=True, correct=True)
    unit_losses(found.logps, SIZES).backward()
    assert apart(case.gradients(), truth.gradients()) <= allowed
    for one, other in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=allowed * 10, atol=allowed * 10)
    assert found.logps.requires_grad
    assert not found.entropy.requires_grad
    assert not found.correct.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_chunked_logps_by_finite_differences(cut, kind):
    cut(3, 3, 1)
    case = build(size=5, **KINDS[kind])

    def logps(hidden: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        head = Head(weight, bias[0] if bias else None, case.head.scale, case.head.softcap)
        return chunked_logps(hidden, head, case.targets).logps

    assert torch.autograd.gradcheck(logps, case.leaves)


def test_without_gradient_nothing_is_kept(cut):
    cut(3, 3, 1)
    case = build()
    with torch.no_grad():
        found = chunked_logps(case.hidden, case.head, case.targets)
    assert found.logps.grad_fn is None
    torch.testing.assert_close(found.logps, whole(case).logps, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("chunks", CUTS)
def test_what_comes_after_the_loss_scales_its_gradient(cut, chunks):
    cut(*CUTS[chunks])
    case, truth = build(bias=True), build(bias=True)
    (one_pass(case)[0] * 3).backward()
    (whole_loss(truth) * 3).backward()
    assert apart(case.gradients(), truth.gradients()) <= 1e-14


def test_a_chunk_whose_share_needs_no_gradient_has_none():
    case = build()
    chunks = [(0, 8), (8, 18)]

    def share(i: int, scores: TokenScores) -> Tensor:
        return scores.logps.sum() if i == 1 else scores.logps.detach().sum()

    loss = one_pass_loss(case.hidden, case.head, case.targets, chunks, share)
    loss.backward()
    assert loss.item() == pytest.approx(whole(case).logps.sum().item())
    assert not case.hidden.grad[:8].any()
    assert case.hidden.grad[8:].any(-1).all()


@pytest.mark.parametrize("logged", [False, True])
@pytest.mark.parametrize("forbidden", [0, 1])
def test_a_token_whose_logit_is_minus_infinity(logged, forbidden):
    """Nothing is said about it, or it is one of the targets and left out of the loss."""
    case, truth = build(bias=True), build(bias=True)
    token = int(case.targets[4]) if forbidden else next(i for i in range(VOCABULARY) if i not in case.targets.tolist())
    hit = case.targets == token
    for one in (case, truth):
        with torch.no_grad():
            one.head.bias[token] = -math.inf

    def objective(logps: Tensor) -> Tensor:
        return logps.masked_fill(hit, 0.0).pow(2).sum()

    loss = one_pass_loss(
        case.hidden, case.head, case.targets, [(0, 18)], lambda _, scores: objective(scores.logps), entropy=logged
    )
    loss.backward()
    objective(whole(truth).logps).backward()
    assert bool(hit.any()) == bool(forbidden)
    assert all(bool(x.isfinite().all()) for x in case.gradients())
    assert apart(case.gradients(), truth.gradients()) <= 1e-14
    found = chunked_logps(case.hidden, case.head, case.targets, entropy=True)
    assert torch.equal(found.logps == -math.inf, hit)
    torch.testing.assert_close(found.entropy, whole(truth).entropy)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_score_still_reaches_every_weight(kind, autocast):
    """What a process with fewer micro-batches than another is given."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        case = build(size=0, **KINDS[kind]).to(torch.float32)
        loss, _ = one_pass(case, sizes=(0,), entropy=True, correct=True)
        loss.backward()
        later = build(size=0, **KINDS[kind]).to(torch.float32)
        chunked_logps(later.hidden, later.head, later.targets, entropy=True, correct=True).logps.sum().backward()
    assert loss.item() == pytest.approx(math.log(2))  # an empty unit's
    for one in (case, later):
        assert [x.grad.shape for x in one.leaves] == [x.shape for x in one.leaves]
        assert not any(x.grad.any() for x in one.leaves)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_unit_without_scores_before_one_that_fills_a_chunk(cut, autocast):
    cut(2, 100, 100)
    case, truth = build(size=6).to(torch.float32), build(size=6)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss, shown = one_pass(case, sizes=(0, 6))
    loss.backward()
    assert [len(scores.logps) for scores in shown] == [0, 6]
    whole_loss(truth, (0, 6)).backward()
    assert apart(case.gradients(), truth.gradients()) <= (2e-2 if autocast else 1e-6)


class Products(TorchDispatchMode):
    """The shapes of matrix products, and the number of rows of the largest tensor that is as wide as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.addmm):
            self.shapes.append(tuple(out.shape))
        if isinstance(out, Tensor) and out.shape[-1:] == (VOCABULARY,) and func.overloadpacket != torch.ops.aten.t:
            self.largest = max(self.largest, out.numel() // VOCABULARY)
        return out


@pytest.mark.parametrize("frozen", [False, True])
def test_three_products_a_chunk_and_two_under_frozen_weights(cut, frozen):
    cut(8, 8, 100)
    case = build(bias=True).to(torch.float32)
    for leaf in case.leaves[1:]:
        leaf.requires_grad_(not frozen)
    with Products() as seen:
        loss, shown = one_pass(case, entropy=True, correct=True)
        loss.backward()
    sizes = [len(scores.logps) for scores in shown]
    assert sizes == [8, 8, 2]
    wanted = [
        shape for n in sizes for shape in ((n, VOCABULARY), (n, WIDTH), *(() if frozen else ((VOCABULARY, WIDTH),)))
    ]
    assert seen.shapes == wanted
    assert seen.largest == max(sizes)  # never the logits of two chunks
    assert (case.head.weight.grad is None) == frozen
    assert (case.head.bias.grad is None) == frozen
    truth = build(bias=True)
    whole_loss(truth).backward()
    assert apart([case.hidden.grad], [truth.hidden.grad]) <= 1e-6


@pytest.mark.parametrize("frozen", [False, True])
def test_a_unit_over_the_limit_is_computed_twice_in_pieces(cut, frozen):
    cut(2, 4, 100)
    case = build(size=5).to(torch.float32)
    case.head.weight.requires_grad_(not frozen)
    with Products() as seen:
        one_pass(case, sizes=(5,))[0].backward()
    again = [(VOCABULARY, WIDTH)] * (not frozen)
    expected = [(2, VOCABULARY), (2, VOCABULARY), (1, VOCABULARY)]
    for rows in (2, 2, 1):
        expected += [(rows, VOCABULARY), (rows, WIDTH), *again]
    assert seen.shapes == expected
    assert seen.largest == 2


@pytest.mark.parametrize("frozen", [False, True])
def test_chunked_logps_hold_one_chunk_and_spare_frozen_weights(cut, frozen):
    cut(4, 4, 100)
    case = build().to(torch.float32)
    case.head.weight.requires_grad_(not frozen)
    with Products() as seen:
        chunked_logps(case.hidden, case.head, case.targets).logps.sum().backward()
    assert seen.largest == 4
    assert ((VOCABULARY, WIDTH) in seen.shapes) != frozen
    assert (case.head.weight.grad is None) == frozen


def test_the_gradient_of_the_weights_is_handed_over_uncopied():
    """It is as large as the head itself."""
    case = build().to(torch.float32)
    loss, _ = one_pass(case)
    address = loss.grad_fn.gradients[1].data_ptr()
    loss.backward()
    assert case.head.weight.grad.data_ptr() == address


@pytest.mark.parametrize("kind", ["plain", "all"])
@pytest.mark.parametrize("way", ["one pass", "chunked"])
def test_bfloat16_is_no_further_from_the_truth_than_whole_logits(cut, kind, way):
    """A tenth is for luck: the same roundings fall differently."""
    vocabulary, sizes = 211, (40, 100, 60)
    cut(50, 120, 7, vocabulary)
    shape = {"size": 200, "vocabulary": vocabulary, "width": 32, **KINDS[kind]}
    truth, plain, case = build(**shape), build(**shape).to(torch.float32), build(**shape).to(torch.float32)
    whole_loss(truth, sizes).backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = whole(plain).logps
        unit_losses(expected, sizes).backward()
        found = chunked_logps(case.hidden, case.head, case.targets).logps
        loss = one_pass(case, sizes)[0] if way == "one pass" else unit_losses(found, sizes)
    loss.backward()
    right = whole(truth).logps
    assert found.dtype == torch.float32
    assert apart([expected], [right]) > 1e-4  # there is an error to compare with
    assert apart([found], [right]) <= 1.1 * apart([expected], [right])
    for one, other, exact in zip(case.gradients(), plain.gradients(), truth.gradients(), strict=True):
        assert apart([one], [exact]) <= 1.1 * apart([other], [exact])


def test_units_share_a_chunk_while_they_fit(monkeypatch):
    monkeypatch.setattr(engine, "CHUNK_BYTES", 100)
    assert unit_chunks([4, 6, 1, 0, 9, 30, 2, 0], 10) == [(0, 2), (2, 5), (5, 6), (6, 8)]
    assert unit_chunks([0, 0], 10) == [(0, 2)]
    assert unit_chunks([30, 0], 10) == [(0, 1), (1, 2)]
