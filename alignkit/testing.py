"""The conformance suite: what every algorithm must keep, as one public call.

    from alignkit.testing import assert_conforms
    assert_conforms("my_package.focal:Focal")

Each check runs the real loop on a tiny model built here. Your own tests and `tests/contract` call the same functions.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from alignkit import assemble as assembling
from alignkit import plan
from alignkit.assemble import assemble
from alignkit.core.config import Config
from alignkit.core.contracts import Algorithm, Heads, Models
from alignkit.core.registry import register
from alignkit.core.types import Completion, Group, RewardBatch, RewardOutput
from alignkit.dist.engine import DistEngine
from alignkit.loop.trainer import Trainer
from alignkit.models import attention
from alignkit.models.config import ModelConfig
from alignkit.models.load import DTYPES, LANGUAGE
from alignkit.ops import logps as head
from alignkit.recipe import Recipe, dump_recipe, load_recipe
from alignkit.run import resume, train

SYMBOLS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TOY_OBJECTIVES = ("loud", "late")
"""What toy rows say of their `objective`, by turns."""
NUM_ROWS = 7
"""Odd, so that no micro-batch or rank count divides it."""
TOY_GENERATIONS, TOY_LENGTH = 4, 8
"""Completions of a prompt, and tokens of one at most, where the method writes them itself."""
TOLERANCE = 1e-6
"""Relative L2 between gradients, and relative difference of metrics, float32."""
LAYOUT_TOLERANCE = 2e-6
"""The same between layouts, which add up the same numbers in other orders."""
TIMINGS = ("step_time", "perf/", "memory/", "train_runtime")


class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing catches it, nothing is saved."""


def assert_conforms(
    algorithm: str | type[Algorithm[Any]],
    *,
    config: Mapping[str, Any] | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
    folder: Path | None = None,
    world_size: int = 2,
) -> None:
    """Run every contract check on an algorithm.

    Args:
        algorithm: registered name, 'module:attribute', or the class itself.
        config: its keys besides `name`.
        rows: training rows; default: made to fit its `needs`.
        folder: where runs are written; default: a temporary folder.
        world_size: processes for the world-size check; 1 skips it (no processes are started).

    Raises:
        AssertionError: naming the check and the numbers.
    """
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(algorithm, config=config, rows=rows, folder=folder or Path(temporary))
        check_config(bench)
        check_overfits(bench)
        check_micro_batches(bench)
        check_order(bench)
        check_layouts(bench)
        check_resume(bench)
        if world_size > 1:
            check_world_size(bench, world_size)


