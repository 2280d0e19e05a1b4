"""Batch → Forward. How rows are laid out for the model is this file's secret."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path as Folder
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.core.contracts import Heads
from alignkit.core.types import Batch, Forward, Row, Unit
from alignkit.data.collate import collate, select_units, to_device
from alignkit.dist.backend import BuildOptimizer
from alignkit.dist.engine import DistEngine
from alignkit.models.heads import (
    MEMBER,
    LanguageHeads,
    copy_weights,
    detached,
    extra,
    load_heads,
    members,
    mixed,
    output_layer,
    save_heads,
    score_layer,
)
from alignkit.models.layout import Inputs, cut_batch, lay_out
from alignkit.models.load import LANGUAGE, POLICY_ADAPTER, REFERENCE_ADAPTER
from alignkit.models.mlp import light_feed_forwards
from alignkit.models.offload import ActivationOffload
from alignkit.models.paths import (
    Path,
    causal_model,
    choose_path,
    first_failure,
    padded,
    read_head,
    refuse_if_asked,
    whole_logits,
)
from alignkit.models.plain import PlainLogps, plain_logps, plain_scores
from alignkit.ops.logps import Head, TokenScores, chunked_logps, head_logits, one_pass_loss, picked_logps, unit_chunks

SCORING_TOKENS = 8192
"""Tokens of one no-grad forward."""
LOGPS, SCORES, VALUES = frozenset({"logps"}), frozenset({"scores"}), frozenset({"values"})
CRITIC = "critic"
"""The folder of the critic's weights, inside the policy's."""
FULL_PRECISION, LOW_PRECISION = 1e-4, 0.1
"""Nats a token by which two ways of computing the same may differ on average, in float32 and in bfloat16."""

Objective = Callable[[Forward, Batch], Tensor]
"""What is said of some units of a batch, and these units → their share of the loss, a scalar."""


@dataclass(frozen=True)
class ForwardOptions:
    """How a model is used, from the recipe's `model` block."""

    layout: str = "auto"
    attn_implementation: str | None = None
    activation_offload: bool = False
    temperature: float = 1.0
    """Log-probabilities are those of the model when it writes at this temperature."""


