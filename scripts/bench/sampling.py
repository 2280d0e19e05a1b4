"""The in-process sampler against transformers' `generate`: same weights, prompts, lengths and threads, in turn.

Both in one process, on a copy of the model each; an operation's time is processor time. `generate` as TRL calls it:
sampling at temperature 1 over the whole vocabulary, `num_return_sequences` of each left-padded prompt, its own cache.
Rows hardly ever draw the stop token, so both write about the same number of tokens: that rows which end early leave our
batch, and not theirs, is hardly counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignkit.core.rng import generator
from alignkit.core.types import Group
from bench.report import Ratio
from bench.workloads import BODY, SMALL, SMOKE, Shape, write_model

PAD_ID, EOS_ID = 0, 1


@dataclass(frozen=True)
class Sample:
    """One generation: `samples` completions of up to `new` tokens for each of `prompts` prompts."""

    shape: Shape
    prompts: int
    samples: int
    prompt: int
    new: int


SAMPLES: Mapping[str, Sample] = {
    "sample-s": Sample(SMALL, 1, 8, 200, 48),
    "sample-s-32": Sample(SMALL, 1, 32, 200, 48),
    "sample-body-s": Sample(BODY, 1, 8, 200, 48),
    "sample-body-s-32": Sample(BODY, 1, 32, 200, 48),
    "sample-groups-s": Sample(SMALL, 4, 8, 200, 48),
    "sample-longprompt-s": Sample(BODY, 1, 8, 1000, 32),
    "sample-longprompt-s-32": Sample(BODY, 1, 32, 1000, 32),
    "smoke-sample": Sample(SMOKE, 2, 8, 20, 24),
}


@dataclass(frozen=True)
class Written:
    """What one side wrote in the measured generations: processor and wall seconds and tokens of each."""

    cpu: list[float]
    wall: list[float]
    tokens: list[int]


@dataclass(frozen=True)
class SampleFigures:
    """Ratios `generate` / alignkit over pairs of generations, more is better; what both did; and whether ours is right.

    `logp_difference`: largest difference, in nats, between a sampled token's log-probability and the trainer's.
    """

    cpu: Ratio
    wall: Ratio
    cpu_per_token: Ratio
    cpu_seconds: dict[str, float]
    tokens: dict[str, int]
    logp_difference: float

    @property
    def agree(self) -> bool:
        """Whether the log-probabilities are the trainer's, as far as float32 can say."""
        return self.logp_difference <= 1e-5


def race_samples(
    name: str, sample: Sample, repeats: int, seed: int, threads: int, folder: Path, say: Callable[[str], None]
) -> tuple[SampleFigures, dict[str, Written]]:
    """One generation of each side to warm up, then `repeats` pairs in turn."""
    import torch
    from transformers import AutoModelForCausalLM

    from alignkit.data.collate import collate
    from alignkit.dist.engine import DistEngine
    from alignkit.models.policy import CausalPolicy, ForwardOptions
    from alignkit.rollout.config import SamplingConfig
    from alignkit.rollout.native import NativeEngine

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    write_model(folder / name, sample.shape, sample.prompt + sample.new, seed)
    theirs, mine = (AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval() for _ in range(2))
    policy = CausalPolicy(mine, DistEngine(torch.float32), ForwardOptions("auto"))
    sampler = NativeEngine(
        mine,
        stop_ids=[EOS_ID],
        pad_id=PAD_ID,
        decode=lambda _: "",
        sampling=SamplingConfig(max_completion_length=sample.new),
        seed=seed,
        max_batch=sample.prompts * sample.samples,
    )
    filled: list[Group] = []

    def ours(prompts: list[list[int]], version: int) -> int:
        sampler.sync(version)
        filled[:] = sampler.fill([Group(str(i), [], prompt) for i, prompt in enumerate(prompts)], sample.samples)
        return sum(len(completion.tokens) for group in filled for completion in group.completions)

    written: dict[str, Written] = {side: Written([], [], []) for side in ("alignkit", "generate")}
    runs = {"alignkit": ours, "generate": lambda prompts, _: generate(theirs, prompts, sample)}
    for turn in range(repeats + 1):
        prompts = make_prompts(sample, seed, turn)
        for side in sorted(runs, reverse=turn % 2 == 1):
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = runs[side](prompts, turn)
            lap = (time.process_time() - cpu, time.perf_counter() - wall, tokens)
            if turn > 0:
                for values, value in zip(asdict(written[side]), lap, strict=True):
                    getattr(written[side], values).append(value)
        if turn > 0:
            shown = ", ".join(f"{side} {own.cpu[-1]:.2f} cpu s" for side, own in written.items())
            say(f"{name}: generation {turn} of {repeats}: {shown}")
    batch = collate([(group.row(completion),) for group in filled for completion in group.completions])
    with policy.evaluating():
        expected = policy.forward(batch, frozenset({"logps"})).logps[batch["mask"]]
    found = torch.tensor([logp for group in filled for completion in group.completions for logp in completion.logps])
    return sample_figures(written, float((expected - found).abs().max())), written


