"""Rendering: shared prompt, one stop token, no double BOS, trained turns; over several families of templates."""

import pytest

from alignkit.core import DataError
from alignkit.data.render import Rendered, common_length
from alignkit.data.shapes import BadRow, Example

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "<|begin|>{% for m in messages %}<|head|>{{ m.role }}<|head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|head|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
# earlier answers lose what stands before </think>, as reasoning models' templates do
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

USER = [{"role": "user", "content": "hello"}]
CHATML_PROMPT = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
LLAMA_PROMPT = "<|begin|><|head|>user<|head|>\n\nhello<|eot|><|head|>assistant<|head|>\n\n"


def says(text, role="assistant"):
    return {"role": role, "content": text}


def pieces(renderer, rendered, i=0):
    """(text of the prompt, text of completion i)."""
    return renderer.decode(rendered.prompt), renderer.decode(rendered.completions[i])


def trained_text(renderer, rendered, i=0):
    """What is trained of completion i; masked tokens become one bar each run."""
    out, masked = "", False
    for token, flag in zip(rendered.completions[i], rendered.trained[i], strict=True):
        out += renderer.decode([token]) if flag else ("" if masked else "|")
        masked = not flag
    return out


@pytest.mark.parametrize(("front", "back"), [("<s>", ""), ("<s>", "</s>"), ("", "</s>"), ("", "")])
def test_plain_rows_keep_only_the_special_tokens_in_front(make_renderer, front, back):
    renderer = make_renderer(front=front, back=back)
    [rendered] = renderer.render([Example("one day", [" the crab", " a fish"])])
    assert pieces(renderer, rendered) == (f"{front}one day", " the crab</s>")
    assert pieces(renderer, rendered, 1) == (f"{front}one day", " a fish</s>")
    assert rendered.trained == [None, None]
    assert not rendered.boundary_merged


def test_text_that_brings_its_own_bos_and_eos_gets_no_second(make_renderer):
    renderer = make_renderer()
    [rendered] = renderer.render([Example("<s>one day", [" the crab</s>", " a fish</s>\n</s>"])])
    assert pieces(renderer, rendered) == ("<s>one day", " the crab</s>")
    assert pieces(renderer, rendered, 1)[1] == " a fish</s>"


def test_a_merge_across_the_border_moves_it_for_the_whole_group(make_renderer):
    renderer = make_renderer()
    token = {text: renderer.tokenizer([text], add_special_tokens=False)["input_ids"][0] for text in ("th", "the")}
    assert len(token["the"]) == 1  # trained into the vocabulary, so "th" + "e" merge
    [rendered] = renderer.render([Example("one th", ["e fish", "is fish"])])
    assert pieces(renderer, rendered) == ("<s>one", " the fish</s>")
    assert pieces(renderer, rendered, 1) == ("<s>one", " this fish</s>")
    assert rendered.boundary_merged


def test_text_rows_train_all_but_the_first_token(make_renderer):
    with_bos, without = make_renderer(), make_renderer(front="")
    [rendered] = with_bos.render([Example("", ["fish"])])
    assert pieces(with_bos, rendered) == ("<s>", "fish</s>")
    [rendered] = without.render([Example("", ["fish"])])
    assert len(rendered.prompt) == 1
    assert "".join(pieces(without, rendered)) == "fish</s>"


def test_completions_without_a_common_first_token_need_a_prompt(make_renderer):
    [bad] = make_renderer(front="").render([Example("", ["crab", "fish"])])
    assert isinstance(bad, BadRow)
    assert bad.reason == "malformed"


@pytest.mark.parametrize(
    ("template", "stop", "bos", "prompt", "completion"),
    [
        (CHATML, ("<|im_end|>",), None, CHATML_PROMPT, "yes<|im_end|>"),
        (LLAMA, ("<|eot|>",), "<|begin|>", LLAMA_PROMPT, "yes<|eot|>"),
        (GEMMA, ("<end>",), "<bos>", "<bos><turn>user\nhello<end>\n<turn>model\n", "yes<end>"),
        (THINKING, ("<|im_end|>",), None, CHATML_PROMPT, "yes<|im_end|>"),
        (PLAIN, ("</s>",), "<s>", "user: hello\n\nassistant:", " yes\n\n</s>"),
    ],
)
def test_template_families(make_renderer, template, stop, bos, prompt, completion):
    renderer = make_renderer(template, stop=stop, bos=bos)
    [rendered] = renderer.render([Example(USER, [[says("yes")]])])
    assert pieces(renderer, rendered) == (prompt, completion)
    assert rendered.trained == [None]
    assert sum(token in renderer.stop_ids for token in rendered.completions[0]) == 1


