"""Text → tokens, the same in training and sampling: chat template, shared prompt, one stop token, trained turns."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

from jinja2 import TemplateError

from alignkit.core.errors import DataError
from alignkit.core.types import Message
from alignkit.data.shapes import STEP_SEPARATOR, BadRow, Example


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that rendering needs."""

    chat_template: Any

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Mapping[str, Any]:
        """A mapping whose `input_ids` are a list of ids for each text."""
        ...

    def apply_chat_template(self, conversation: list[Message], **options: Any) -> Any:
        """The conversation as text, with `tokenize=False`."""
        ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of the ids."""
        ...

    def save_pretrained(self, save_directory: Any) -> Any:
        """Write its files into a folder."""
        ...


@dataclass(slots=True)
class Rendered:
    """Token ids of an example: the `prompt` all completions share, and each completion up to its stop token.

    `trained[i]` is None when the whole completion is, else a flag a token. `boundary_merged`: the last prompt tokens
    differ once a completion follows, so they count as completion. `turns_rewritten`: earlier assistant turns that the
    template shows otherwise once the conversation goes on; they are context only. `step_ends`: tokens of the only
    completion up to the end of each step, its separator included; None where the example has no steps.
    """

    prompt: list[int]
    completions: list[list[int]] = field(default_factory=list)
    trained: list[list[bool] | None] = field(default_factory=list)
    boundary_merged: bool = False
    turns_rewritten: int = 0
    step_ends: list[int] | None = None


@dataclass(slots=True)
class _Turn:
    """The conversation up to an assistant turn, and up to its end."""

    before: str
    after: str


@dataclass(slots=True)
class _Texts:
    """What must be encoded for one example. `turns[i]` is None when all of completion i is trained; `steps` are the
    texts up to the end of each step but the last."""

    prompt: str
    full: list[str] = field(default_factory=list)
    turns: list[list[_Turn] | None] = field(default_factory=list)
    front: list[int] = field(default_factory=list)
    chat: bool = False
    rewritten: int = 0
    steps: list[str] | None = None

    def all(self) -> Iterable[str]:
        yield self.prompt
        yield from self.full
        yield from self.steps or []
        for turns in self.turns:
            for turn in turns or []:
                yield from (turn.before, turn.after)


class Renderer:
    """Turns examples into token ids with one tokenizer and one chat template.

    `stop_ids`: every token that ends a completion; `eos_id` is the one appended where the text has none.
    `chat_template`: None = the tokenizer's own.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_ids: Collection[int],
        chat_template: str | None,
        eos_id: int,
        bos_id: int | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids) | {eos_id}
        self.chat_template = chat_template
        self.eos_id, self.bos_id = eos_id, bos_id
        self._stop_texts = tuple(self.decode([token]) for token in sorted(self.stop_ids))
        self._blank: dict[int, bool] = {}
        self._front = self._special_tokens_in_front()

    def render(self, examples: Sequence[Example]) -> list[Rendered | BadRow]:
        """Token ids of each example, or why it has none. Encodes everything in one call.

        Raises: DataError when the chat template is missing, doubles the BOS token, or does not extend its prompt.
        """
        planned = [self._texts(example) for example in examples]
        texts = list(dict.fromkeys(text for plan in planned if isinstance(plan, _Texts) for text in plan.all()))
        encoded = self._encode(texts)
        return [plan if isinstance(plan, BadRow) else self._assemble(plan, encoded) for plan in planned]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, special tokens included."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, no special ones added."""
        return self._encode([text])[text]

    def prompt(self, text: str) -> list[int]:
        """The tokens of the prompt that a text makes: the user's turn where there is a chat template, else as it is.

        Raises: DataError when the chat template refuses it.
        """
        chat = bool(self.chat_template or self.tokenizer.chat_template)
        asked: str | list[Message] = [Message(role="user", content=text)] if chat else text
        rendered = self.render([Example(prompt=asked, completions=[])])[0]
        if isinstance(rendered, BadRow):
            raise DataError(f"the prompt {text[:60]!r} cannot be written: {rendered.reason} {rendered.note}")
        return rendered.prompt

    def _special_tokens_in_front(self) -> list[int]:
        """What the tokenizer itself puts before a plain text; what it may put behind is ours to decide."""
        probe = "a"
        bare = self._encode([probe])[probe]
        whole = list(self.tokenizer([probe], add_special_tokens=True, verbose=False)["input_ids"][0])
        starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
        return whole[: starts[0]] if starts else []

    def _encode(self, texts: list[str]) -> dict[str, list[int]]:
        if not texts:
            return {}
        # verbose=False: a text beyond model_max_length is no accident here, truncation comes later and is counted
        rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return dict(zip(texts, rows, strict=True))

    def _texts(self, example: Example) -> _Texts | BadRow:
        if isinstance(example.prompt, str):
            full = [example.prompt + completion for completion in example.completions if isinstance(completion, str)]
            begun = [example.prompt + text for text in _begun(example.steps)] if example.steps else None
            return _Texts(example.prompt, full, [None] * len(full), self._front, steps=begun)
        if not (self.chat_template or self.tokenizer.chat_template):
            raise DataError(
                "the rows are conversations, and the tokenizer has no chat template to write them with. "
                "Give one in the recipe: `model.chat_template: FILE`, FILE being a jinja template."
            )
        try:
            return self._chat_texts(example, example.prompt)
        except TemplateError as error:
            return BadRow("refused by template", str(error))

    def _chat_texts(self, example: Example, prompt: list[Message]) -> _Texts:
        texts = _Texts(self._apply(example, prompt, speak=True), chat=True)
        if example.steps:
            turns_so_far = [Message(role="assistant", content=text) for text in _begun(example.steps)]
            texts.steps = [self._apply(example, [*prompt, turn]) for turn in turns_so_far]
        for completion in example.completions:
            assert not isinstance(completion, str)
            full = self._apply(example, [*prompt, *completion])
            texts.full.append(full)
            if len(completion) == 1:
                texts.turns.append(None)
                continue
            turns = []
            for i, message in enumerate(completion):
                if message["role"] != "assistant":
                    continue
                history, after = [*prompt, *completion[:i]], self._apply(example, [*prompt, *completion[: i + 1]])
                if self._kept(after, full) and self._kept(self._apply(example, history), full):
                    turns.append(_Turn(self._apply(example, history, speak=True), after))
                else:
                    texts.rewritten += 1
            texts.turns.append(turns)
        return texts

    def _apply(self, example: Example, messages: list[Message], speak: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages,
            tools=example.tools,
            chat_template=self.chat_template,
            add_generation_prompt=speak,
            tokenize=False,
            **example.template_options,
        )
        return text

    def _kept(self, start: str, full: str) -> bool:
        """Whether a conversation still begins as its start was rendered, end marks of the start aside."""
        start = start.rstrip()
        while (mark := next((text for text in self._stop_texts if text and start.endswith(text)), None)) is not None:
            start = start.removesuffix(mark).rstrip()
        return full.startswith(start)

    def _assemble(self, texts: _Texts, encoded: Mapping[str, list[int]]) -> Rendered | BadRow:
        prompt = self._with_front(encoded[texts.prompt], texts.front)
        full = [self._with_front(encoded[text], texts.front) for text in texts.full]
        shared = min((common_length(prompt, ids) for ids in full), default=len(prompt))
        if texts.chat:
            self._check_template(prompt, full, shared)
        if shared == 0:
            if not full or any(ids[:1] != full[0][:1] for ids in full):
                return BadRow("malformed", "the prompt has no tokens, and the completions do not begin alike")
            shared = 1  # the first token has nothing before it that could predict it
        if any(len(ids) <= shared for ids in full):
            return BadRow("empty completion", "nothing is left of it after rendering")
        rendered = Rendered(prompt[:shared] or full[0][:1], boundary_merged=shared < len(prompt))
        rendered.turns_rewritten = texts.rewritten
        for ids, turns in zip(full, texts.turns, strict=True):
            completion = self._cut_behind_stop(ids[shared:])
            rendered.trained.append(self._flags(ids, shared, turns, encoded, completion))
            rendered.completions.append(completion if completion[-1] in self.stop_ids else [*completion, self.eos_id])
        if texts.steps is not None:
            begun = [self._with_front(encoded[text], texts.front) for text in texts.steps]
            ends = [common_length(ids, full[0]) - shared for ids in begun] + [len(rendered.completions[0])]
            if any(end <= before for before, end in pairwise([0, *ends])):
                return BadRow("malformed", f"two of its {len(ends)} steps end in the same token")
            rendered.step_ends = ends
        return rendered

    def _with_front(self, tokens: list[int], front: list[int]) -> list[int]:
        """Add the tokenizer's own first tokens, unless the text itself begins with them."""
        return tokens if tokens[: len(front)] == front else [*front, *tokens]

    def _check_template(self, prompt: list[int], full: list[list[int]], shared: int) -> None:
        """Raises DataError for a template that writes BOS twice or rewrites the prompt when an answer follows."""
        for ids in [prompt, *full]:
            if self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id]:
                raise DataError(
                    f"the chat template writes the beginning-of-text token twice: {self.decode(ids[:8])!r}. "
                    f"Expected one. Remove one from the template {self._template_start()}, or give another: "
                    "`model.chat_template: FILE`."
                )
        if 2 * shared < len(prompt):
            raise DataError(
                f"the chat template {self._template_start()} does not extend its prompt: once the answer follows, only "
                f"{shared} of {len(prompt)} prompt tokens stay the same, {self.decode(prompt[shared : shared + 12])!r} "
                f"becomes {self.decode(full[0][shared : shared + 12])!r}. The model would be trained on a context it "
                "never sees when it answers. Give a template that keeps the history: `model.chat_template: FILE`."
            )

    def _template_start(self) -> str:
        return repr(str(self.chat_template or self.tokenizer.chat_template)[:60] + "…")

    def _flags(
        self,
        ids: list[int],
        shared: int,
        turns: list[_Turn] | None,
        encoded: Mapping[str, list[int]],
        completion: list[int],
    ) -> list[bool] | None:
        """True on the tokens an assistant wrote, its end marks included; one more flag where a stop is appended."""
        if turns is None:
            return None
        flags = [False] * len(completion)
        for turn in turns:
            start = max(common_length(encoded[turn.before], ids), shared)
            end = common_length(encoded[turn.after], ids)
            end = min(start + len(self._cut_behind_stop(ids[start:end])), shared + len(completion))
            flags[start - shared : end - shared] = [True] * (end - start)
        return flags if completion[-1] in self.stop_ids else [*flags, flags[-1]]

    def _cut_behind_stop(self, tokens: list[int]) -> list[int]:
        """Without what follows the first of the stop tokens at the end; blank tokens among them do not count."""
        end = len(tokens)
        for i in range(len(tokens) - 1, -1, -1):
            if tokens[i] in self.stop_ids:
                end = i + 1
            elif not self._is_blank(tokens[i]):
                break
        return tokens[:end]

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self.decode([token]).strip()
        return self._blank[token]


def _begun(steps: Sequence[str]) -> list[str]:
    """The answer up to the end of each step but the last, the separator behind it included."""
    return [STEP_SEPARATOR.join(steps[:count]) + STEP_SEPARATOR for count in range(1, len(steps))]


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    limit = min(len(first), len(second))
    if first[:limit] == second[:limit]:
        return limit
    return next(i for i in range(limit) if first[i] != second[i])
