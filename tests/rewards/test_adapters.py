"""Functions written for verl and OpenRLHF, as they are."""

import pytest
import torch

from alignkit.core.errors import RecipeError, RunFailed
from alignkit.rewards.adapters import OpenRlhf, OpenRlhfConfig, Verl, VerlConfig, prompt_text
from tests.rewards.test_rules import answers, batch

SEEN = []


def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):
    SEEN.append((data_source, extra_info))
    return float(solution_str == ground_truth) + bonus


def detailed(data_source, solution_str, ground_truth, extra_info=None):
    if not solution_str:
        return {"score": None}
    return {"score": 1.0, "acc": True, "length": len(solution_str), "pred": solution_str}


def broken(data_source, solution_str, ground_truth, extra_info=None):
    return {"acc": 1.0} if solution_str == "b" else float("nan")


def verl(name, **keys):
    return Verl(VerlConfig(function=f"{__name__}:{name}", **keys))


COLUMNS = {"data_source": ["gsm8k", "math"], "ground_truth": ["1", "2"]}


def test_verl_scores_row_by_row():
    SEEN.clear()
    source = verl("compute_score", extra_info="extra_info", kwargs={"bonus": 0.5})
    assert source.requires == ("data_source", "ground_truth", "extra_info")
    assert answers(source, "1", "1", **COLUMNS, extra_info=[{"index": 0}, None]) == [1.5, 0.5]
    assert SEEN == [("gsm8k", {"index": 0}), ("math", None)]


def test_of_verls_dict_numbers_are_components_and_the_rest_a_note():
    output = verl("detailed").score(batch("ab", "", **COLUMNS), None)
    assert output.score.tolist() == [1.0, 0.0]
    assert output.valid.tolist() == [True, False]
    assert {name: values.tolist() for name, values in output.components.items()} == {
        "acc": [1.0, 0.0],
        "length": [2.0, 0.0],
    }
    assert output.info == [{"pred": "ab"}, {}]


@pytest.mark.parametrize(
    ("text", "message"), [("a", r"nan for row 0 \(completion 'a'\)"), ("b", r"'acc': 1.0.* row 0 \(completion 'b'\)")]
)
def test_verl_answers_that_are_none(text, message):
    with pytest.raises(RunFailed, match=message):
        verl("broken").score(batch(text, data_source=["x"], ground_truth=["1"]), None)


def reward_func(queries, prompts, labels):
    rewards = torch.tensor([float(query.endswith(str(label))) for query, label in zip(queries, labels, strict=True)])
    return {"rewards": rewards, "scores": rewards / 2, "extra_logs": {"chars": torch.tensor([len(p) for p in prompts])}}


def plain_rewards(queries, prompts, labels):
    return [len(query) for query in queries]


def no_rewards(queries, prompts, labels):
    return {"scores": [1.0]}


def test_openrlhf_is_called_once_with_texts():
    source = OpenRlhf(OpenRlhfConfig(function=f"{__name__}:reward_func", labels="answer"))
    output = source.score(batch("is 1", "is 2", answer=["1", "1"]), None)
    assert output.score.tolist() == [1.0, 0.0]
    assert {name: values.tolist() for name, values in output.components.items()} == {
        "scores": [0.5, 0.0],
        "chars": [1.0, 1.0],
    }
    assert answers(OpenRlhf(OpenRlhfConfig(function=f"{__name__}:plain_rewards")), "ab") == [3.0]


def test_openrlhf_answers_need_rewards():
    with pytest.raises(RunFailed, match="a dict with scores; expected 'rewards'"):
        OpenRlhf(OpenRlhfConfig(function=f"{__name__}:no_rewards")).score(batch("a"), None)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("compute_score", "expected 'module:function'"),
        (f"{__name__}:SEEN", "is a list; expected a function"),
        (f"{__name__}:compute_scor", "Did you mean 'compute_score'"),
    ],
)
def test_functions_that_are_none(function, message):
    with pytest.raises(RecipeError, match=message):
        Verl(VerlConfig(function=function))


def test_turns_are_divided_by_line_breaks():
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert prompt_text(turns) == "s\nu"
