"""In-process sampling from any transformers causal language model. Hides padding, memory and the draw.

A prompt goes through the model once, whatever the number of its completions. A completion that ends leaves the batch,
and the next prompts take the places that became free. On a CPU models made of Llama's block write by `fused`, all else
writes by `plain`.

A row's tokens depend on its own key alone, never on the rows it is batched with (up to the rounding of a batched matrix
product, which can flip a draw only when it falls on the border between two tokens).
"""

from __future__ import annotations

import random
import warnings
from collections import deque
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
from alignkit.models.paths import first_failure
from alignkit.rollout import fused
from alignkit.rollout.config import SamplingConfig
from alignkit.rollout.draw import draw
from alignkit.rollout.fused import FusedWriter
from alignkit.rollout.guides import build_guide
from alignkit.rollout.plain import PlainWriter
from alignkit.rollout.writer import Writer

PREFILL_TOKENS = 8192
"""Tokens of one forward over prompts, padding included; a longer prompt goes alone."""
REFILL = 0.25
"""Share of the batch that must be free before it waits for further prompts to be read."""
SILENT = 8
"""Tokens that may show nothing within the text of a stop string; the others hold a byte of it each."""
TRIED_TOKENS = 24
"""Tokens of a prompt with which the fused writer is compared with the model."""
FULL_PRECISION, LOW_PRECISION = 1e-4, 0.1
"""Nats a token by which the two may differ on average, in float32 and in bfloat16."""


@dataclass(slots=True)
class _Draft:
    """A completion being written."""

    group: Group
    random: random.Random
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _Prompt:
    """A prompt, and the completions of it that are still to be begun."""

    tokens: list[int]
    drafts: list[_Draft]


@dataclass(slots=True)
class _Read:
    """Prompts that were read together: what the writer remembers of them, and the logits after each, [P, V]."""

    prompts: list[_Prompt]
    told: Any
    logits: Tensor