class _Scorer(nn.Module):
    """Body, head and loss in one module: whatever wraps it for several processes sees every weight used in one call."""

    def __init__(self, model: Any, dist: DistEngine, options: ForwardOptions, critic: Any = None) -> None:
        super().__init__()
        self.model, self.critic = model, critic
        self.own_head = False
        """Rows go through the model's own output layer, whatever heads there are."""
        self._dist, self._offload, self._temperature = dist, options.activation_offload, options.temperature

    def forward(self, batch: Batch, outputs: frozenset[str], path: Path, objective: Objective | None) -> Any:
        """Forward of a batch (on the CPU), or the loss that `objective` makes of its units."""
        inputs = lay_out(batch, path.layout, self._dist.device)
        whole = to_device(batch, self._dist.device)
        with self._dist.autocast():
            if path.scores:
                out = self._scores(inputs, whole)
                return out if objective is None else objective(out, whole)
            values = self._values(inputs) if "values" in outputs else None
            if values is not None and outputs == VALUES:
                return _forward_of(whole, TokenScores(torch.zeros_like(values), None, None, values))
            targets = whole.inputs["tokens"][whole["mask"]]
            wants = {"entropy": "entropy" in outputs, "correct": "correct" in outputs}
            heads = extra(self.model)
            if isinstance(heads, LanguageHeads) and not self.own_head:
                return self._many_heads(batch, whole, inputs, targets, heads, path, outputs, objective, wants)
            if path.head is None or "logits" in outputs:
                logits = self._logits(inputs)
                out = _forward_of(whole, picked_logps(logits, targets, **wants)._replace(values=values))
                if "logits" in outputs:
                    out = _with_logits(out, whole, logits)
                return out if objective is None else objective(out, whole)
            head, states = self._tempered(self._present(path.head)), self._states(inputs, self.model)
            if objective is not None and torch.is_grad_enabled():
                return self._one_pass(batch, whole, states, head, targets, objective, wants, values)
            out = _forward_of(whole, chunked_logps(states, head, targets, **wants)._replace(values=values))
        return out if objective is None else objective(out, whole)

    def _present(self, head: Head) -> Head:
        """The head with the weights that its layer has now: spread over processes, they come and go."""
        layer = causal_model(self.model).get_output_embeddings()
        return replace(head, weight=layer.weight, bias=layer.bias)

    def _tempered(self, head: Head) -> Head:
        """The head whose logits are this one's over the temperature."""
        if self._temperature == 1.0:
            return head
        softcap = None if head.softcap is None else head.softcap / self._temperature
        return replace(head, scale=head.scale / self._temperature, softcap=softcap)

    def _values(self, inputs: Inputs) -> Tensor:
        """What the critic says before each scored token, [S], in float32."""
        states = self._states(inputs, self.critic)
        with torch.autocast(states.device.type, enabled=False):
            values: Tensor = score_layer(self.critic)(states if states.dtype == torch.float64 else states.float())
        return values.squeeze(-1)

    def _many_heads(
        self,
        batch: Batch,
        whole: Batch,
        inputs: Inputs,
        targets: Tensor,
        heads: LanguageHeads,
        path: Path,
        outputs: frozenset[str],
        objective: Objective | None,
        wants: dict[str, bool],
    ) -> Any:
        """Every row through the head that its input `head` numbers; the rows of a unit through one."""
        own, why = read_head(causal_model(self.model))
        if own is None:
            raise ValueError(f"several heads need the formula of the model's own: {why}")
        layers = [replace(self._tempered(own), weight=weight, bias=None) for weight in heads.weights]
        chosen = batch.inputs["head"].long()
        states = self._states(inputs, self.model)
        of_token = chosen[:, None].expand(batch["mask"].shape)[batch["mask"]].to(states.device)
        places = [(of_token == i).nonzero().flatten() for i in range(len(layers))]
        one_pass = path.head is not None and "logits" not in outputs
        if one_pass and objective is not None and torch.is_grad_enabled():
            # Every head takes part in every backward: other processes may have rows for it.
            total = sum(0.0 * layer.weight[0, 0] for layer in layers) + 0.0 * states.sum()
            for i, layer in enumerate(layers):
                index = (batch.by_unit(chosen)[:, 0] == i).nonzero().flatten().tolist()
                if index:
                    part = select_units(batch, index)
                    some = (states.index_select(0, places[i]), layer, targets[places[i]])
                    total = total + self._one_pass(part, to_device(part, states.device), *some, objective, wants)
            return total
        order = torch.cat(places).argsort()
        if one_pass:
            parts = [
                chunked_logps(states.index_select(0, place), layer, targets[place], **wants)
                for place, layer in zip(places, layers, strict=True)
            ]
            scores = TokenScores(*(None if x[0] is None else torch.cat(x)[order] for x in zip(*parts, strict=True)))  # type: ignore[arg-type]
            out = _forward_of(whole, scores)
        else:
            several = [
                head_logits(states.index_select(0, place), layer) for place, layer in zip(places, layers, strict=True)
            ]
            logits = torch.cat(several)[order]
            out = _forward_of(whole, picked_logps(logits, targets, **wants))
            if "logits" in outputs:
                out = _with_logits(out, whole, logits)
        return out if objective is None else objective(out, whole)

    def _scores(self, inputs: Inputs, whole: Batch) -> Forward:
        """What the score layers of all models say, in float32."""
        found = []
        for model in members(self.model):
            states = self._states(inputs, model)
            with torch.autocast(states.device.type, enabled=False):
                found.append(score_layer(model)(states if states.dtype == torch.float64 else states.float()))
        scores, mask = torch.cat(found, -1), whole["mask"]
        full = scores.new_zeros(*mask.shape, scores.shape[-1]).masked_scatter(mask[..., None], scores)
        return Forward(logps=full.new_zeros(mask.shape), scores=full)

    def _one_pass(
        self,
        batch: Batch,
        whole: Batch,
        states: Tensor,
        head: Head,
        targets: Tensor,
        objective: Objective,
        wants: dict[str, bool],
        values: Tensor | None = None,
    ) -> Tensor:
        sizes = batch.by_unit(batch["mask"].sum(-1)).sum(-1).tolist()
        units = unit_chunks(sizes, head.weight.shape[0] * 4)
        bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]

        def share(i: int, scores: TokenScores) -> Tensor:
            first, stop = units[i]
            part = whole
            if len(units) > 1:
                part = to_device(select_units(batch, range(first, stop)), self._dist.device)
            return objective(_forward_of(part, scores), part)

        chunks = [(bounds[first], bounds[stop]) for first, stop in units]
        return one_pass_loss(states, head, targets, chunks, share, values=values, **wants)

    def _states(self, inputs: Inputs, model: Any) -> Tensor:
        """The hidden state before each scored token, [S, hidden]."""
        body = causal_model(model).base_model
        with self._offloading(), _light(body, inputs):
            states: Tensor = body(**_arguments(inputs)).last_hidden_state
            return states.flatten(0, 1).index_select(0, inputs.scored)

    def _logits(self, inputs: Inputs) -> Tensor:
        """The model's own logits before each scored token, [S, V]."""
        model = causal_model(self.model)
        with self._offloading(), _light(model, inputs):
            logits: Tensor = model(**_arguments(inputs)).logits
            return logits.flatten(0, 1).index_select(0, inputs.scored) / self._temperature

    def _offloading(self) -> Any:
        on = self._offload and torch.is_grad_enabled() and self._dist.device.type != "cpu"
        return ActivationOffload(self._dist.device) if on else nullcontext()