def sample_figures(written: Mapping[str, Written], logp_difference: float) -> SampleFigures:
    """What a race shows."""
    ours, theirs = written["alignkit"], written["generate"]

    def ratio(own: list[float], other: list[float]) -> Ratio:
        return Ratio.of([b / a for a, b in zip(own, other, strict=True)])

    def by_token(side: Written) -> list[float]:
        return [cpu / tokens for cpu, tokens in zip(side.cpu, side.tokens, strict=True)]

    return SampleFigures(
        cpu=ratio(ours.cpu, theirs.cpu),
        wall=ratio(ours.wall, theirs.wall),
        cpu_per_token=ratio(by_token(ours), by_token(theirs)),
        cpu_seconds={side: statistics.median(own.cpu) for side, own in written.items()},
        tokens={side: sum(own.tokens) for side, own in written.items()},
        logp_difference=logp_difference,
    )


def make_prompts(sample: Sample, seed: int, turn: int) -> list[list[int]]:
    """Prompts of one generation; the first has the workload's length, others up to a quarter less."""
    rng = generator(seed, "bench sample", turn)
    lengths = [sample.prompt - (rng.randrange(sample.prompt // 4) if i else 0) for i in range(sample.prompts)]
    return [[rng.randrange(2, sample.shape.vocabulary) for _ in range(length)] for length in lengths]


def generate(model: Any, prompts: list[list[int]], sample: Sample) -> int:
    """transformers' own way. Returns the tokens it wrote up to and with a stop token."""
    import torch
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    tokens = torch.tensor([[PAD_ID] * (longest - len(prompt)) + prompt for prompt in prompts])
    seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=sample.samples,
        max_new_tokens=sample.new,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        use_cache=True,
    )
    with torch.no_grad():
        written = model.generate(tokens, attention_mask=seen, generation_config=config)[:, longest:]
    return int(((written == EOS_ID).cumsum(-1) - (written == EOS_ID).long() == 0).sum())


HEADINGS = (
    *("workload", "prompts x samples", "cpu ratio (range)", "per token", "wall ratio (range)", "cpu s"),
    *("tokens", "log-prob difference"),
)


def sample_table(rows: list[tuple[str, Sample, SampleFigures]]) -> str:
    """A Markdown table, a workload a line; `a : b` is alignkit : generate."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    for name, sample, found in rows:
        cells = (
            name,
            f"{sample.prompts} x {sample.samples}",
            str(found.cpu),
            f"{found.cpu_per_token.median:.2f}",
            str(found.wall),
            f"{found.cpu_seconds['alignkit']:.2f} : {found.cpu_seconds['generate']:.2f}",
            f"{found.tokens['alignkit']} : {found.tokens['generate']}",
            f"{found.logp_difference:.1e}" + ("" if found.agree else " **they differ**"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
