"""URPO: three tasks in one GRPO, what each counts, and that nobody asks the referee before it has earned it."""

import json

import pytest
import torch
import yaml
from pydantic import ValidationError

from alignkit import testing
from alignkit.algorithms.grpo import GRPO, GRPOConfig
from alignkit.algorithms.urpo import TASKS, URPO, URPOConfig
from alignkit.core import Completion, Group
from alignkit.core.config import CombineConfig
from alignkit.core.contracts import RolloutFacts
from alignkit.core.errors import DataError, RecipeError
from alignkit.dist.world import LocalWorld
from alignkit.recipe import dump_recipe, load_recipe
from alignkit.rollout.models import RunModels
from alignkit.run import resume, train
from tests.algorithms.fakes import averages, reduce_terms
from tests.algorithms.rounds import round_of, said

REWARDS = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.3, 0.9, 0.2, 0.2])
GROUPS = torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])


def urpo(**keys) -> URPO:
    return URPO(URPOConfig(name="urpo", **keys))


def group(task, name="row") -> Group:
    return Group(name, [], [1], [Completion("a", [5], reward=1.0)], {} if task is None else {"task": task})


def round_with(*tasks: str, rewards=REWARDS):
    """Two groups of four answers, one task each."""
    numbers = torch.tensor([float(TASKS.index(task)) for task in tasks]).repeat_interleave(4)
    draw = torch.Generator().manual_seed(0)
    logps = -torch.rand(MASK.shape, generator=draw) * MASK
    columns = {"policy__logps": logps, "reference__logps": logps - 0.1 * MASK, "behaviour__weight": torch.ones(8, 3)}
    batch = round_of(MASK, reward=rewards, group=GROUPS, ended=torch.ones(8), task=numbers, **columns)
    leaf = (logps + 0.05 * torch.randn(MASK.shape, generator=draw) * MASK).requires_grad_()
    return batch, leaf


def gradient(algorithm, batch, leaf):
    batch = algorithm.annotate(batch, LocalWorld())
    leaf.grad = None
    loss = reduce_terms(algorithm.loss(said(leaf), batch)[0], batch)
    loss.backward()
    return float(loss.detach()), leaf.grad.clone()


def test_verifiable_rows_alone_are_grpo_bit_for_bit():
    batch, leaf = round_with("verifiable", "verifiable")
    expected = gradient(GRPO(GRPOConfig(name="grpo")), batch, leaf)
    found = gradient(urpo(), batch, leaf)
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])


def test_groups_are_compared_with_themselves_so_that_the_scale_of_a_task_says_nothing():
    batch, _ = round_with("verifiable", "preference")
    scaled, _ = round_with("verifiable", "preference", rewards=REWARDS * torch.tensor([1.0] * 4 + [50.0] * 4))
    method = urpo(advantage_eps=0)
    torch.testing.assert_close(
        method.annotate(batch, LocalWorld())["advantage"], method.annotate(scaled, LocalWorld())["advantage"]
    )
    with pytest.raises(ValidationError, match="batch_std: rewards of different tasks have different scales"):
        urpo(advantage="batch_std")
    assert not urpo().needs.vector


def test_the_weight_of_a_task_multiplies_its_share_of_the_loss():
    batch, leaf = round_with("verifiable", "preference")
    keys = {"beta": 0.0}
    both, plain = (gradient(urpo(task_weights=w, **keys), batch, leaf)[1] for w in ({"preference": 0.25}, {}))
    assert torch.equal(both[:4], plain[:4])
    torch.testing.assert_close(both[4:], plain[4:] * 0.25)
    assert plain[4:].abs().max() > 0


def test_units_carry_their_task_and_rows_without_one_are_verifiable():
    units = urpo().build([group(None), group("open"), group("preference")])
    assert [unit[0].scalar["task"] for unit in units] == [0, 2, 1]
    with pytest.raises(DataError, match="row 'row': its task is 'chat', expected verifiable, preference, open"):
        urpo().prepare([group("chat")])


def test_open_prompts_wait_for_the_referee_and_then_count_more_with_every_step():
    method, told = urpo(min_referee_acc=0.6, ramp_steps=4, referee_average=0.5, task_weights={"open": 0.8}), []
    assert not method.admits(group("open"))
    assert method.admits(group("preference"))
    for accuracy in (0.5, None, 0.66, 0.66, 0.4, 0.4, None, 0.4):  # 0.5, 0.5, 0.58, 0.62 and then no way back
        method.observe({} if accuracy is None else {"rewards/referee_rank/accuracy": accuracy})
        told.append(method.weight("open"))
    assert told == pytest.approx([0, 0, 0, 0.2, 0.4, 0.6, 0.8, 0.8])
    assert method.admits(group("open"))
    assert (method.weight("verifiable"), method.weight("preference")) == (1, 1)


def test_its_state_is_saved_and_measuring_leaves_it():
    method = urpo(ramp_steps=4)
    for _ in range(9):
        method.observe({"rewards/referee_rank/accuracy": 0.9})
    other = urpo(ramp_steps=4)
    other.load_state_dict(json.loads(json.dumps(method.state_dict())))
    assert other.weight("open") == method.weight("open") > 0
    before = method.state_dict()
    method.annotate_held_out(round_with("open", "open")[0], LocalWorld())
    assert method.state_dict() == before