def _light(model: Any, inputs: Inputs) -> Any:
    """Streams go through feed-forwards that keep less; padded rows, which streams are compared with, do not."""
    return nullcontext() if inputs.segments is None else light_feed_forwards(model)


def _arguments(inputs: Inputs) -> dict[str, Any]:
    """Keyword arguments of a transformers model.

    Padded rows go without an attention mask: padding is on the right, where causal attention never looks, and fast
    causal kernels apply. For a stream an empty mask of four dimensions keeps transformers from building one of its own.
    """
    arguments: dict[str, Any] = {"input_ids": inputs.tokens, "use_cache": False}
    if inputs.segments is not None:
        arguments |= {
            "position_ids": inputs.positions,
            "attention_mask": inputs.tokens.new_empty(1, 1, 1, 1, dtype=torch.bool),
            "segments": inputs.segments,
        }
    return arguments


def _forward_of(batch: Batch, scores: TokenScores) -> Forward:
    mask = batch["mask"]

    def rows(x: Tensor) -> Tensor:
        return x.new_zeros(mask.shape).masked_scatter(mask, x)

    return Forward(
        logps=rows(scores.logps),
        entropy=None if scores.entropy is None else rows(scores.entropy),
        correct=None if scores.correct is None else rows(scores.correct),
        values=None if scores.values is None else rows(scores.values),
    )


def _with_logits(out: Forward, batch: Batch, logits: Tensor) -> Forward:
    mask = batch["mask"]
    full = logits.new_zeros(*mask.shape, logits.shape[-1])
    full = full.masked_scatter(mask[..., None], logits)
    return replace(out, logits=full)


