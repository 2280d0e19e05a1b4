"""Compares the memory that `alignkit check` predicts with what small runs really take.

    python scripts/memory.py [NAME ...] [--device cuda] [--write]

Every configuration is a run of two optimizer steps on a model built here, in a process of its own. On a CPU the bytes
of live tensors are counted as operations make them; with `--device cuda` the allocator says them, which has never been
tried. `--write` puts the table into docs/memory.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "memory.md"
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->"
WITHIN, LOW = 0.15, 0.05
"""A prediction may be off by so much, and so much too low at most."""
PHASES = ("reference", "rollout", "forward", "backward", "step")
MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """A Llama built from its config."""

    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 4
    feed_forward: int = 704
    heads: int = 4
    key_value_heads: int = 2


@dataclass(frozen=True)
class Case:
    """One run: a method, a shape, and what its recipe says beyond that."""

    algorithm: str
    settings: dict[str, Any] = field(default_factory=dict)
    shape: Shape = Shape()


LORA = {"model.lora.r": 16}
CHECKPOINTED = {"model.gradient_checkpointing": True}
DEEP = Shape(vocabulary=2048, hidden=192, layers=12, feed_forward=512, heads=3, key_value_heads=1)
WORDY = Shape(vocabulary=32000, hidden=128, layers=2, feed_forward=352, heads=2, key_value_heads=1)
CASES = {
    "dpo": Case("dpo"),
    "dpo-checkpointed": Case("dpo", CHECKPOINTED),
    "dpo-padded": Case("dpo", {"model.layout": "padded"}),
    "dpo-lora": Case("dpo", LORA),
    "dpo-lora-checkpointed-packed": Case("dpo", {**LORA, **CHECKPOINTED, "model.layout": "packed"}),
    "dpo-qlora-bfloat16": Case("dpo", {**LORA, "model.quantization": "nf4", "model.dtype": "bfloat16"}),
    "dpo-bfloat16-deep": Case("dpo", {"model.dtype": "bfloat16"}, DEEP),
    "dpo-wordy": Case("dpo", {}, WORDY),
    "sft-packed": Case("sft", {"model.layout": "packed"}),
    "sft-lora-checkpointed-padded": Case("sft", {**LORA, **CHECKPOINTED, "model.layout": "padded"}),
    "kto": Case("kto"),
    "orpo-deep-checkpointed": Case("orpo", CHECKPOINTED, DEEP),
    "grpo": Case("grpo"),
    "grpo-lora-checkpointed": Case("grpo", {**LORA, **CHECKPOINTED}),
    "ppo": Case("ppo"),
}
LENGTH, UNITS = 256, 8
"""Tokens of every row, and units of an optimizer step, which are two micro-batches."""


def build(case: Case, folder: Path) -> dict[str, Any]:
    """Model, rows and recipe of a case, in a new folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from alignkit.memory.profile import PROMPT_SHARE
    from alignkit.recipe import find_algorithm
    from alignkit.testing import save_quietly

    shape, words = case.shape, {"<eos>": 0, **{f"w{i}": i for i in range(1, case.shape.vocabulary)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.feed_forward,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            max_position_embeddings=LENGTH,
            eos_token_id=0,
            tie_word_embeddings=True,
        )
    )
    save_quietly(folder / "model", model, PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>"))
    needs = find_algorithm(case.algorithm).target.needs
    prompt, units = LENGTH // (2 if needs.rewards else PROMPT_SHARE), UNITS * (4 if needs.rewards else 1)

    def text(row: int, count: int) -> str:
        return " ".join(f"w{1 + (row * 31 + i) % (shape.vocabulary - 1)}" for i in range(count))

    rows = [
        {
            "prompt": text(row, prompt),
            "chosen": " " + text(row + 1, LENGTH - prompt - 1),
            "rejected": " " + text(row + 2, LENGTH - prompt - 1),
        }
        for row in range(3 * units)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    k = find_algorithm(case.algorithm).target.needs.completions if not needs.rewards else 1
    settings = {
        "output_dir": str(folder / "run"),
        "model.name_or_path": str(folder / "model"),
        "model.dtype": "float32",
        "data": [{"path": str(folder / "rows.jsonl"), **({"format": "preference"} if not needs.rewards else {})}],
        "algorithm.name": case.algorithm,
        "train.max_steps": 2,
        "train.batch_size": units,
        "train.max_length": LENGTH,
        "train.micro_batch_tokens": units * k * LENGTH // 2,
        "train.learning_rate": 1e-5,
        "train.save_steps": 0,
        **case.settings,
    }
    if needs.rewards:
        settings |= {
            "rewards": [{"name": "regex", "args": {"pattern": "7"}}],
            "rollout.num_generations": 8,
            "rollout.max_completion_length": LENGTH - prompt,
        }
    recipe: dict[str, Any] = {}
    for name, value in settings.items():
        *blocks, last = name.split(".")
        at = recipe
        for block in blocks:
            at = at.setdefault(block, {})
        at[last] = value
    return recipe


class Meter:
    """The most memory in use in each phase of a run. `between` says the bytes at the worst moment since it was asked
    last."""

    def __init__(self, between: Callable[[], int]) -> None:
        self.peaks = dict.fromkeys(PHASES, 0)
        self._between = between
        self._phases: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within, what is in use counts for this phase."""
        self._close()
        self._phases.append(name)
        try:
            yield
        finally:
            self._close()
            self._phases.pop()

    def _close(self) -> None:
        peak = self._between()
        if self._phases:
            self.peaks[self._phases[-1]] = max(self.peaks[self._phases[-1]], peak)


def allocated() -> int:
    """What CUDA's allocator had handed out at most since it was asked last."""
    import torch

    peak: int = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def measure(recipe: dict[str, Any], device: str) -> dict[str, int]:
    """Run it; bytes at the worst moment of each phase."""
    from alignkit.dist.engine import DistEngine
    from alignkit.loop.rollouts import Rollouts
    from alignkit.memory.live import LiveMemory
    from alignkit.models.policy import CausalPolicy
    from alignkit.models.roster import Roster
    from alignkit.recipe import load_recipe
    from alignkit.run import train

    live = LiveMemory()  # the weights count from when a policy takes them

    def counted_peak() -> int:
        peak = live.peak
        live.restart()
        return peak

    meter = Meter(counted_peak if device == "cpu" else allocated)
    with ExitStack() as stack:
        begin = CausalPolicy.__init__

        def counted(policy: CausalPolicy, bare: Any, *rest: Any) -> None:
            critic = rest[3] if len(rest) > 3 else None
            models = [model for model in (bare, critic) if model is not None]
            live.count(x for model in models for x in (*model.parameters(), *model.buffers()))
            begin(policy, bare, *rest)

        stack.enter_context(patch.object(CausalPolicy, "__init__", counted))
        for owner, method, name in (
            (Roster, "precompute", "reference"),
            (Roster, "fill", "reference"),
            (Rollouts, "collect", "rollout"),
            (CausalPolicy, "loss", "forward"),
            (DistEngine, "backward", "backward"),
            (DistEngine, "step", "step"),
        ):
            stack.enter_context(patch.object(owner, method, _timed(getattr(owner, method), meter, name)))
        if device == "cpu":
            stack.enter_context(live)
        train(load_recipe(recipe), quiet=True, report=False)
    return meter.peaks


def _timed(function: Any, meter: Meter, name: str) -> Any:
    def inside(*args: Any, **kwargs: Any) -> Any:
        with meter.phase(name):
            return function(*args, **kwargs)

    return inside


def compare(name: str, device: str, folder: Path) -> dict[str, dict[str, int]]:
    """Phase → bytes measured and predicted, of one case."""
    from alignkit.memory.predict import predict
    from alignkit.recipe import load_recipe

    recipe = build(CASES[name], folder)
    told = predict(load_recipe(recipe), device=device, config=recipe["model"]["name_or_path"])
    predicted = {phase.name: phase.total for phase in told.phases if phase.name in PHASES}
    return {"predicted": predicted, "measured": {k: v for k, v in measure(recipe, device).items() if k in predicted}}


def off(found: dict[str, dict[str, int]]) -> float:
    """How far the predicted peak is from the measured one, as a share of it."""
    return max(found["predicted"].values()) / max(found["measured"].values()) - 1


def table(rows: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """Markdown: the peak of every case, and each phase predicted ÷ measured."""
    lines = [
        f"| configuration | measured peak, MiB | predicted, MiB | off by | {' | '.join(PHASES)} |",
        f"|---|---|---|---|{'---|' * len(PHASES)}",
    ]
    for name, found in rows.items():
        peaks = {kind: max(found[kind].values()) / MIB for kind in found}
        each = [
            f"{found['predicted'][phase] / found['measured'][phase]:.2f}" if found["predicted"].get(phase) else ""
            for phase in PHASES
        ]
        told = [f"`{name}`", f"{peaks['measured']:.1f}", f"{peaks['predicted']:.1f}", f"{off(found):+.1%}", *each]
        lines.append(f"| {' | '.join(told)} |")
    return lines


def main() -> int:
    """The command line. Ends with 1 where a prediction is further off than it may be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CASES)}; none = all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--write", action="store_true", help="put the table into docs/memory.md")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(CASES)):
        parser.error(f"there is no configuration {unknown[0]!r}")
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(compare(args.names[0], args.device, Path(folder))))
        return 0
    rows = {}
    for name in args.names or CASES:
        command = [sys.executable, "-W", "ignore", __file__, name, "--one", "--device", args.device]
        with tempfile.TemporaryDirectory() as cache:  # what another run scored would not be scored again
            environment = {**os.environ, "ALIGNKIT_CACHE": cache}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        print(table({name: rows[name]})[-1], flush=True)
    if args.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        text = "\n".join(table(rows))
        PAGE.write_text(f"{before}{BEGIN}{text}\n{END}{after}", encoding="utf-8")
    bad = [name for name, found in rows.items() if not -LOW <= off(found) <= WITHIN]
    print("\n".join([*table(rows), f"out of bounds: {', '.join(bad)}" if bad else "all within bounds"]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
