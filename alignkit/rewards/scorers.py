"""Rewards that a trained model gives: reward models as transformers saves them, alone or several together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from alignkit import ops
from alignkit.core.config import Config
from alignkit.core.contracts import Models
from alignkit.core.errors import RecipeError, RunFailed
from alignkit.core.lazy import torch
from alignkit.core.registry import register
from alignkit.core.types import Message, RewardBatch, RewardOutput

if TYPE_CHECKING:
    from torch import Tensor


class RewardModelSourceConfig(Config):
    """Keys of `reward_model`."""

    model: str | list[str] = Field(
        description="folder or hub id of a sequence classifier, or several; a run of members"
    )
    agg: Literal["mean", "median", "min", "mean_std", "uwo"] = Field(
        "mean", description="one score of several models': less coef·deviation in mean_std, less coef·variance in uwo"
    )
    coef: float = Field(0.5, ge=0, description="what disagreement costs in mean_std and uwo")
    reference: str | None = Field(
        None, description="rows of prompt and completion; each model's scores are standardised by its own of them"
    )
    goal: dict[str, float] = Field({}, description="attribute → weight, of a model with several scores")
    chat: bool | None = Field(None, description="write prompts with the chat template; null = if there is one")
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = Field(16, ge=1, description="answers of one forward")
    max_length: int = Field(1024, ge=2, description="tokens of prompt + completion; the prompt's first are left out")


@register.reward("reward_model")
class RewardModelSource:
    """What reward models say of a completion: the score of the last token of prompt and answer, read as in training."""

    config_type: ClassVar[type[Config]] = RewardModelSourceConfig
    requires: tuple[str, ...] = ()

    def __init__(self, config: RewardModelSourceConfig) -> None:
        self.config = config
        self._members: list[_Member] = []
        self._moments: tuple[Tensor, Tensor] | None = None

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """One score a completion; always valid. Components: the attributes of one model, or mean, std, min of several.

        Raises:
            RecipeError: a model cannot be loaded, or its scores and `goal` do not fit.
        """
        del models
        self._load()
        texts = list(zip(rows.prompts, rows.completions, rows.ended.tolist(), strict=True))
        each = [self._scores(member, texts) for member in self._members]
        merged = torch.stack(
            [self._merged(member, found) for member, found in zip(self._members, each, strict=True)], 1
        )
        if self._moments is not None:
            merged = ops.standardize(merged, *self._moments)
        score = ops.aggregate_scores(merged, self.config.agg, self.config.coef)
        if len(self._members) > 1:
            parts = {"mean": merged.mean(1), "std": merged.std(1, correction=0), "min": merged.amin(1)}
        else:
            names = self._members[0].names
            parts = dict(zip(names, each[0].unbind(1), strict=True)) if len(names) > 1 else {}
        return RewardOutput(score=score, valid=torch.ones(len(texts), dtype=torch.bool), components=parts)

    def _load(self) -> None:
        """The models, when they are first asked for: reading a recipe must not wait for them."""
        if self._members:
            return
        asked = [self.config.model] if isinstance(self.config.model, str) else self.config.model
        self._members = [_Member(path, self.config) for folder in asked for path in member_folders(folder)]
        if self.config.reference is not None:
            texts = _read_reference(self.config.reference)
            found = [self._merged(member, self._scores(member, texts)) for member in self._members]
            merged = torch.stack(found, 1)
            self._moments = merged.mean(0), merged.std(0, correction=0)

    def _scores(self, member: _Member, texts: Sequence[tuple[list[Message], str, bool]]) -> Tensor:
        """[B, K]: answers of like length share a forward."""
        ids = [member.tokens(*text) for text in texts]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        found: Tensor = torch.zeros(len(ids), len(member.names))
        for start in range(0, len(order), self.config.batch_size):
            some = order[start : start + self.config.batch_size]
            found[some] = member.scores([ids[i] for i in some])
        return found

    def _merged(self, member: _Member, scores: Tensor) -> Tensor:
        """[B, K] → [B]: the weighted sum of attributes, or the only score."""
        goal = self.config.goal
        if len(member.names) == 1 and not goal:
            return scores[:, 0]
        stray = sorted(set(goal) - set(member.names))
        if not goal or stray:
            problem = f"`goal` weighs {stray[0]!r}, which it does not have" if stray else "args.goal says none of them"
            raise RecipeError(
                f"reward 'reward_model': {member.path!r} has the scores {', '.join(member.names)}; {problem}. Expected "
                "`goal: {NAME: WEIGHT}`"
            )
        return (scores * scores.new_tensor([goal.get(name, 0.0) for name in member.names])).sum(1)


class _Member:
    """One classifier with its tokenizer. `names` of its scores, in the order of its config."""

    def __init__(self, path: str, config: RewardModelSourceConfig) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.path = path
        options = {} if (labels := adapter_labels(path)) is None else {"num_labels": labels}
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
            self._model: Any = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=getattr(torch, config.dtype), **options
            )
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise RecipeError(
                f"reward 'reward_model': cannot load {path!r}: {first}. Expected a folder that a run of the algorithm "
                "reward_model wrote, or a sequence classifier of the hub."
            ) from error
        self._model.score.float()
        self._model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        count = self._model.config.num_labels
        self.names = [self._model.config.id2label[i] for i in range(count)]
        self._max_length = config.max_length
        self._chat = config.chat if config.chat is not None else self._tokenizer.chat_template is not None
        self._front = self._special_tokens_in_front()

    def tokens(self, prompt: list[Message], completion: str, ended: bool) -> list[int]:
        """Prompt and answer as they are in training: the stop token at its end is the last, where the answer ended."""
        stop = self._tokenizer.eos_token_id
        if self._chat:
            turns = [*prompt, {"role": "assistant", "content": completion}]
            text, front = self._tokenizer.apply_chat_template(turns, tokenize=False), []
        elif len(prompt) == 1:
            text, front = prompt[0].get("content", "") + completion, self._front
        else:
            raise RunFailed(
                f"reward 'reward_model': a prompt has {len(prompt)} messages, and {self.path!r} no chat template to "
                "write them with"
            )
        ids = self._encode(text)
        front = front if ids[: len(front)] != front else []
        ids = [*front, *ids]
        if self._chat and stop in ids and not self._tokenizer.decode(ids[_last(ids, stop) + 1 :]).strip():
            ids = ids[: _last(ids, stop)]
        if ended and ids[-1] != stop:
            ids.append(stop)
        kept = ids[: len(front)]
        return ids if len(ids) <= self._max_length else [*kept, *ids[len(ids) - self._max_length + len(kept) :]]

    def scores(self, rows: Sequence[list[int]]) -> Tensor:
        """[B, K] float32, on the CPU: of the last token of each row, padded on the right, whatever the padding is."""
        width, device = max(map(len, rows)), self._model.device
        ids = torch.tensor([[*row, *([row[-1]] * (width - len(row)))] for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(width, device=device) < lengths[:, None]
        with torch.no_grad():
            states = self._model.base_model(input_ids=ids, attention_mask=mask.long())[0]
            last = states[torch.arange(len(rows), device=device), lengths - 1].float()
            found: Tensor = self._model.score(last).float().cpu()
        return found

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _special_tokens_in_front(self) -> list[int]:
        bare, whole = self._encode("a"), list(self._tokenizer("a", verbose=False)["input_ids"])
        start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return whole[:start]


def member_folders(path: str) -> list[str]:
    """The models of a run folder: those side by side in it, or the folder itself."""
    found = sorted(Path(path).glob("member-*"), key=lambda folder: int(folder.name.partition("-")[2]))
    return [str(folder) for folder in found] or [path]


def adapter_labels(path: str) -> int | None:
    """How many scores the adapter in a folder gives; None when it is no adapter: its base does not know."""
    from safetensors import safe_open

    file = Path(path) / "adapter_model.safetensors"
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as weights:
        names = [name for name in weights.keys() if name.endswith("score.weight")]  # noqa: SIM118 (it is no dict)
        shapes = [weights.get_slice(name).get_shape() for name in names]
    if not shapes:
        raise RecipeError(f"reward 'reward_model': the adapter {path!r} has no score layer; it writes text")
    return int(shapes[0][0])


def _last(tokens: Sequence[int], token: int) -> int:
    return len(tokens) - 1 - tokens[::-1].index(token)


def _read_reference(path: str) -> list[tuple[list[Message], str, bool]]:
    """Rows of `prompt` (text or messages) and `completion` as finished answers. Raises RecipeError."""
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [(row["prompt"], row["completion"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"reward 'reward_model': args.reference {path!r}: {error}; expected a file of JSON lines with prompt and "
            "completion"
        ) from error
    if len(found) < 2:
        raise RecipeError(f"reward 'reward_model': args.reference {path!r} has {len(found)} rows, expected 2 or more")
    return [
        ([Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt, completion, True)
        for prompt, completion in found
    ]
