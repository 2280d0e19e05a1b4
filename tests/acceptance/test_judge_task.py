"""What the judge task measures is what a person would."""

from types import SimpleNamespace

import pytest
import torch

from alignkit.rewards.judges import Judge, JudgeConfig
from tests.acceptance import judge_task, toys
from tests.acceptance.bench import Bench
from tests.acceptance.judge_task import JudgeTask, Opinions


@pytest.fixture
def task(tmp_path):
    task = JudgeTask(Bench(tmp_path, 0))
    task.base = toys.write_model(tmp_path / "base", 1, toys.JUDGE_SYMBOLS)
    return task


def test_the_reward_asks_what_the_warm_up_taught(task):
    judge = Judge(JudgeConfig(**task.judge["args"]))
    texts = {"prompt": "3", "first": "33345444", "second": "34455533"}
    assert judge.template.fill(texts) == toys.judge_prompt(*texts.values())


def test_padding_changes_no_log_probability():
    model, tokenizer = toys.tiny_model(0, toys.JUDGE_SYMBOLS), toys.tiny_tokenizer(toys.JUDGE_SYMBOLS)
    found = judge_task._logps(model, [("3", "345</s>"), (toys.judge_prompt("3", "33", "4"), "1")])
    with torch.no_grad():
        alone = model(torch.tensor([tokenizer("3345").input_ids])).logits[0].log_softmax(-1)
    three, four, five, end = tokenizer("345</s>").input_ids
    assert found[0].item() == pytest.approx((alone[0, three] + alone[1, four] + alone[2, five] + alone[3, end]).item())
    assert found.shape == (2,)


def test_opinions_know_no_order(task, tmp_path):
    run = toys.write_model(tmp_path / "run", 2, toys.JUDGE_SYMBOLS)
    pairs = task.held_out[:60]
    turned = [{**p, "completions": p["completions"][::-1], "scores": p["scores"][::-1]} for p in pairs]
    assert task.opinions(run, pairs) == task.opinions(run, turned)


def test_each_opinion_is_a_share_of_the_pairs(task, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def scripted(model, rows):  # verdicts are right, the run has come to prefer the worse answer, less strongly
        if not rows[0][0].startswith("J"):
            return torch.tensor([-float(text.count(prompt)) * (model == run) for prompt, text in rows])
        better = [first.count(asked[1]) > second.count(asked[1]) for asked, first, second in map(_parts, rows)]
        return torch.tensor(
            [2.0 * (right == (verdict == "1")) for right, (_, verdict) in zip(better, rows, strict=True)]
        )

    monkeypatch.setattr(judge_task, "_logps", scripted)
    monkeypatch.setattr(
        judge_task, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=lambda folder, dtype: folder)
    )
    assert task.opinions(run) == Opinions(judge=1, implicit=0, consensus=1, consistency=0, flips=0)


def test_a_judge_that_goes_by_position_flips_every_time(task, tmp_path, monkeypatch):
    def always_first(model, rows):
        return torch.tensor([float(text == "1") for _, text in rows])

    monkeypatch.setattr(judge_task, "_logps", always_first)
    assert task.opinions(task.base).flips == 1


def _parts(row):
    return row[0].removesuffix("?").split("|")
