"""Where the steps of a stepwise row end in its tokens."""

import pytest

from alignkit.data.render import Renderer
from alignkit.data.shapes import BadRow, to_example
from alignkit.testing import build_tiny_tokenizer

TEMPLATE = "{% for m in messages %}<bos>{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<bos>{% endif %}"


@pytest.fixture
def tokenizer():
    return build_tiny_tokenizer()


def rendered(tokenizer, row):
    renderer = Renderer(tokenizer, stop_ids=[2], chat_template=TEMPLATE, eos_id=2, bos_id=1)
    [found] = renderer.render([to_example(row, "stepwise")])
    return found


def row(*steps, prompt="abc"):
    return {"prompt": prompt, "completions": list(steps), "labels": [True] * len(steps)}


def test_a_step_ends_behind_its_separator_and_the_last_behind_the_stop_token(tokenizer):
    found = rendered(tokenizer, row("aa", "bbb", "c"))
    assert found.step_ends == [4, 9, 11]
    assert len(found.completions[0]) == 11
    assert tokenizer.decode(found.completions[0][4:7]) == "bbb"


def test_a_single_step_is_the_whole_answer(tokenizer):
    assert rendered(tokenizer, row("aa")).step_ends == [3]


def test_steps_of_a_conversation_end_as_its_template_writes_them(tokenizer):
    prompt = [{"role": "user", "content": "abc"}]
    found = rendered(tokenizer, row("aa", "bbb", prompt=prompt))
    assert tokenizer.decode(found.prompt) == "<bos>abc<eos><bos>"
    assert found.step_ends == [4, 8]


def test_a_separator_that_melts_into_the_next_step_counts_with_that(tokenizer):
    """Tokens of two characters: `a`, `\\n\\n` and `bb` become `a\\n`, `\\nb` and `b`."""

    class InTwos:
        chat_template = None

        def __call__(self, texts, **_):
            return {"input_ids": [[hash(text[i : i + 2]) for i in range(0, len(text), 2)] for text in texts]}

        def decode(self, tokens, **_):
            return "?"

    found = rendered(InTwos(), row("a", "bb", prompt="pp"))
    assert found.step_ends == [1, 4]


def test_rows_of_other_shapes_have_no_steps(tokenizer):
    renderer = Renderer(tokenizer, stop_ids=[2], chat_template=None, eos_id=2, bos_id=1)
    [found] = renderer.render([to_example({"prompt": "a", "completion": "b"}, "prompt_completion")])
    assert found.step_ends is None


def test_steps_that_end_in_one_token_are_refused():
    class OneToken:
        """Everything behind the prompt is one token."""

        chat_template = None

        def __call__(self, texts, **_):
            return {"input_ids": [[1, *([hash(text)] if len(text) > 1 else [])] for text in texts]}

        def decode(self, tokens, **_):
            return "?"

    found = rendered(OneToken(), row("a", "b", prompt="p"))
    assert isinstance(found, BadRow)
    assert found.note == "two of its 2 steps end in the same token"
