"""Hidden states and logits → log-probabilities. No caller ever holds the logits of more than one chunk.

`token_logps` is the plain formula on whole logits. `one_pass_loss` is what training uses: it goes through the scored
positions chunk by chunk, asks for the loss of a chunk as soon as its log-probabilities are there, and turns the logits
in place into their gradient, so that three matrix products do (logits, gradient of the states, gradient of the
weights) and one chunk is alive. `chunked_logps` serves callers whose loss comes later; it computes each chunk twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = {"cpu": 2**19}
"""Logits worked on at a time, so that the passes over them stay in a processor's cache; elsewhere all at once."""
CHUNK_BYTES = 256 * 2**20
"""Logits computed by one matrix product, where several units fit into it."""
MAX_CHUNK_BYTES = 384 * 2**20
"""A single unit whose logits are larger is computed twice, in pieces of `CHUNK_BYTES`."""


class TokenScores(NamedTuple):
    """Of S scored tokens, [S] each: log-probability in nats, and on demand entropy in nats, and 1.0 where no token was
    more likely than the right one. `values` are what somebody else says of the same tokens."""

    logps: Tensor
    entropy: Tensor | None
    correct: Tensor | None
    values: Tensor | None = None


@dataclass(frozen=True)
class Head:
    """Hidden state [hidden] → logits [V]: softcap(scale · (W h + b)), with softcap(x) = c · tanh(x / c)."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def shifted(logits: Tensor) -> Tensor:
    """[N, L, V] → [N, L, V] with `shifted(logits)[n, t]` predicting tokens[n, t]; row 0 predicts nothing and is 0."""
    return torch.cat([torch.zeros_like(logits[:, :1]), logits[:, :-1]], dim=1)


def token_logps(
    logits: Tensor, tokens: Tensor, mask: Tensor, *, entropy: bool = False, correct: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probability of each masked token, and on demand entropy and top-1 hits, all [N, L].

    Args:
        logits: [N, L, V]; position t predicts token t + 1. Upcast to float32 (float64 stays).
        tokens: [N, L] ids.
        mask: [N, L] bool, True where the *token* is wanted; column 0 has no prediction and must be False.

    Returns:
        logps in nats with `logps[n, t] = log p(tokens[t] | tokens[<t])`, 0 outside the mask; entropy in nats; correct
        (1.0 where no token was more likely than the right one).

    Raises:
        ValueError: the mask asks for the first token, which nothing predicts.

    Only masked positions are expanded to the vocabulary in float32, so prompts and padding cost nothing here.
    """
    if mask.shape[1] == 0 or bool(mask[:, 0].any()):
        raise ValueError("the first token of a row has no prediction: its mask must be False")
    wanted = mask[:, 1:]
    scores = picked_logps(logits[:, :-1][wanted], tokens[:, 1:][wanted], entropy=entropy, correct=correct)

    def scatter(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.new_zeros(mask.shape).masked_scatter(mask, x)

    logps = scores.logps.new_zeros(mask.shape).masked_scatter(mask, scores.logps)
    return logps, scatter(scores.entropy), scatter(scores.correct)


def picked_logps(logits: Tensor, targets: Tensor, *, entropy: bool = False, correct: bool = False) -> TokenScores:
    """`TokenScores` from logits [S, V] (upcast to float32) and the ids [S] they should predict, by autograd."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logps = logits.log_softmax(-1)
    picked = logps.gather(-1, targets[:, None]).squeeze(-1)
    return TokenScores(
        picked,
        -(logps.exp() * logps.clamp(min=-1e30)).sum(-1) if entropy else None,
        (picked >= logps.amax(-1)).to(picked.dtype) if correct else None,
    )


def head_logits(hidden: Tensor, head: Head) -> Tensor:
    """[S, hidden] → [S, V], by autograd and in the dtype of autocast: what the model's own output layer does."""
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


class HeadChunk:
    """Some positions on their way: states → logits → probabilities → gradient of the logits, all in one buffer.

    Runs without autograd. Matrix products are in the dtype of autocast, everything between them in float32 (float64 for
    float64 weights).
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        weight: Tensor,
        targets: Tensor,
        *,
        buffer: Tensor,
        entropy: bool,
        correct: bool,
    ) -> None:
        """`weight` is the head's in the dtype of the products, `buffer` [at least S, V] in that of the logits."""
        self._hidden, self._head, self._weight, self._targets = hidden.to(weight.dtype), head, weight, targets
        self._z = buffer[: len(targets)]
        product = torch.mm(self._hidden, weight.t(), **({"out": self._z} if self._z.dtype == weight.dtype else {}))
        if product is not self._z:
            self._z.copy_(product)
        if head.bias is not None:
            self._z.add_(head.bias)
        if head.scale != 1.0:
            self._z.mul_(head.scale)
        size = len(targets)
        self._normaliser = self._z.new_empty(size) if head.softcap is not None else None
        self.scores = TokenScores(
            self._z.new_empty(size),
            self._z.new_empty(size) if entropy else None,
            self._z.new_empty(size) if correct else None,
        )
        for where in self._blocks():
            self._normalise(where)

    def _blocks(self) -> list[slice]:
        size, vocabulary = self._z.shape
        rows = max(1, BLOCK_ELEMENTS.get(self._z.device.type, self._z.numel()) // max(1, vocabulary))
        rows += -rows % torch.get_num_threads()  # rows are shared out among them: none shall wait
        return [slice(start, min(start + rows, size)) for start in range(0, size, rows)]

    def _normalise(self, where: slice) -> None:
        """Take the scores of some rows; leave probabilities, or logs of them where a softcap's slope needs those."""
        z, targets = self._z[where], self._targets[where]
        if self._head.softcap is not None:
            z.div_(self._head.softcap).tanh_().mul_(self._head.softcap)
        right, most = z.gather(-1, targets[:, None]).squeeze(-1), z.amax(-1)
        below = z - most[:, None] if self.scores.entropy is not None else None
        if self._normaliser is None:
            torch._softmax(z, -1, False, out=z)
            rest = -z.amax(-1).log_()  # log Σ exp(logit - most): the largest probability is one over the sum
        else:
            torch._log_softmax(z, -1, False, out=z)
            rest = -z.amax(-1)
            self._normaliser[where] = most + rest
        self.scores.logps[where] = (right - most) - rest
        if self.scores.correct is not None:
            self.scores.correct[where] = (right >= most).to(z.dtype)
        if self.scores.entropy is not None and below is not None:
            p = z if self._normaliser is None else z.exp()
            entropy = rest - torch.linalg.vecdot(p, below)
            if not bool(entropy.isfinite().all()):  # 0 · -inf, where a model forbids some tokens
                entropy = rest - torch.linalg.vecdot(p, below.clamp_(min=-1e30))
            self.scores.entropy[where] = entropy

    def backward(
        self,
        grad: Tensor,
        hidden_grad: Tensor,
        weight_grad: Tensor | None,
        bias_grad: Tensor | None,
        *,
        first: bool,
        entropy_grad: Tensor | None = None,
    ) -> None:
        """Write the gradient [S, hidden] for d loss / d logps = `grad` [S], and d loss / d entropy, if there is one;
        write (`first`) or add the weights'."""
        grad = grad.to(self._z.dtype)
        for where in self._blocks():
            z, g = self._z[where], grad[where, None]
            if self._head.softcap is not None:
                assert self._normaliser is not None
                slope = 1 - ((z + self._normaliser[where, None]) / self._head.softcap).square_()
                z.exp_()
            surprise = None
            if entropy_grad is not None:  # dH/dz = -p (log p + H)
                assert self.scores.entropy is not None
                surprise = z.clamp(min=torch.finfo(z.dtype).tiny).log_().add_(self.scores.entropy[where, None])
                surprise.mul_(z).mul_(-entropy_grad[where, None].to(z.dtype))
            z.mul_(-g).scatter_add_(-1, self._targets[where, None], g)
            if surprise is not None:
                z.add_(surprise)
            if self._head.softcap is not None:
                z.mul_(slope)
            if self._head.scale != 1.0:
                z.mul_(self._head.scale)
        z = self._z.to(self._weight.dtype)
        if hidden_grad.dtype == z.dtype:
            torch.mm(z, self._weight, out=hidden_grad)
        else:
            hidden_grad.copy_(torch.mm(z, self._weight))
        if weight_grad is not None:
            if weight_grad.dtype != z.dtype:
                product = torch.mm(z.t(), self._hidden)
                weight_grad.copy_(product) if first else weight_grad.add_(product)
            elif first:
                torch.mm(z.t(), self._hidden, out=weight_grad)
            else:
                weight_grad.addmm_(z.t(), self._hidden)
        if bias_grad is not None:
            bias_grad.copy_(self._z.sum(0)) if first else bias_grad.add_(self._z.sum(0))


Objective = Callable[[int, TokenScores], Tensor]
"""Number of a chunk and its scores, all but `correct` requiring a gradient → that chunk's share of the loss, a scalar.
"""


class _Sweep:
    """The chunks of one batch of positions, over one buffer."""

    def __init__(
        self, hidden: Tensor, head: Head, targets: Tensor, *, entropy: bool = False, correct: bool = False
    ) -> None:
        device = hidden.device.type
        wide = head.weight.dtype if head.weight.dtype == torch.float64 else torch.float32
        self.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        self.hidden, self.head, self.targets = hidden.detach(), head, targets
        self.weight = head.weight.detach().to(self.dtype)
        self._wide, self._wants = wide, {"entropy": entropy, "correct": correct}
        self._buffer = hidden.new_empty(0, self.weight.shape[0], dtype=wide)

    @property
    def row_bytes(self) -> int:
        """Bytes of one position's logits."""
        return self.weight.shape[0] * self._wide.itemsize

    def pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The range cut into pieces of `CHUNK_BYTES`."""
        size = max(1, CHUNK_BYTES // self.row_bytes)
        return [(a, min(a + size, stop)) for a in range(start, stop, size)]

    def chunk(self, start: int, stop: int, *, wants: dict[str, bool] | None = None) -> HeadChunk:
        """Positions start … stop - 1; the chunk before is overwritten. `wants`: scores other than those asked for."""
        if len(self._buffer) < stop - start:
            self._buffer = self.hidden.new_empty(0, dtype=self._wide)  # free before taking more
            self._buffer = self.hidden.new_empty(stop - start, self.weight.shape[0], dtype=self._wide)
        with torch.autocast(self.hidden.device.type, enabled=False):
            return HeadChunk(
                self.hidden[start:stop],
                self.head,
                self.weight,
                self.targets[start:stop],
                buffer=self._buffer,
                **(self._wants if wants is None else wants),
            )

    def scores(self, start: int, stop: int) -> TokenScores:
        """Scores of a range of any length, in pieces; no gradient will be asked for."""
        parts = [self.chunk(a, b).scores for a, b in self.pieces(start, stop)]
        if not parts:
            empty = self.hidden.new_zeros(0, dtype=self._wide)
            # Each its own tensor: autograd would take one that is not differentiable for all three.
            return TokenScores(
                empty,
                empty.clone() if self._wants["entropy"] else None,
                empty.clone() if self._wants["correct"] else None,
            )
        return TokenScores(*(None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True)))  # type: ignore[arg-type]


class _Gradients:
    """What a sweep's backward fills: the gradients of states and of the head's trainable weights."""

    def __init__(self, sweep: _Sweep, needs: Sequence[bool]) -> None:
        wants_weight, wants_bias = needs[1], needs[2]
        head = sweep.head
        self._hidden = torch.zeros_like(sweep.hidden)
        self._weight = torch.empty_like(head.weight) if wants_weight else None
        self._bias = torch.empty_like(head.bias) if head.bias is not None and wants_bias else None
        self._first = True

    def add(self, chunk: HeadChunk, start: int, stop: int, grad: Tensor, entropy_grad: Tensor | None = None) -> None:
        """The share of positions start … stop - 1."""
        with torch.autocast(self._hidden.device.type, enabled=False):
            chunk.backward(
                grad,
                self._hidden[start:stop],
                self._weight,
                self._bias,
                first=self._first,
                entropy_grad=entropy_grad,
            )
        self._first = False

    def all(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of states, weight and bias."""
        if self._first:  # nothing was scored, and nothing written
            for x in (self._weight, self._bias):
                if x is not None:
                    x.zero_()
        return self._hidden, self._weight, self._bias


def _share(i: int, scores: TokenScores, objective: Objective) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """A chunk's share of the loss, and its gradient for log-probabilities, entropy and values, None = they had none."""
    names = [name for name in ("logps", "entropy", "values") if getattr(scores, name) is not None]
    leaves = [getattr(scores, name).detach().requires_grad_() for name in names]
    with torch.enable_grad():
        loss = objective(i, scores._replace(**dict(zip(names, leaves, strict=True))))
        found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
    grads = dict(zip(names, found, strict=True))
    grad = grads["logps"] if grads["logps"] is not None else torch.zeros_like(scores.logps)
    return loss.detach(), grad, grads.get("entropy"), grads.get("values")


class _OnePassLoss(torch.autograd.Function):
    """The gradient is known when the loss is; backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor | None,
        sweep: _Sweep,
        chunks: Sequence[tuple[int, int]],
        objective: Objective,
    ) -> Tensor:
        gradients = _Gradients(sweep, ctx.needs_input_grad)
        values_grad = None if values is None else torch.zeros_like(values)
        total: Tensor | None = None
        for i, (start, stop) in enumerate(chunks):
            fits = (stop - start) * sweep.row_bytes <= MAX_CHUNK_BYTES
            chunk = sweep.chunk(start, stop) if fits else None
            scores = chunk.scores if chunk is not None else sweep.scores(start, stop)
            scores = scores._replace(values=None if values is None else values[start:stop])
            loss, grad, entropy_grad, value_grad = _share(i, scores, objective)
            total = loss if total is None else total + loss
            if values_grad is not None and value_grad is not None:
                values_grad[start:stop] = value_grad
            if chunk is not None:
                gradients.add(chunk, start, stop, grad, entropy_grad)
                continue
            wants = {"entropy": entropy_grad is not None, "correct": False}
            for a, b in sweep.pieces(start, stop):
                where = slice(a - start, b - start)
                again = sweep.chunk(a, b, wants=wants)
                gradients.add(again, a, b, grad[where], None if entropy_grad is None else entropy_grad[where])
        assert total is not None
        ctx.gradients = (*gradients.all(), values_grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Scale what forward left, in place: it is used once, and what nobody else holds becomes `.grad` uncopied."""
        gradients = ctx.gradients
        del ctx.gradients
        scaled = (None if x is None else x.mul_(grad.to(x.dtype)) for x in gradients)
        return (*scaled, None, None, None)


def one_pass_loss(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    chunks: Sequence[tuple[int, int]],
    objective: Objective,
    *,
    values: Tensor | None = None,
    entropy: bool = False,
    correct: bool = False,
) -> Tensor:
    """Σ over chunks of `objective(i, scores of chunk i)`, a scalar whose backward costs nothing more.

    Args:
        hidden: [S, hidden], the state that predicts each of `targets` [S].
        chunks: (start, stop) in S, in order, covering it. A chunk's share of the loss may depend on its own scores
            only. `unit_chunks` cuts them to a good size.
        objective: see `Objective`.
        values: [S], handed to the objective as they are, and given their gradient.
        entropy, correct: also compute these scores.
    """
    sweep = _Sweep(hidden, head, targets, entropy=entropy, correct=correct)
    loss: Tensor = _OnePassLoss.apply(hidden, head.weight, head.bias, values, sweep, chunks, objective)  # type: ignore[no-untyped-call]
    return loss


def unit_chunks(sizes: Sequence[int], row_bytes: int) -> list[tuple[int, int]]:
    """Units of `sizes` positions each → (first, last + 1) units whose logits fit into `CHUNK_BYTES` together."""
    chunks: list[tuple[int, int]] = []
    filled = 0
    for i, size in enumerate(sizes):
        if chunks and (filled + size) * row_bytes <= CHUNK_BYTES:
            chunks[-1] = (chunks[-1][0], i + 1)
            filled += size
        else:
            chunks.append((i, i + 1))
            filled = size
    return chunks


class _ChunkedLogps(torch.autograd.Function):
    """Log-probabilities now, gradient later: backward computes each chunk's logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, sweep: _Sweep
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.sweep = sweep
        scores = sweep.scores(0, len(sweep.targets))
        ctx.mark_non_differentiable(*(x for x in (scores.entropy, scores.correct) if x is not None))
        return scores.logps, scores.entropy, scores.correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
        sweep: _Sweep = ctx.sweep
        gradients, neither = _Gradients(sweep, ctx.needs_input_grad), {"entropy": False, "correct": False}
        for start, stop in sweep.pieces(0, len(sweep.targets)):
            gradients.add(sweep.chunk(start, stop, wants=neither), start, stop, grad[start:stop])
        return (*gradients.all(), None)


def chunked_logps(
    hidden: Tensor, head: Head, targets: Tensor, *, entropy: bool = False, correct: bool = False
) -> TokenScores:
    """Scores of `targets` [S] from the states [S, hidden] that predict them; differentiable in `logps`."""
    sweep = _Sweep(hidden, head, targets, entropy=entropy, correct=correct)
    scores = _ChunkedLogps.apply(hidden, head.weight, head.bias, sweep)  # type: ignore[no-untyped-call]
    return TokenScores(*scores)
