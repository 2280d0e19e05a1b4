"""What one model's passes keep alive: the code of a real step, run on stand-ins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.core.contracts import Heads
from alignkit.core.types import Batch, Forward, Row, Unit
from alignkit.data.collate import collate, select_units
from alignkit.dist.backend import units_of
from alignkit.memory.stand_in import Here, StandIns, kernels_of
from alignkit.models.config import ModelConfig
from alignkit.models.heads import members
from alignkit.models.layout import lay_out
from alignkit.models.load import DTYPES, LANGUAGE, load_policy
from alignkit.models.policy import SCORING_TOKENS, CausalPolicy, ForwardOptions
from alignkit.ops.logps import MAX_CHUNK_BYTES
from alignkit.rollout.config import SamplingConfig
from alignkit.rollout.draw import draw
from alignkit.rollout.fused import FusedWriter, why_not
from alignkit.rollout.native import PREFILL_TOKENS
from alignkit.rollout.plain import PlainWriter
from alignkit.rollout.writer import Writer

CRITIC_HEAD = Heads(kind="token", names=("value",), zero=True)
PROMPT_SHARE = 8
"""One token in so many is taken to be of the prompt, where data brings the answers: more answer is more memory."""
BYTES_QUANTIZED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""Bytes of a quantized number: itself, and its share of the scales of its block."""
SHALLOW, MEASURED_WHOLE = 2, 6
"""Layers of the shallower model that is measured, where the real one has more than so many."""


@dataclass(frozen=True)
class Model:
    """What is known of a model without its weights, and how it is used.

    `critic`: the config of the model that expects rewards, where there is one.
    """

    config: ModelConfig
    heads: Heads = LANGUAGE
    critic: ModelConfig | None = None


