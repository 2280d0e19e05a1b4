"""In-process sampling from any transformers causal language model. Hides padding, the key-value cache and the draw.

A row's tokens depend on its own key alone, never on the rows it is batched with (up to the rounding of a batched matrix
product, which can flip a draw only when it falls on the border between two tokens).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.core import rng
from alignkit.core.errors import DataError, RunFailed
from alignkit.core.types import Completion, Group
from alignkit.models.heads import mixed
from alignkit.rollout.config import SamplingConfig
from alignkit.rollout.guides import build_guide

BELOW_ONE = 1.0 - 2.0**-52  # keeps `uniform × total` below `total` after rounding


@dataclass(slots=True)
class _Draft:
    """A completion being written."""

    group: Group
    random: random.Random
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)


class NativeEngine:
    """Gives groups their missing completions, sampled from `model` as it stands.

    Args:
        model: a transformers causal language model, bare or wrapped by peft.
        stop_ids: tokens that end a completion; the one drawn is kept as its last token.
        pad_id: fills prompts up on the left; any valid id, it is masked out.
        decode: token ids (without the stop token) → text.
        sampling: temperature, top-k, top-p, length, guides.
        seed: root of the keys of all draws.
        max_batch: rows in one forward.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        stop_ids: Collection[int],
        pad_id: int,
        decode: Callable[[list[int]], str],
        sampling: SamplingConfig,
        seed: int,
        max_batch: int = 64,
    ) -> None:
        self.model = model
        self.stop_ids = frozenset(stop_ids)
        self.pad_id = pad_id
        self.decode = decode
        self.sampling = sampling
        self.seed = seed
        self.max_batch = max_batch
        self.version = 0
        self._guides = [build_guide(config) for config in sampling.guides]
        self._context = _context_length(model)
        for guide in self._guides:
            with guide.over(model):
                pass  # one that does not fit the model is refused before anything is trained

    def sync(self, version: int) -> None:
        """Take note that the weights are now those of `version`: samples carry it, and draws are keyed by it."""
        self.version = version

    def fill(self, groups: list[Group], n: int) -> list[Group]:
        """The same groups with at least `n` completions each; a full group is returned as it is, none is changed.

        A sample's `logps` are of the distribution it was drawn from: after temperature, top-k and top-p, so 0 when the
        temperature is 0.

        Raises:
            DataError: a prompt leaves no room in the model's context.
            RunFailed: the model's logits are not finite.
        """
        drafts = [[self._draft(group, i) for i in range(len(group.completions), n)] for group in groups]
        rows = [draft for new in drafts for draft in new]
        with _evaluating(self.model), torch.no_grad(), self._guided():
            for start in range(0, len(rows), self.max_batch):
                self._write(rows[start : start + self.max_batch])
        return [
            replace(group, completions=[*group.completions, *map(self._finish, new)]) if new else group
            for group, new in zip(groups, drafts, strict=True)
        ]

    @contextmanager
    def _guided(self) -> Iterator[None]:
        """The model as it writes: of several heads the even mixture, unless a guide says otherwise."""
        with ExitStack() as stack:
            stack.enter_context(mixed(self.model))
            for guide in self._guides:
                stack.enter_context(guide.over(self.model))
            yield

    def _draft(self, group: Group, index: int) -> _Draft:
        if self._context is not None and len(group.prompt) >= self._context:
            raise DataError(
                f"group {group.id!r}: its prompt has {len(group.prompt)} tokens and the model's context is "
                f"{self._context}, which leaves no room for a completion; shorten the prompt (train.max_length cuts it)"
            )
        return _Draft(group, rng.generator(self.seed, "sample", self.version, group.id, index))

    def _finish(self, draft: _Draft) -> Completion:
        spoken = draft.tokens[:-1] if draft.tokens[-1] in self.stop_ids else draft.tokens
        return Completion(self.decode(spoken), draft.tokens, logps=draft.logps, version=self.version)

    def _is_done(self, draft: _Draft) -> bool:
        full = self._context is not None and len(draft.group.prompt) + len(draft.tokens) >= self._context
        long = len(draft.tokens) >= self.sampling.max_completion_length
        return full or long or draft.tokens[-1] in self.stop_ids

    def _write(self, live: list[_Draft]) -> None:
        """Extend all drafts token by token; one that is done leaves the batch and its cache."""
        device = next(self.model.parameters()).device
        tokens, attention = _pad_left([draft.group.prompt for draft in live], self.pad_id, device)
        positions = (attention.cumsum(-1) - 1).clamp(min=0)
        cache: Any = None
        while live:
            out = self.model(
                input_ids=tokens,
                attention_mask=attention,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            drawn = self._draw(out.logits[:, -1], live)
            kept = [i for i, draft in enumerate(live) if not self._is_done(draft)]
            if len(kept) < len(live):
                live = [live[i] for i in kept]
                index = torch.tensor(kept, dtype=torch.long, device=device)
                cache.batch_select_indices(index)
                drawn, attention, positions = drawn[index], attention[index], positions[index]
            tokens = drawn[:, None]
            attention = torch.cat([attention, attention.new_ones(len(live), 1)], dim=1)
            positions = positions[:, -1:] + 1

    def _draw(self, logits: Tensor, live: Sequence[_Draft]) -> Tensor:
        """Append one token to every draft. `logits` [N, V]; returns the tokens [N]."""
        finite = logits.double().logsumexp(-1).isfinite().tolist()
        if not all(finite):
            draft = live[finite.index(False)]
            raise RunFailed(
                f"sampling group {draft.group.id!r}: the model's logits after {len(draft.tokens)} tokens are not "
                "finite; the weights are broken, go back to an earlier checkpoint"
            )
        uniforms = torch.tensor([draft.random.random() for draft in live], dtype=torch.float64, device=logits.device)
        tokens, logps = draw(logits, uniforms, self.sampling)
        for draft, token, logp in zip(live, tokens.tolist(), logps.tolist(), strict=True):
            draft.tokens.append(token)
            draft.logps.append(logp)
        return tokens


def support_logps(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """The distribution that is drawn from: [N, V] logits → [N, V] float64 log-probabilities in nats, -inf off it.

    Temperature, then the `top_k` likeliest, then of those the smallest set whose probability reaches `top_p`.
    """
    logits = logits.double()
    if sampling.temperature == 0:
        return torch.full_like(logits, -torch.inf).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        values, kept = logits.topk(sampling.top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, values)
    if sampling.top_p < 1:
        probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits.log_softmax(-1)


def draw(logits: Tensor, uniforms: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """One token a row by inverse CDF.

    Args: `logits` [N, V]; `uniforms` [N] float64 in [0, 1). Returns: tokens [N] and their log-probabilities [N] in
    nats on the support that was drawn from.
    """
    logps = support_logps(logits, sampling)
    cumulative = logps.exp().cumsum(-1)
    threshold = uniforms.clamp(max=BELOW_ONE)[:, None] * cumulative[:, -1:]
    # right=True: the first token whose cumulative probability *exceeds* the threshold, so never one of probability 0
    tokens = torch.searchsorted(cumulative, threshold, right=True)
    return tokens.squeeze(-1), logps.gather(-1, tokens).squeeze(-1)


def _pad_left(prompts: Sequence[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts → tokens and attention (1 = real), both [N, L] with the last token of every prompt in the last column."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = [[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    attention = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(tokens, device=device), torch.tensor(attention, device=device)


def _context_length(model: Any) -> int | None:
    """Positions the model knows; None for one without such a limit (its config then has no such field)."""
    config = model.config.get_text_config()
    return config.max_position_embeddings if hasattr(config, "max_position_embeddings") else None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside (no dropout, no activation checkpointing, so the cache works); afterwards as before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