def test_prompt_alone_ends_where_the_assistant_speaks(make_renderer):
    renderer = make_renderer(CHATML, stop=("<|im_end|>",))
    [rendered] = renderer.render([Example(USER)])
    assert renderer.decode(rendered.prompt).endswith("<|im_start|>assistant\n")
    assert rendered.completions == []


def test_end_of_text_is_appended_when_only_another_token_closes_the_turn(make_renderer):
    renderer = make_renderer(CHATML, stop=("</s>",))
    [rendered] = renderer.render([Example(USER, [[says("yes")]])])
    assert pieces(renderer, rendered)[1] == "yes<|im_end|>\n</s>"
    both = make_renderer(CHATML, stop=("</s>", "<|im_end|>"))
    [rendered] = both.render([Example(USER, [[says("yes")]])])
    assert pieces(both, rendered)[1] == "yes<|im_end|>"


def test_only_assistant_turns_are_trained_with_their_end_marks(make_renderer):
    renderer = make_renderer(CHATML, stop=("<|im_end|>",))
    [rendered] = renderer.render([Example(USER, [[says("one"), says("two", "user"), says("three")]])])
    assert trained_text(renderer, rendered) == "one<|im_end|>|three<|im_end|>"
    assert rendered.turns_rewritten == 0


def test_the_appended_stop_is_trained_after_a_last_turn_without_one(make_renderer):
    renderer = make_renderer(PLAIN)
    [rendered] = renderer.render([Example(USER, [[says("one"), says("two", "user"), says("three")]])])
    assert trained_text(renderer, rendered).replace("\n", "") == " one| three</s>"
    assert pieces(renderer, rendered)[1] == " one\n\nuser: two\n\nassistant: three\n\n</s>"


def test_turns_the_template_rewrites_are_context_only(make_renderer):
    renderer = make_renderer(THINKING, stop=("<|im_end|>",))
    turns = [says("hm</think>one"), says("two", "user"), says("so</think>three")]
    [rendered] = renderer.render([Example(USER, [turns])])
    assert trained_text(renderer, rendered) == "|so</think>three<|im_end|>"
    assert "hm" not in pieces(renderer, rendered)[1]
    assert rendered.turns_rewritten == 1


def test_a_template_may_refuse_a_row(make_renderer):
    renderer = make_renderer(GEMMA, stop=("<end>",), bos="<bos>")
    good, bad = renderer.render(
        [Example(USER, [[says("yes")]]), Example([says("be kind", "system"), *USER], [[says("yes")]])]
    )
    assert isinstance(good, Rendered)
    assert (bad.reason, bad.note) == ("refused by template", "System role not supported")


def test_tools_and_options_reach_the_template(make_renderer):
    template = "{{ tools[0].name }} {{ mood }} {% for m in messages %}{{ m.content }}{% endfor %}"
    example = Example(USER, [[says(" yes")]], tools=[{"name": "search"}], template_options={"mood": "calm"})
    renderer = make_renderer(template)
    [rendered] = renderer.render([example])
    assert pieces(renderer, rendered) == ("search calm hello", " yes</s>")


def test_the_tokenizers_own_template_serves_when_none_is_given(make_renderer):
    renderer = make_renderer(stop=("<|im_end|>",))
    with pytest.raises(DataError, match=r"model\.chat_template: FILE"):
        renderer.render([Example(USER, [[says("yes")]])])
    renderer.tokenizer.chat_template = CHATML
    [rendered] = renderer.render([Example(USER, [[says("yes")]])])
    assert pieces(renderer, rendered)[1] == "yes<|im_end|>"


def test_double_bos_is_refused(make_renderer):
    with pytest.raises(DataError, match="beginning-of-text token twice"):
        make_renderer("<|begin|>" + LLAMA, stop=("<|eot|>",), bos="<|begin|>").render([Example(USER)])


def test_a_template_that_forgets_its_prompt_is_refused(make_renderer):
    template = "{% if add_generation_prompt %}please answer: {% endif %}{{ messages[-1].content }}"
    with pytest.raises(DataError, match="does not extend its prompt"):
        make_renderer(template).render([Example(USER, [[says("yes")]])])


def test_common_length():
    assert common_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_length([1, 2], [1, 2, 4]) == 2
    assert common_length([], [1]) == 0
    assert common_length([2], [1]) == 0


def test_a_text_without_tokens_is_no_row(make_renderer):
    [bad] = make_renderer(front="").render([Example("", [""])])
    assert isinstance(bad, BadRow)
    assert bad.reason == "empty completion"