@dataclass(frozen=True)
class Rows:
    """The rows of an optimizer step that one process has.

    Args:
        units: how many units; `k` rows each.
        length, prompt: tokens of a row, and how many of them are its prompt.
        shared_by: units that have one prompt in common.
        outputs: what the loss asks the model for.
        tokens, most: bounds of a micro-batch, in tokens and in units.
    """

    units: int
    k: int
    length: int
    prompt: int
    shared_by: int
    outputs: frozenset[str]
    tokens: int
    most: int | None


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model: all weights, those that train, those in no decoder layer, and those of its largest layer.

    `unpacked`: of the largest of its quantized weights, while it is multiplied with.
    """

    weights: int
    trained: int
    outside: int
    layer: int
    numbers: int
    trained_numbers: int
    unpacked: int = 0


@dataclass(frozen=True)
class Pass:
    """Bytes that a micro-batch takes beside weights, and beside gradients from the moment they have arrived.

    `arriving` counts them too: the peak of a backward pass that begins with none. `forwards` micro-batches make a step;
    `fed`: tokens of this one, as they are laid out.
    """

    forward: int
    backward: int
    arriving: int
    forwards: int
    fed: int


class Subject:
    """A model of stand-ins, ready to be measured on one kind of device. `layers`: cut to so many, None = all."""

    def __init__(self, model: Model, device: str, layers: int | None = None) -> None:
        self._device, self._live = device, StandIns()
        heads = replace(model.heads, noise=0.0)  # draws are numbers
        bare = load_policy(model.config, heads=heads, weights=False)
        critic = None if model.critic is None else load_policy(model.critic, heads=CRITIC_HEAD, weights=False)
        modules = [module for module in (bare, critic) if module is not None]
        self.sizes = _sizes(modules, model.config.quantization)
        self.depth = [depth for module in modules for depth in _depths(module)]
        for module in modules:
            if layers is not None:
                _shorten(module, layers)
            self._live.of(module)
            module.train()
        self._engine = Here(DTYPES[model.config.dtype])
        options = ForwardOptions(model.config.layout, model.config.attn_implementation)
        with kernels_of(device, 0):
            self.policy = CausalPolicy(bare, self._engine.as_engine(), options, heads, critic)
        self._live.count(x for module in modules for x in (*module.parameters(), *module.buffers()))
        self._live.watch_gradients(self.policy.parameters())

    def train(self, rows: Rows) -> Pass:
        """Forward and backward of the largest micro-batch of a step."""
        batch, count = largest_micro_batch(rows, self.policy)
        fed = lay_out(batch, self.policy.path.layout, self._engine.device).tokens.numel()
        live, start = self._live, self._live.live
        with kernels_of(self._device, self._logits(batch)), live:
            live.restart()
            loss = self.policy.loss(batch, rows.outputs, _objective)
            forward = live.peak - start
            live.restart()
            torch.autograd.backward(loss)
            del loss
            found = Pass(forward, live.peak_without_gradients - start, live.peak - start, ceil(rows.units / count), fed)
        for parameter in self.policy.parameters():
            parameter.grad = None
        return found

    def score(self, rows: Rows) -> int:
        """Bytes beside weights of a forward pass without gradient over as many of the rows as are scored at a time."""
        batch, _ = largest_micro_batch(replace(rows, tokens=SCORING_TOKENS), self.policy)
        outputs = frozenset({"logps"}) if self.policy.heads.is_language else frozenset({"scores"})
        live, start = self._live, self._live.live
        with kernels_of(self._device, self._logits(batch)), live, self.policy.evaluating():
            live.restart()
            self.policy.forward(batch, outputs)
        return live.peak - start

    def write(self, rows: int, prompts: int, prompt: int, sampling: SamplingConfig) -> tuple[int, int]:
        """Bytes beside weights of writing `rows` completions at a time, to `prompts` prompts of so many tokens.

        First when writing begins and prompts have just been read, then when it ends and every row is as long as it can
        be. What lies between is less than one or the other.
        """
        longest = prompt + sampling.max_completion_length
        together = max(1, min(prompts, PREFILL_TOKENS // prompt))
        begins = self._write(rows, together, prompt, longest, sampling)
        return begins, self._write(rows, 1, longest - 1, longest, sampling, reading=False)

    def _write(
        self, rows: int, prompts: int, length: int, longest: int, sampling: SamplingConfig, *, reading: bool = True
    ) -> int:
        live, start = self._live, self._live.live
        with kernels_of(self._device, 0), live, self.policy.evaluating(), self._engine.autocast():
            live.restart()
            writer = self._writer(rows, longest)
            told, logits = writer.read([[0] * length] * prompts)
            writer.enter(told, sorted(i % prompts for i in range(rows)))
            if not reading:
                del told, logits
                live.restart()
            uniforms = torch.rand(rows, dtype=torch.float64)
            draw(writer.step([0] * rows, [length] * rows), uniforms, sampling)
        return live.peak - start

    def _logits(self, batch: Batch) -> int:
        """Numbers of the largest chunk of a batch's logits."""
        vocabulary: int = members(self.policy.bare)[0].config.get_text_config().vocab_size
        return min(int(batch["mask"].sum()) * vocabulary, MAX_CHUNK_BYTES // 4)

    def _writer(self, rows: int, longest: int) -> Writer:
        if self._device == "cpu" and why_not(self.policy.bare, longest) is None:
            return FusedWriter(self.policy.bare, rows, longest)
        return PlainWriter(self.policy.bare, rows, 0)


class Profile:
    """A model's memory, pass by pass. A deep one is measured at two small depths: every further layer adds the same."""

    def __init__(self, model: Model, device: str) -> None:
        first = Subject(model, device, SHALLOW)
        self.sizes, self._steps = first.sizes, 0
        self._subjects = [first]
        if first.depth and len(set(first.depth)) == 1 and first.depth[0] > MEASURED_WHOLE:
            self._subjects.append(Subject(model, device, SHALLOW + 1))
            self._steps = first.depth[0] - SHALLOW
        else:
            self._subjects = [Subject(model, device)]

    @property
    def policy(self) -> CausalPolicy:
        """The model, which may be too shallow."""
        return self._subjects[0].policy

    def train(self, rows: Rows) -> Pass:
        """As `Subject.train`."""
        found = [subject.train(rows) for subject in self._subjects]
        forward, backward, arriving = (
            self._deep([getattr(each, name) for each in found]) for name in ("forward", "backward", "arriving")
        )
        if self._steps:
            # Gradients come while activations go, at equal steps: the most is at one end or the other.
            saved = self._deep([each.backward for each in found]) - found[0].backward
            arriving = max(arriving, backward, self.sizes.trained + backward - saved)
        more = self.sizes.unpacked
        return replace(found[0], forward=forward + more, backward=backward + more, arriving=arriving + more)

    def score(self, rows: Rows) -> int:
        """As `Subject.score`."""
        return self._deep([subject.score(rows) for subject in self._subjects]) + self.sizes.unpacked

    def write(self, rows: int, prompts: int, prompt: int, sampling: SamplingConfig) -> int:
        """The greater of what `Subject.write` gives."""
        found = [subject.write(rows, prompts, prompt, sampling) for subject in self._subjects]
        return max(self._deep(list(stage)) for stage in zip(*found, strict=True)) + self.sizes.unpacked

    def _deep(self, measured: Sequence[int]) -> int:
        return measured[0] + self._steps * (measured[-1] - measured[0])


def _depths(module: nn.Module) -> list[int]:
    """Number of decoder layers that are alike, of every list of them; 0 for layers that differ."""
    found = []
    for layers in _lists(module):
        kinds = {tuple((name, p.shape, p.dtype) for name, p in layer.named_parameters()) for layer in layers}
        found.append(len(layers) if len(kinds) == 1 else 0)
    return found


def _lists(module: nn.Module) -> list[nn.ModuleList]:
    units = set(units_of(module))
    lists = [inner for inner in module.modules() if isinstance(inner, nn.ModuleList)]
    return [inner for inner in lists if len(inner) and all(layer in units for layer in inner)]


def _shorten(module: nn.Module, count: int) -> None:
    for layers in _lists(module):
        while len(layers) > count:
            del layers[-1]


def _objective(out: Forward, batch: Batch) -> Tensor:
    """Stands for a method's loss: what it makes of one number a token is small beside the model."""
    del batch
    values = [x.sum() for x in (out.logps, out.scores, out.values) if x is not None]
    if out.logits is not None:
        values.append(out.logits.log_softmax(-1).sum())
    return torch.stack(values).sum()


def largest_micro_batch(rows: Rows, policy: CausalPolicy) -> tuple[Batch, int]:
    """The rows of a step that go through the model first, as many tokens as fit, and the number of whole units."""
    if policy.path.layout == "padded":
        # Rows a little shorter may fill a micro-batch better than rows of full length do.
        count = min(rows.units, rows.most or rows.units, max(1, ceil(rows.tokens / (rows.k * rows.length))))
        length = min(rows.length, rows.tokens // (rows.k * count))
        if length * (count - 1) > rows.length * max(1, rows.tokens // (rows.k * rows.length)) - length:
            rows = replace(rows, units=count, length=length, prompt=min(rows.prompt, length - 1))
    reach = rows.tokens // max(1, rows.k * (rows.length - rows.prompt)) + 2
    units = [_unit(i, rows, policy.heads) for i in range(min(rows.units, reach))]
    batch = collate(units)
    first = policy.cut(batch, range(len(units)), rows.tokens, rows.most)[0]
    chosen = [units[i] for i in first]
    fits = len(chosen) < min(rows.units, rows.most or rows.units)
    if fits and policy.path.layout != "padded":
        used = lay_out(select_units(batch, first), policy.path.layout, torch.device("cpu")).tokens.numel()
        rest = min((rows.tokens - used) // rows.k, rows.length)
        if rest > 2:  # real rows are of all lengths, and fill what rows of one length leave free
            chosen.append(_unit(len(units), replace(rows, length=rest, prompt=1), policy.heads))
    return collate(chosen), len(first)


def _unit(number: int, rows: Rows, heads: Heads) -> Unit:
    """Rows that begin alike and go on differently."""
    family = number // rows.shared_by
    scored = rows.length - rows.prompt if heads.kind != "sequence" else 1
    trained = [*[False] * (rows.length - scored), *[True] * scored]
    inputs = {"prompt": float(rows.prompt)} if heads.kind == "sequence" else {}
    if heads.is_language and heads.names:
        inputs["head"] = float(number % len(heads.names))
    return tuple(
        Row(
            tokens=[*[2 * family + 1] * rows.prompt, *[2 * (number * rows.k + i) + 2] * (rows.length - rows.prompt)],
            trained=trained,
            inputs=inputs,
        )
        for i in range(rows.k)
    )


def _sizes(modules: Sequence[nn.Module], quantization: str | None) -> Sizes:
    everything = _bytes(x for module in modules for x in (*module.parameters(), *module.buffers()))
    layers = [unit for module in modules for unit in units_of(module)]
    inside = _bytes(x for unit in layers for x in unit.parameters())
    training = [p for module in modules for p in module.parameters() if p.requires_grad]
    quantized = [w for module in modules for w in _quantized(module)] if quantization is not None else []
    packed = int(sum(w.numel() for w in quantized) * BYTES_QUANTIZED[quantization]) if quantization is not None else 0
    return Sizes(
        weights=everything - _bytes(quantized) + packed,
        trained=_bytes(training),
        outside=everything - inside,
        layer=max((_bytes(unit.parameters()) for unit in layers), default=0),
        numbers=sum(p.numel() for module in modules for p in module.parameters()),
        trained_numbers=sum(p.numel() for p in training),
        unpacked=max((w.numel() * w.itemsize for w in quantized), default=0),
    )


def _quantized(module: nn.Module) -> list[Tensor]:
    """The frozen weights of linear layers, all but the output layer's."""
    heads = {id(layer.weight) for model in members(module) if (layer := model.get_output_embeddings()) is not None}
    linear = [inner.weight for inner in module.modules() if isinstance(inner, nn.Linear)]
    return [weight for weight in linear if not weight.requires_grad and id(weight) not in heads]


def _bytes(tensors: Iterable[Any]) -> int:
    return sum({id(x): x.numel() * x.itemsize for x in tensors}.values())