class NativeEngine:
    """Gives groups their missing completions, sampled from `model` as it stands.

    Args:
        model: a transformers causal language model, bare or wrapped by peft.
        stop_ids: tokens that end a completion; the one drawn is kept as its last token.
        pad_id: fills prompts up on the left; any valid id, it is masked out.
        decode: token ids (without the stop token) → text.
        sampling: temperature, top-k, top-p, min-p, length, stop strings, guides.
        seed: root of the keys of all draws.
        max_batch: rows in one forward.
        fused: write by `fused` where it can; False = always by the model's own forward.
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
        fused: bool = True,
    ) -> None:
        self.model = model
        self.stop_ids = frozenset(stop_ids)
        self.pad_id = pad_id
        self.decode = decode
        self.sampling = sampling
        self.seed = seed
        self.max_batch = max_batch
        self.version = 0
        self._fused, self._tried = fused, False
        self._guides = [build_guide(config) for config in sampling.guides]
        self._context = context_length(model)
        self._tail = SILENT + max((len(stop.encode()) for stop in sampling.stop_strings), default=0)
        for guide in self._guides:
            with guide.over(model):
                pass  # one that does not fit the model is refused before anything is trained

    def sync(self, version: int) -> None:
        """Take note that the weights are now those of `version`: samples carry it, and draws are keyed by it."""
        self.version = version

    def fill(self, groups: list[Group], n: int) -> list[Group]:
        """The same groups with at least `n` completions each; a full group is returned as it is, none is changed.

        A sample's `logps` are of the distribution it was drawn from: after temperature, top-k, top-p and min-p, so 0
        when the temperature is 0.

        Raises:
            DataError: a prompt is empty, or leaves no room in the model's context.
            RecipeError: the model cannot write token by token.
            RunFailed: the model's logits are not finite.
        """
        drafts = [[self._draft(group, i) for i in range(len(group.completions), n)] for group in groups]
        prompts: dict[tuple[int, ...], _Prompt] = {}
        for draft in (draft for new in drafts for draft in new):
            tokens = draft.group.prompt
            prompts.setdefault(tuple(tokens), _Prompt(tokens, [])).drafts.append(draft)
        if prompts:
            with _evaluating(self.model), torch.no_grad(), self._guided():
                self._write(list(prompts.values()))
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
        if not group.prompt:
            raise DataError(f"group {group.id!r}: its prompt has no tokens, and nothing can be written after nothing")
        if self._context is not None and len(group.prompt) >= self._context:
            raise DataError(
                f"group {group.id!r}: its prompt has {len(group.prompt)} tokens and the model's context is "
                f"{self._context}, which leaves no room for a completion; shorten the prompt (train.max_length cuts it)"
            )
        return _Draft(group, rng.generator(self.seed, "sample", self.version, group.id, index))

    def _finish(self, draft: _Draft) -> Completion:
        stopped = draft.tokens[-1] in self.stop_ids
        text = self.decode(draft.tokens[:-1] if stopped else draft.tokens)
        ends = [text.index(stop) for stop in self.sampling.stop_strings if stop in text]
        return Completion(
            text[: min(ends, default=None)],
            draft.tokens,
            logps=draft.logps,
            version=self.version,
            ended=stopped or bool(ends),
        )

    def _is_done(self, draft: _Draft) -> bool:
        full = self._context is not None and len(draft.group.prompt) + len(draft.tokens) >= self._context
        long = len(draft.tokens) >= self.sampling.max_completion_length
        return full or long or draft.tokens[-1] in self.stop_ids or self._says_stop(draft)

    def _says_stop(self, draft: _Draft) -> bool:
        """Whether the text holds a stop string."""
        stops = self.sampling.stop_strings
        if not stops or not _holds(self.decode(draft.tokens[-self._tail :]), stops):
            return False
        return _holds(self.decode(draft.tokens), stops)  # an end by itself may be decoded to another text

    def _writer(self, prompts: Sequence[_Prompt]) -> Writer:
        """Writes all drafts of these prompts with the weights as they are."""
        rows = min(self.max_batch, sum(len(prompt.drafts) for prompt in prompts))
        longest = max(len(prompt.tokens) for prompt in prompts) + self.sampling.max_completion_length
        if self._fused and fused.why_not(self.model, longest) is None:
            reason = None if self._tried else first_failure(lambda: self._difference(prompts[0].tokens))
            if reason is None:
                self._tried = True
                return FusedWriter(self.model, rows, longest)
            self._fused = False
            warnings.warn(f"sampling goes through the model's own forward, which is slower: {reason}", stacklevel=2)
        return PlainWriter(self.model, rows, self.pad_id)

    def _difference(self, prompt: list[int]) -> str | None:
        """What a fused writer says otherwise than the model of two rows with prompts of two lengths; None = nothing."""
        tokens = prompt[-TRIED_TOKENS:] * 3
        rows = [tokens[: len(tokens) // 2], tokens[: len(tokens) // 3]]
        writer = FusedWriter(self.model, len(rows), len(tokens))
        told, logits = writer.read(rows)
        writer.enter(told, range(len(rows)))
        found = [logits]
        for token in tokens[:2]:
            found.append(writer.step([token] * 2, [len(row) for row in rows]))
            rows = [[*row, token] for row in rows]
        worst = 0.0
        for row, mine in zip(rows, torch.stack(found, 1), strict=True):
            whole: Tensor = self.model(input_ids=torch.tensor([row])).logits[0, -len(found) :]
            expected, given = (x.float().log_softmax(-1) for x in (whole, mine))
            worst = max(worst, (expected - given).abs().mean().item())
        allowed = FULL_PRECISION if found[0].dtype in (torch.float32, torch.float64) else LOW_PRECISION
        return None if worst <= allowed else f"log-probabilities of a first use were {worst:.1g} nats apart"

    def _write(self, prompts: Sequence[_Prompt]) -> None:
        """Write all drafts token by token; one that is done makes room for the next."""
        # The longest first: then no prompt is longer than what the rows under way already have behind them.
        waiting = deque(sorted(prompts, key=lambda prompt: -len(prompt.tokens)))
        writer = self._writer(prompts)
        read: _Read | None = None
        live: list[_Draft] = []
        while live or waiting or read is not None:
            free = self.max_batch - len(live)
            joins = not live or (writer.mixes and free >= REFILL * self.max_batch)
            if joins and (waiting or read is not None):
                read = read if read is not None else self._read(waiting, free, writer)
                live += self._begin(read, free, writer)
                if not any(prompt.drafts for prompt in read.prompts):
                    read = None
            else:
                live = self._step(live, writer)

    def _read(self, waiting: deque[_Prompt], free: int, writer: Writer) -> _Read:
        """The next prompts through the model, as many as have completions for `free` places."""
        prompts = [waiting.popleft()]
        longest, free = len(prompts[0].tokens), free - len(prompts[0].drafts)
        while waiting and free > 0 and (len(prompts) + 1) * longest <= PREFILL_TOKENS:
            if len(waiting[0].tokens) < longest and not writer.mixes:
                break
            prompts.append(waiting.popleft())
            free -= len(prompts[-1].drafts)
        return _Read(prompts, *writer.read([prompt.tokens for prompt in prompts]))

    def _begin(self, read: _Read, free: int, writer: Writer) -> list[_Draft]:
        """The first token of at most `free` completions. Returns those that go on, which have taken their places."""
        begun: list[tuple[int, _Draft]] = []
        for number, prompt in enumerate(read.prompts):
            count = free - len(begun)
            begun += [(number, draft) for draft in prompt.drafts[:count]]
            del prompt.drafts[:count]
        numbers = torch.tensor([number for number, _ in begun], device=read.logits.device)
        self._draw(read.logits.index_select(0, numbers), [draft for _, draft in begun])
        begun = [(number, draft) for number, draft in begun if not self._is_done(draft)]
        if begun:
            writer.enter(read.told, [number for number, _ in begun])
        return [draft for _, draft in begun]

    def _step(self, live: list[_Draft], writer: Writer) -> list[_Draft]:
        """One more token of every row. Returns the rows that go on, each in its place."""
        positions = [len(draft.group.prompt) + len(draft.tokens) - 1 for draft in live]
        self._draw(writer.step([draft.tokens[-1] for draft in live], positions), live)
        kept = [row for row, draft in enumerate(live) if not self._is_done(draft)]
        return live if len(kept) == len(live) else [live[row] for row in writer.keep(kept)]

    def _draw(self, logits: Tensor, drafts: Sequence[_Draft]) -> None:
        """Append one token to every draft. `logits` [N, V]."""
        finite = logits.amax(-1).isfinite().tolist()  # nan and +inf come to the top; -inf is a token that cannot be
        if not all(finite):
            draft = drafts[finite.index(False)]
            raise RunFailed(
                f"sampling group {draft.group.id!r}: the model's logits after {len(draft.tokens)} tokens are not "
                "finite; the weights are broken, go back to an earlier checkpoint"
            )
        uniforms = torch.tensor([draft.random.random() for draft in drafts], dtype=torch.float64, device=logits.device)
        tokens, logps = draw(logits, uniforms, self.sampling)
        for draft, token, logp in zip(drafts, tokens.tolist(), logps.tolist(), strict=True):
            draft.tokens.append(token)
            draft.logps.append(logp)


def _holds(text: str, stops: Sequence[str]) -> bool:
    return any(stop in text for stop in stops)


def context_length(model: Any) -> int | None:
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