class Bench:
    """An algorithm with a tiny model, toy rows, and recipes that put them together."""

    def __init__(
        self,
        algorithm: str | type[Algorithm[Any]],
        *,
        folder: Path,
        config: Mapping[str, Any] | None = None,
        rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.name = algorithm if isinstance(algorithm, str) else f"{algorithm.__module__}:{algorithm.__qualname__}"
        self.algorithm: type[Algorithm[Any]] = register.algorithm.get(self.name).target
        self.folder = folder
        self.config = {**toy_config(self.algorithm, folder), **(config or {})}
        self.model = build_tiny_model(folder / "model")
        self.data = folder / "rows.jsonl"
        self.needs = self._configured().needs
        self.rows = list(rows) if rows is not None else toy_rows(self._configured(), NUM_ROWS)
        self.data.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")

    def _configured(self) -> Algorithm[Any]:
        """The algorithm under this config, which may need more than the class does."""
        preset = register.algorithm.get(self.name).preset
        settings = {**preset, "name": self.name, **self.config}
        return self.algorithm(self.algorithm.config_type.model_validate(settings))

    def recipe(self, run: str, *, seed: int = 0, model: Mapping[str, Any] | None = None, **settings: Any) -> Recipe:
        """A recipe of this algorithm on these rows; `model` goes into that block, `settings` into `train`."""
        training = {
            "num_epochs": 1,
            "batch_size": len(self.rows),
            "learning_rate": 1e-3,
            "lr_scheduler": "constant",
            "max_length": 64,
            "save_steps": 0,
        }
        online: dict[str, Any] = {}
        config = {"name": self.name, **self.config}
        method = self._configured()
        if method.needs.rewards:
            given = [Completion("", [], reward=1.0), Completion("", [], reward=0.0)] if method.needs.given else []
            blank = Group("", [], [], [*[Completion("", [])] * TOY_GENERATIONS, *given])
            each = method.count_units(blank)
            training["batch_size"] = len(self.rows) * each
            size = settings.get("batch_size", training["batch_size"])
            config["prompts_per_round"] = -(-size // each)
            combine = method.needs.combine
            toy = "SteadyLoudness" if method.needs.sources else "loudness"
            online = {
                **({"combine": dict(combine)} if combine else {}),
                **({"rewards": [{"name": f"{__name__}:{toy}"}]} if method.needs.scored else {}),
                "rollout": {"num_generations": TOY_GENERATIONS, "max_completion_length": TOY_LENGTH},
            }
        others = enumerate(sorted(method.needs.others), 1)
        return load_recipe(
            {
                **online,
                "models": {name: {"from": str(build_tiny_model(self.folder / name, seed=i))} for i, name in others},
                "seed": seed,
                "output_dir": str(self.folder / run),
                "model": {"name_or_path": str(self.model), "dtype": "float32", **(model or {})},
                "data": [{"path": str(self.data)}],
                "algorithm": config,
                "train": {**training, **settings},
            }
        )


def check_config(bench: Bench) -> None:
    """The recipe survives being written and read, and `alignkit check` accepts it."""
    recipe = bench.recipe("config")
    path = bench.folder / "written.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe, f"{bench.name}: a recipe changes when it is written and read again"
    plan.check(recipe)


def check_overfits(bench: Bench, floor: float = 0.0) -> None:
    """Sixty steps on a handful of rows take off a third at least of what the loss lies above `floor`, its infimum;
    online, of what the reward lies below 1, the most there is."""
    result = train(bench.recipe("overfit", max_steps=60, num_epochs=60, learning_rate=3e-3), quiet=True, report=False)
    if bench.needs.rewards and bench.needs.scored:
        rewards = [record["reward"] for record in read_metrics(result.folder)]
        first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
        assert 1 - last < (1 - first) * 2 / 3, (
            f"{bench.name}: does not learn what is rewarded: reward {first:.4f} → {last:.4f} in 60 steps"
        )
        return
    losses = [record["loss"] for record in read_metrics(result.folder)]
    assert losses[-1] < losses[0] - abs(losses[0] - floor) / 3, (
        f"{bench.name}: does not overfit {len(bench.rows)} rows: loss {losses[0]:.4f} → {losses[-1]:.4f} in 60 steps"
    )


def check_micro_batches(bench: Bench) -> None:
    """One gradient and one set of metrics for micro-batches of 1, 3 and all units, hence for any padding."""
    _assert_same_steps(
        bench,
        {f"micro-batch {size or 'all'}": bench.recipe(f"micro-{size}", micro_batch_size=size) for size in (None, 1, 3)},
    )


def check_order(bench: Bench) -> None:
    """Another shuffle of the same optimizer batch has the same gradient and metrics, from the same weights."""
    with same_start():
        _assert_same_steps(bench, {f"seed {seed}": bench.recipe(f"order-{seed}", seed=seed) for seed in (0, 1)})


def check_layouts(bench: Bench) -> None:
    """One gradient and one set of metrics however rows are laid out and the head is cut, all of it against padded rows
    and whole logits."""
    shared = {"layout": "prefix_shared"}
    vocabulary_bytes = 4 * len(build_tiny_tokenizer())
    ways: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
        "padded rows": ({"layout": "padded"}, {}),
        "packed rows": ({"layout": "packed"}, {}),
        "shared prompts": (shared, {}),
        "shared prompts in the cascade": (shared, {"dense_tokens": 0}),
        "a chunk for every unit": (shared, {"chunk_bytes": 1}),
        "units larger than a chunk": (shared, {"chunk_bytes": 3 * vocabulary_bytes, "max_chunk_bytes": 1}),
        "recomputed activations": ({**shared, "gradient_checkpointing": True}, {"dense_tokens": 0}),
    }
    steps = {}
    for label, (model, sizes) in ways.items():
        with engine_sizes(**sizes):
            steps[label] = gradient_step(bench.recipe(f"layout-{label.replace(' ', '-')}", model=model))
    _assert_same(
        bench,
        steps,
        LAYOUT_TOLERANCE,
        "the loss looks beyond the units it is handed, or reaches the weights by another way than `out.logps`",
    )


def check_resume(bench: Bench) -> None:
    """Killed inside any step and resumed, the run ends with the same bits and the same metrics.

    Two passes over every round, so that some kills fall inside one.
    """
    settings: dict[str, Any] = {"batch_size": 3, "num_epochs": 1, "epochs_per_round": 2, "save_steps": 2}
    if bench.needs.rewards:  # a round takes four steps
        settings["max_steps"] = 6
    whole = train(bench.recipe("whole", **settings), quiet=True, report=False)
    expected = digest(whole.folder), comparable_metrics(whole.folder)
    for step in range(1, whole.steps + 1):
        recipe = bench.recipe(f"killed-{step}", **settings)
        with killed_at(step):
            try:
                train(recipe, quiet=True, report=False)
            except Killed:
                pass
            else:
                raise AssertionError(f"{bench.name}: step {step} was never reached")
        resume(recipe.output_dir, quiet=True, report=False)
        found = digest(Path(recipe.output_dir)), comparable_metrics(Path(recipe.output_dir))
        assert found[0] == expected[0], f"{bench.name}: killed at step {step} and resumed, the weights differ"
        assert found[1] == expected[1], f"{bench.name}: killed at step {step} and resumed, the metrics differ"


def check_world_size(bench: Bench, size: int) -> None:
    """Several processes take the same steps as one, with batches they cannot share and one that leaves a rank idle."""
    many = world_recipe(bench, size)
    train_in_processes([many], size)
    compare_worlds(bench, many, size)


def world_recipe(bench: Bench, size: int) -> Recipe:
    """Five steps whose optimizer batches are not divisible by `size`, the last of an epoch smaller than it."""
    # Adam divides by the size of a gradient: without epsilon the rounding of gradients near 0 would move weights.
    return bench.recipe(f"world-{size}", batch_size=size + 1, max_steps=5, num_epochs=5, adam_epsilon=1e-5)


def train_in_processes(recipes: Sequence[Recipe], size: int) -> None:
    """Run recipes one after the other in one group of `size` processes: starting Python takes longer than they do."""
    paths = []
    for recipe in recipes:
        path = Path(f"{recipe.output_dir}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        paths.append(str(path))
    run_processes(["-m", "alignkit.testing", *paths], size)


def compare_worlds(bench: Bench, many: Recipe, size: int) -> None:
    """The run `many`, done by `size` processes, against the same recipe in this one."""
    folder = Path(many.output_dir)
    lock = json.loads((folder / "run.lock").read_text(encoding="utf-8"))
    assert lock["world_size"] == size, f"{bench.name}: asked for {size} processes, ran with {lock['world_size']}"
    alone = train(many.model_copy(update={"output_dir": f"{folder}-alone"}), quiet=True, report=False)
    worst = weight_difference(alone.folder, folder)
    assert worst <= TOLERANCE, (
        f"{bench.name}: weights of {size} processes and of one differ by {worst:.2g} after 5 steps: a statistic of "
        "the batch is taken from one rank's share instead of through `world`"
    )
    _assert_close_metrics(bench, f"{size} processes", read_metrics(folder), read_metrics(alone.folder), 1e-5)


def run_processes(arguments: Sequence[str], size: int) -> subprocess.CompletedProcess[str]:
    """`python <arguments>` in `size` processes of this machine. Raises AssertionError with the output on failure."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", "--standalone", *arguments]
    if arguments[0] == "-m":
        command = [*command[:5], "-m", *arguments[1:]]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)
    assert done.returncode == 0, (
        f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    )
    return done


def gradient_step(recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradient of the first optimizer batch, by weight name, and what the step logs."""
    Path(recipe.output_dir).mkdir(parents=True, exist_ok=True)
    dist = DistEngine(DTYPES[recipe.model.dtype])
    run = assemble(recipe, dist, Console(quiet=True))
    gradients: dict[str, Tensor] = {}
    norm = dist.grad_norm

    def keep(parameters: Any, max_norm: float) -> Tensor:
        policy = run.trainer.policy
        for model in (policy.bare, policy.critic):
            named = model.named_parameters() if model is not None else ()
            mark = "" if model is policy.bare else "critic."
            gradients.update({mark + name: p.grad.clone() for name, p in named if p.grad is not None})
        return norm(parameters, max_norm)

    dist.grad_norm = keep  # type: ignore[method-assign]
    run.trainer.progress.total_steps = 1
    for file in run.files:
        file.fresh()
    run.trainer.run()
    run.close()
    return gradients, read_metrics(Path(recipe.output_dir))[0]


def relative_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """L2 norm of the difference over the L2 norm of `expected`, all tensors together."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[name].double() - x.double()).pow(2).sum()) for name, x in expected.items())
    total = sum(float(x.double().pow(2).sum()) for x in expected.values())
    return float((difference / total) ** 0.5 if total else difference**0.5)


def weight_difference(first: Path, second: Path) -> float:
    """Largest absolute difference between two exported models' weights."""
    from safetensors.torch import load_file

    paths = weight_files(first)
    assert paths, f"{first} holds no weights"
    worst = 0.0
    for path in paths:
        a, b = load_file(path), load_file(second / path.relative_to(first))
        worst = max(worst, *(float((a[key] - b[key]).abs().max()) for key in a))
    return worst


def digest(folder: Path) -> str:
    """sha256 of a run's exported weights."""
    found = hashlib.sha256()
    for path in weight_files(folder):
        found.update(path.read_bytes())
    return found.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Files of a run's exported weights: one model's, or those of several side by side, and a critic's."""
    places = ("*.safetensors", "member-*/*.safetensors", "critic/*.safetensors")
    return sorted(path for place in places for path in folder.glob(place))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def comparable_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without timings."""
    return [{k: v for k, v in r.items() if not k.startswith(TIMINGS)} for r in read_metrics(folder)]


def build_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A two-layer Llama of random weights with a character tokenizer; the folder loads with plain transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
                tie_word_embeddings=True,
                initializer_range=0.1,
            )
        )
    return save_quietly(folder, model, tokenizer)


def build_tiny_tokenizer() -> Any:
    """A token a character: pad 0, bos 1, eos 2, unknown 3, then `SYMBOLS`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", "<bos>", "<eos>", "<unk>", *SYMBOLS]
    inner = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def save_quietly(folder: Path, model: Any, tokenizer: Any) -> Path:
    """Model and tokenizer as a folder plain transformers loads, without a progress bar."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loudness(completions: Sequence[str]) -> list[float]:
    """The share of upper-case letters of what was written: what toy completions are rewarded for."""
    return [sum(letter.isupper() for letter in text) / max(1, len(text)) for text in completions]


class SteadyLoudness:
    """`loudness` of a judge that says what it said a round before, for methods that compare the two."""

    config_type = Config
    requires: tuple[str, ...] = ()

    def __init__(self, config: Config) -> None:
        del config

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """One score a completion, always valid."""
        del models
        score = torch.tensor(loudness(rows.completions))
        before = {"previous": score}
        return RewardOutput(score=score, valid=torch.ones(len(score), dtype=torch.bool), components=before)


def toy_config(algorithm: type[Algorithm[Any]], folder: Path) -> dict[str, Any]:
    """The keys without which an algorithm could not read its toy rows: their objectives, where it lists them, and
    judges that are asked in letters of the toy tokenizer, from the first step on."""
    keys = algorithm.config_type.model_fields
    config: dict[str, Any] = {}
    if "objectives" in keys:
        config["objectives"] = list(TOY_OBJECTIVES)
    if {"template", "answers"} <= keys.keys():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "judge.txt").write_text("{prompt} {first} {second} ", encoding="utf-8")
        config |= {"template": str(folder / "judge.txt"), "answers": ["A", "B"], "warmup_steps": 0}
    return config


def toy_rows(algorithm: type[Algorithm[Any]] | Algorithm[Any], count: int) -> list[dict[str, Any]]:
    """Rows that fit an algorithm's needs: answers in upper case are good, in lower case bad, of many lengths.

    Every third asks what the one before it asked: some layouts share prompts.
    """
    needs = algorithm.needs
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        prompt = "".join(draw.choices(SYMBOLS[:26], k=draw.randint(2, 12)))
        if i % 3 == 2:
            prompt = rows[-1]["prompt"]
        answers = [
            "".join(draw.choices(SYMBOLS[27:] if j == 0 else SYMBOLS[:26], k=draw.randint(1, 16)))
            for j in range(max(1, needs.completions))
        ]
        row: dict[str, Any] = {"id": f"row-{i}", "prompt": prompt}
        if needs.rewards:
            row |= {"demonstration": answers[0], "category": TOY_OBJECTIVES[i % len(TOY_OBJECTIVES)]}
            row |= {"chosen": answers[0], "rejected": answers[0].lower()} if needs.given else {}
        elif needs.completions == 2:
            row |= {"chosen": answers[0], "rejected": answers[1]}
        elif needs.completions > 2:
            row |= {"completions": answers, "scores": [float(-j) for j in range(len(answers))]}
        elif "label" in needs.fields:
            row |= {"completion": answers[0].lower() if i % 2 else answers[0], "label": i % 2 == 0}
        else:
            row |= {"completion": answers[0]}
        if "objective" in needs.fields:
            row |= {"objective": TOY_OBJECTIVES[i % len(TOY_OBJECTIVES)]}
        rows.append(row)
    return rows


def _assert_same_steps(bench: Bench, recipes: Mapping[str, Recipe]) -> None:
    _assert_same(
        bench,
        {label: gradient_step(recipe) for label, recipe in recipes.items()},
        TOLERANCE,
        "the loss averages for itself, or a statistic of the batch is not in `annotate`",
    )


def _assert_same(
    bench: Bench, steps: Mapping[str, tuple[dict[str, Tensor], dict[str, float]]], tolerance: float, cause: str
) -> None:
    (first, (gradient, metrics)), *others = steps.items()
    assert gradient, f"{bench.name}: no weight has a gradient"
    for label, (found, logged) in others:
        difference = relative_difference(found, gradient)
        assert difference <= tolerance, (
            f"{bench.name}: the gradient of {label} differs from that of {first} by {difference:.2g} (relative L2, "
            f"allowed {tolerance:g}): {cause}"
        )
        _assert_close_metrics(bench, label, [logged], [metrics], tolerance)


def _assert_close_metrics(
    bench: Bench,
    label: str,
    found: Sequence[Mapping[str, Any]],
    expected: Sequence[Mapping[str, Any]],
    tolerance: float,
) -> None:
    assert len(found) == len(expected), f"{bench.name}: {label} logged {len(found)} records, not {len(expected)}"
    # implicit rewards are nats times β, and so is their rounding
    beta = max(1.0, bench.recipe("beta").algorithm.model_dump().get("beta", 1.0))
    for got, want in zip(found, expected, strict=True):
        names = {name for name in {*got, *want} if not name.startswith(TIMINGS)}
        for name in sorted(names):
            assert name in got.keys() & want.keys(), f"{bench.name}: {name} is logged by only one of the runs ({label})"
            # before the first step margins are differences of equal numbers: rounding is all there is
            size = max(beta if "rewards/" in name else 1.0, abs(want[name]))
            close = abs(got[name] - want[name]) <= tolerance * size
            assert close, f"{bench.name}: {name} is {got[name]!r} with {label}, {want[name]!r} without"


@contextmanager
def engine_sizes(
    *, chunk_bytes: int | None = None, max_chunk_bytes: int | None = None, dense_tokens: int | None = None
) -> Iterator[None]:
    """Sizes at which the engine changes its way, set so that a tiny model meets all of them.

    `chunk_bytes` of logits are computed at a time, a unit of more than `max_chunk_bytes` twice; streams up to
    `dense_tokens` are one masked attention call.
    """
    places = [(head, "CHUNK_BYTES"), (head, "MAX_CHUNK_BYTES"), (attention, "DENSE_TOKENS")]
    asked = zip(places, (chunk_bytes, max_chunk_bytes, dense_tokens), strict=True)
    before = [(module, name, getattr(module, name)) for module, name in places]
    for (module, name), size in asked:
        if size is not None:
            setattr(module, name, size)
    try:
        yield
    finally:
        for module, name, size in before:
            setattr(module, name, size)


@contextmanager
def same_start() -> Iterator[None]:
    """Draw what a model lacks at the start, score layers and adapters, and what it writes, as seed 0 does, whatever the
    recipe's seed."""
    names = vars(assembling)
    original, sampler = names["load_policy"], names["build_sampler"]

    def load(config: ModelConfig, seed: int = 0, heads: Heads = LANGUAGE) -> Any:
        del seed
        return original(config, 0, heads)

    names["load_policy"] = load
    names["build_sampler"] = lambda policy, renderer, sampling, seed: sampler(policy, renderer, sampling, 0)
    try:
        yield
    finally:
        names["load_policy"], names["build_sampler"] = original, sampler


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Raise `Killed` in place of optimizer step `step`."""
    original = Trainer.update

    def update(self: Trainer, part: list[int]) -> None:
        if self.progress.step + 1 == step:
            raise Killed
        original(self, part)

    Trainer.update = update  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.update = original  # type: ignore[method-assign]


__all__ = [
    "Bench",
    "assert_conforms",
    "check_config",
    "check_layouts",
    "check_micro_batches",
    "check_order",
    "check_overfits",
    "check_resume",
    "check_world_size",
]


if __name__ == "__main__":  # one of the processes of `train_in_processes`
    for argument in sys.argv[1:]:
        train(load_recipe(Path(argument)), quiet=True, report=False)