class CausalPolicy:
    """A transformers causal LM, full or with adapters, that scores batches; or classifiers of its family.

    `module` is what training forwards call (wrapped for several processes), `bare` the model itself, `path` the way it
    takes from rows to log-probabilities, `heads` what stands on its backbone. `critic` is a token classifier with one
    score, which says what it expects of a row before each of its tokens (`Forward.values`).

    Raises:
        RecipeError: the model cannot take the layout that `options` name.
    """

    def __init__(
        self,
        bare: Any,
        dist: DistEngine,
        options: ForwardOptions | None = None,
        heads: Heads = LANGUAGE,
        critic: Any = None,
    ) -> None:
        options = options if options is not None else ForwardOptions()
        self.bare, self.dist, self.heads, self.critic = bare, dist, heads, critic
        self._layout, self.temperature = options.layout, options.temperature
        self._scorer = _Scorer(bare, dist, options, critic)
        self.module: nn.Module = self._scorer
        self.num_weights = sum(p.numel() for p in self._scorer.parameters())
        """Numbers of all its models, whether they train or not."""
        self.num_trained = sum(p.numel() for p in self.parameters())
        ways = [
            choose_path(model, options.layout, options.attn_implementation, scores=not heads.is_language)
            for model in members(bare)
        ]
        self.path = ways[0]
        if critic is not None:
            way = choose_path(critic, options.layout, options.attn_implementation, scores=True)
            if way.layout != self.path.layout:
                self.path = padded(self.path, f"the critic goes another way ({way})")

    def prepare(self, build: BuildOptimizer, max_grad_norm: float) -> None:
        """Hand the weights to the run's backend, and what `build` makes to step them."""
        self.module = self.dist.prepare(self._scorer, build, max_grad_norm)
        if self.path.head is not None:  # the weights before may be gone, and must not be kept by this alone
            self.path = replace(self.path, head=self._scorer._present(self.path.head))

    @property
    def is_peft(self) -> bool:
        """Whether only adapters train."""
        return hasattr(members(self.bare)[0], "peft_config")

    @property
    def is_noisy(self) -> bool:
        """Whether adapter dropout, which a recipe may ask for, makes training forwards random."""
        return self.is_peft and members(self.bare)[0].peft_config[POLICY_ADAPTER].lora_dropout > 0

    def parameters(self) -> list[nn.Parameter]:
        """What trains, the critic's weights last."""
        return [*(p for p in self.bare.parameters() if p.requires_grad), *self.critic_parameters()]

    def critic_parameters(self) -> list[nn.Parameter]:
        """What trains of the critic."""
        return [] if self.critic is None else [p for p in self.critic.parameters() if p.requires_grad]

    def forward(self, batch: Batch, outputs: frozenset[str]) -> Forward:
        """Log-probabilities (and what else `outputs` names) of a batch, on the run's device.

        Outside `torch.no_grad` it runs through the wrapped module, so that ranks exchange gradients. A loss costs less
        through `loss`.
        """
        out: Forward = self._module()(batch, outputs, self.path, None)
        return out

    def told(self, batch: Batch) -> Tensor:
        """[N, L]: one number a token, in which a wrong way shows: its log-probability, or its scores added up."""
        if self.heads.is_language:
            return self.forward(batch, LOGPS).logps
        scores = self.forward(batch, SCORES).scores
        assert scores is not None
        return scores.sum(-1)

    def loss(self, batch: Batch, outputs: frozenset[str], objective: Objective) -> Tensor:
        """The sum of `objective` over the units of a batch, some units at a time, without ever holding all logits.

        `objective` sees each unit once, on the run's device, and must not look beyond the units it is given.
        """
        total: Tensor = self._module()(batch, outputs, self.path, objective)
        return total

    def cut(self, batch: Batch, index: Sequence[int], max_tokens: int, max_units: int | None = None) -> list[list[int]]:
        """The units `index` of a batch in micro-batches of at most `max_tokens` tokens as this model is fed them."""
        return cut_batch(batch, index, self.path.layout, max_tokens, max_units)

    def try_path(self, units: Sequence[Unit]) -> None:
        """Compare a first use of the path with plain transformers, and step back where they differ.

        `units` are some of those that will be trained on; the longest counts most.

        Raises:
            RecipeError: they differ, and the recipe asked for this layout by name.
        """
        rows = _telling(units)
        if self._layout == "padded" or not rows:
            return
        batch = collate([(row,) for row in rows])
        plain = [self.plain_logps(row) for row in rows]
        if (reason := self._differs(batch, plain)) is None:
            return
        tried = self.path
        steps_back = [whole_logits(tried, reason)] if tried.head is not None else []  # the cheapest loss first
        if tried.layout != "padded":
            steps_back.append(padded(tried, reason))
        for self.path in steps_back:
            if self._differs(batch, plain) is None:
                break
        else:
            self.path = whole_logits(padded(tried, reason), reason)
        if self.path.layout != tried.layout:
            refuse_if_asked(self._layout, reason)

    def _differs(self, batch: Batch, plain: Sequence[PlainLogps]) -> str | None:
        def compare() -> str | None:
            with self.evaluating():
                found = self.told(batch).float().cpu()
            off = [found[i, : len(row.known)][row.known] - row.logps[row.known] for i, row in enumerate(plain)]
            apart = float(torch.cat(off).abs().mean())
            allowed = FULL_PRECISION if self.dist.dtype == torch.float32 else LOW_PRECISION
            if apart <= allowed or not any(len(x) for x in off):
                return None
            return f"at first use it gave other numbers than plain transformers, by {apart:.2g} a token"

        return first_failure(compare)

    def plain_logps(self, row: Row) -> PlainLogps:
        """The row alone through the model's own forward, in eval mode; of a model that scores, its scores added up."""
        with self.evaluating(), self.dist.autocast():
            if not self.heads.is_language:
                return plain_scores(members(self.bare), row, self.dist.device)
            heads = extra(self.bare)
            weight = heads.weights[int(row.inputs.get("head", 0))] if isinstance(heads, LanguageHeads) else None
            with nullcontext() if weight is None else output_layer(self.bare, weight):
                return plain_logps(self.bare, row, self.dist.device, self.temperature)

    @contextmanager
    def on_padded_rows(self) -> Iterator[None]:
        """The plain way in place of `path`, as `model.layout: padded` goes."""
        path, self.path = self.path, Path("padded", None, scores=self.path.scores)
        try:
            yield
        finally:
            self.path = path

    def _module(self) -> nn.Module:
        return self.module if torch.is_grad_enabled() else self._scorer

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """The same weights with the adapter off, or with the frozen adapter the run started from."""
        self._scorer.own_head = True
        try:
            if REFERENCE_ADAPTER not in self.bare.peft_config:
                with self.bare.disable_adapter():
                    yield
                return
            self.bare.set_adapter(REFERENCE_ADAPTER)
            try:
                yield
            finally:
                self.bare.set_adapter(POLICY_ADAPTER)  # the active adapter trains, and no other
        finally:
            self._scorer.own_head = False

    def weights(self) -> dict[str, Tensor]:
        """A copy of what trains of the model, by name; the critic is left out."""
        return {name: p.detach().clone() for name, p in self._trained().items()}

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Become what `weights` returned."""
        with torch.no_grad():
            for name, p in self._trained().items():
                p.copy_(weights[name])

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """These weights in place of its own, without gradient and in eval mode. Nothing is copied."""
        own = {name: p.data for name, p in self._trained().items()}
        with self.evaluating():
            try:
                for name, p in self._trained().items():
                    p.data = weights[name]
                yield
            finally:
                for name, p in self._trained().items():
                    p.data = own[name]

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.bare.named_parameters() if p.requires_grad}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradient, eval mode; the mode before is restored."""
        modes = [(model, model.training) for model in (self.bare, self.critic) if model is not None]
        for model, _ in modes:
            model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for model, was_training in modes:
                model.train(was_training)

    def save(self, folder: Folder, dtype: torch.dtype | None = None) -> None:
        """A folder plain transformers (or peft) loads, its weights in `dtype`; None = as they are trained.

        An adapter is small and stays as it is trained. Of several heads the output layer is the even mixture; each by
        itself stands beside it. Of several models each has its folder.
        """
        for model, place in zip(members(self.bare), self.folders(folder), strict=True):
            place.mkdir(parents=True, exist_ok=True)
            with mixed(model), detached(model):
                _save(model, place, dtype)
            save_heads(model, place)
        if self.critic is not None:
            _save(self.critic, folder / CRITIC, dtype)

    def load(self, folder: Folder) -> None:
        """Weights from a folder `save` wrote, bit for bit."""
        for model, place in zip(members(self.bare), self.folders(folder), strict=True):
            with detached(model):
                _load(model, place)
            load_heads(model, place)
        if self.critic is not None:
            _load(self.critic, folder / CRITIC)

    def folders(self, folder: Folder) -> list[Folder]:
        """Where `save` puts each model: the folder itself, or one inside it for each of several."""
        several = self.heads.members > 1
        return [folder / MEMBER.format(i) for i in range(self.heads.members)] if several else [folder]

    def broken_weights(self) -> list[str]:
        """Names of weights that hold nan or infinity."""
        models = {"": self.bare} if self.critic is None else {"": self.bare, f"{CRITIC}.": self.critic}
        return [
            prefix + name
            for prefix, model in models.items()
            for name, p in model.named_parameters()
            if not bool(torch.isfinite(p.detach()).all())
        ]