def test_without_waiting_they_count_from_the_start():
    method = urpo(min_referee_acc=0, ramp_steps=0)
    assert method.weight("open") == 1
    assert not urpo(min_referee_acc=0, ramp_steps=0, task_weights={"open": 0}).admits(group("open"))


@pytest.mark.parametrize(
    ("keys", "tasks", "rewards", "message"),
    [
        ({}, ["open"], ["referee_rank"], "no preference row can tell"),
        ({"task_weights": {"preference": 0}}, ["open", "preference"], ["referee_rank"], "no preference row can tell"),
        ({}, ["open", "preference"], ["ranks"], "no reward is called 'referee_rank'.*there are ranks"),
        ({"referee": "ranks"}, ["open", "preference"], ["ranks"], None),
        ({"min_referee_acc": 0}, ["open"], ["x"], None),
        ({"task_weights": {"open": 0}}, ["open"], ["x"], None),
        ({}, ["verifiable", "preference"], ["x"], None),
    ],
)
def test_nobody_waits_for_what_nothing_measures(keys, tasks, rewards, message):
    method = urpo(**keys)
    method.take_facts(RolloutFacts(4, 8, dict.fromkeys(rewards, 1.0), CombineConfig()))
    rows = [group(task) for task in tasks]
    if message is None:
        method.prepare(rows)
        return
    with pytest.raises(RecipeError, match=message):
        method.prepare(rows)


def test_metrics_by_task():
    batch, leaf = round_with("preference", "open")
    method = urpo(min_referee_acc=0, ramp_steps=2)
    method.observe({"rewards/referee_rank/accuracy": 1.0})
    batch = method.annotate(batch, LocalWorld())
    found = method.loss(said(leaf), batch)[1]
    assert float(found["tasks/verifiable/reward"].count) == 0
    logged = averages({name: metric for name, metric in found.items() if float(torch.as_tensor(metric.count))})
    assert logged["tasks/preference/reward"] == pytest.approx(0.75)
    assert logged["tasks/open/reward"] == pytest.approx(0.4)
    assert logged["tasks/open/length"] == pytest.approx(9 / 4)
    assert logged["tasks/open/weight"] == pytest.approx(0.5)
    assert logged["referee/running_accuracy"] == pytest.approx(0.55)


# In a run


class MixedBench(testing.Bench):
    """All three tasks, judged by the toy model itself."""

    def recipe(self, run, **settings):
        """The toy recipe on as many rows of each task."""
        recipe = yaml.safe_load(dump_recipe(super().recipe(run, **settings)))
        form = {"template": str(self.folder / "judge.txt"), "labels": ["A", "b"]}
        (self.folder / "judge.txt").write_text("{prompt} {first} {second}")
        pairs = [{"prompt": row["prompt"], "completions": ["LOUD", "low"], "scores": [1.0, 0.0]} for row in self.rows]
        path = self.folder / "pairs.jsonl"
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        plain = recipe["data"][0]
        recipe["data"] = [
            {**plain, "fields": {"task": "=verifiable"}},
            {**plain, "fields": {"task": "=open"}},
            {"path": str(path), "operations": [{"name": "referee", **form}]},
        ]
        recipe["rewards"] = [
            {**recipe["rewards"][0], "when": "verifiable"},
            {"name": "referee_rank", "when": "preference", "args": form},
            {"name": "self_referee", "when": "open", "args": {**form, "votes": 1, "max_tokens": 1, "temperature": 1}},
        ]
        recipe["combine"] = {"route": "task"}
        return load_recipe(recipe)


@pytest.fixture
def asked(monkeypatch):
    """Every prompt that models of a run are asked."""
    prompts, generate = [], RunModels.generate

    def noted(self, texts, *args, **keys):
        prompts.extend(texts)
        return generate(self, texts, *args, **keys)

    monkeypatch.setattr(RunModels, "generate", noted)
    return prompts


def mixed(tmp_path, **config):
    """What four steps of a run on all tasks log."""
    train(MixedBench("urpo", config=config, folder=tmp_path).recipe("run", max_steps=4), quiet=True, report=False)
    return testing.read_metrics(tmp_path / "run")


def test_nothing_is_judged_while_open_prompts_count_nothing(tmp_path, asked):
    logged = mixed(tmp_path, task_weights={"open": 0})
    assert not asked
    assert not any("tasks/open/reward" in record for record in logged)
    assert any("tasks/preference/reward" in record for record in logged)


def test_open_prompts_join_once_the_referee_is_right_often_enough(tmp_path, asked):
    logged = mixed(tmp_path, min_referee_acc=0.4, ramp_steps=2)
    assert [record.get("tasks/open/weight", 0.0) for record in logged] == [0, 0.5, 1, 1]
    assert asked


def test_it_resumes_with_the_referee_where_it_was(tmp_path):
    bench = MixedBench("urpo", config={"min_referee_acc": 0.4, "ramp_steps": 8}, folder=tmp_path)
    settings = {"max_steps": 4, "save_steps": 2}
    whole = train(bench.recipe("whole", **settings), quiet=True, report=False).folder
    recipe = bench.recipe("killed", **settings)
    with testing.killed_at(4), pytest.raises(testing.Killed):
        train(recipe, quiet=True, report=False)
    killed = resume(recipe.output_dir, quiet=True, report=False).folder
    assert testing.digest(killed) == testing.digest(whole)
    assert testing.comparable_metrics(killed) == testing.comparable_metrics(whole)