def _save(model: Any, folder: Folder, dtype: torch.dtype | None) -> None:
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder, selected_adapters=[POLICY_ADAPTER], safe_serialization=True)
    elif dtype is None or all(p.dtype == dtype for p in model.parameters()):
        model.save_pretrained(folder)
    else:
        model.save_pretrained(folder, state_dict=_cast(model.state_dict(), dtype))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _load(model: Any, folder: Folder) -> None:
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict, load_peft_weights

        copy_weights(load_peft_weights(str(folder)), get_peft_model_state_dict(model, adapter_name=POLICY_ADAPTER))
    else:
        # Through from_pretrained: transformers may rename weights on their way to disk and back.
        fresh = type(model).from_pretrained(folder, dtype=next(model.parameters()).dtype)
        copy_weights(fresh.state_dict(), model.state_dict())


def _telling(units: Sequence[Unit]) -> list[Row]:
    """Rows that show a wrong path: the longest with another of its unit, and the shortest."""
    rows = [row for unit in units for row in unit if any(row.trained)]
    if not rows:
        return []
    longest = max(units, key=lambda unit: max(len(row.tokens) for row in unit))
    mates = sorted((row for row in longest if any(row.trained)), key=lambda row: -len(row.tokens))
    return [*mates[:2], min(rows, key=lambda row: len(row.tokens))]


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every weight in `dtype`, on the CPU; those that are tied stay one."""
    kept = {x.data_ptr(): x.detach().to("cpu", dtype if x.is_floating_point() else x.dtype) for x in state.values()}
    return {name: kept[x.data_ptr()].view(x.shape) for name, x in state.items()}
