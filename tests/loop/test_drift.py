"""Rounds of given numbers: what is measured, what rules do, and what is written down, on any number of ranks."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alignkit.algorithms.dpo import DPO
from alignkit.core import Completion, Group
from alignkit.core.errors import DataError, RecipeError
from alignkit.core.types import Metric, Row, Score
from alignkit.dist.world import LocalWorld
from alignkit.loop.config import DriftConfig, EvalConfig, TrainConfig
from alignkit.loop.drift import Drift, labelled_pairs, told_group
from alignkit.loop.evaluate import Evaluator
from alignkit.loop.optim import build_optimizer, build_scheduler
from alignkit.loop.round import Progress
from alignkit.plan import check
from alignkit.recipe import load_recipe
from alignkit.run import train
from alignkit.testing import Bench, read_metrics, toy_rows, train_in_processes, weight_difference
from alignkit.track.folder import read_lines, read_run
from alignkit.track.metrics import values
from alignkit.track.rounds import rounds_section
from alignkit.track.sinks import JsonlSink
from tests.algorithms.rounds import on_ranks

LABELS = 5


class Policy:
    """One weight."""

    def __init__(self):
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def weights(self):
        return {"w": self.weight.detach().clone()}

    def set_weights(self, weights):
        with torch.no_grad():
            self.weight.copy_(weights["w"])


class Watched:
    """A `Drift` and everything around it. `likes`: what the judge says of an answer, `nats` of each of its tokens."""

    def __init__(self, *rules, world=None, labels=(), file=None):
        self.likes, self.nats = (lambda text: float(len(text))), -1.0
        self.said, self.records = [], []
        self.policy, self.progress = Policy(), Progress(10, 100)
        config = TrainConfig(learning_rate=1.0, lr_scheduler="linear")
        self.optimizer = build_optimizer([self.policy.weight], config)
        self.scheduler = build_scheduler(self.optimizer, config, 100)
        self.rollouts = SimpleNamespace(
            world=world or LocalWorld(), score=self.score, places={}, say=self.said.append, version=None
        )
        track = SimpleNamespace(flush=lambda: None, log=self.records.append)
        models = SimpleNamespace(logps=lambda units: [[self.nats] * sum(row.trained) for (row,) in units])
        config = DriftConfig.model_validate({"labels": [{"path": "x"}] if labels else [], "rules": list(rules)})
        self.drift = Drift(
            config, self.rollouts, self.policy, models, self.progress, self.scheduler, track, list(labels), file
        )

    def score(self, groups, version):
        self.rollouts.version = version
        for group in groups:
            for completion in group.completions:
                completion.reward = self.likes(completion.text)
        return groups

    def round(self, groups=None, units=None, news=None):
        """One round; what is logged of it, and the units that are left."""
        groups = [written(["abc", "ab"])] if groups is None else groups
        units = [pair(group) for group in groups] if units is None else units
        self.rollouts.places |= {group.id: int(group.id.partition("-")[2]) for group in groups}
        news = {} if news is None else news
        left = self.drift.admit(len(self.drift._rounds), groups, units, news)
        return values(news), left

    def learn(self, steps=1):
        """What a round of updates does to the weight, the schedule and the counter."""
        with torch.no_grad():
            self.policy.weight += steps
        for _ in range(steps):
            self.optimizer.step()
            self.scheduler.step()
        self.progress.step += steps


def written(texts, name="g-0", **scores):
    """A group of answers of a token a letter, the first of which the judge likes best."""
    answers = [
        Completion(
            text,
            [ord(letter) for letter in text],
            reward=-float(i),
            version=0,
            scores={name.replace("__", "/"): Score(found[i]) for name, found in scores.items()},
        )
        for i, text in enumerate(texts)
    ]
    return Group(name, [{"role": "user", "content": f"of {name}"}], [1, 2], answers)


def pair(group, **scalar):
    return tuple(group.row(completion, **scalar) for completion in group.completions[:2])


def label(i, chosen="good", rejected="bad"):
    return Group(f"l{i}", [], [1], [Completion(chosen, [5] * 4), Completion(rejected, [6] * 2)])


def test_lengths_and_variety_by_hand():
    watched = Watched()
    first, _ = watched.round([written(["abcd", "ab", "abcd"]), written(["xy", "xyzxyzxy"], "g-1")])
    assert first == {
        "round": 0.0,
        "drift/mean_length": 20 / 5,
        "drift/distinct_trigrams": (2 / 4 + 3 / 6) / 2,
        "drift/selected_length_ratio": (4 + 2) / (2 + 8),
        "drift/length_ratio": 1.0,
        "drift/distinct_ratio": 1.0,
    }
    second, _ = watched.round([written(["abcdefgh", "ab"])])
    assert (second["round"], second["drift/length_ratio"]) == (1.0, 5 / 4)
    assert second["drift/distinct_ratio"] == 1.0 / 0.5


def test_answers_of_the_data_have_no_part_in_lengths():
    group = written(["abcd"])
    group.completions.append(Completion("x" * 90, [7] * 90))
    assert Watched().round([group])[0]["drift/mean_length"] == 4.0


def test_units_of_one_row_have_no_ratio():
    group = written(["abcd", "ab"])
    found, left = Watched().round([group], [(group.row(group.completions[0]),)])
    assert "drift/selected_length_ratio" not in found
    assert len(left) == 1


def test_the_judge_is_held_to_labels_and_to_itself():
    """Of five pairs one is tied and one unscored; then one turns, and the unscored one comes in."""
    watched = Watched(labels=[label(i, chosen=f"good{i}", rejected=f"bad{i}") for i in range(LABELS)])
    opinions = {"good0": 1, "bad0": 0, "good1": 1, "bad1": 0, "good2": 0, "bad2": 1, "good3": 2, "bad3": 2, "good4": 1}
    watched.likes = lambda text: float(opinions.get(text, "nan"))
    watched.progress.step = 7
    first, _ = watched.round()
    assert watched.rollouts.version == 7
    assert first["drift/judge_accuracy"] == (1 + 1 + 0 + 0.5) / 4
    assert "drift/agreement" not in first
    assert (first["drift/chosen_logps"], first["drift/chosen_logps_change"]) == (-1.0, 0.0)
    opinions |= {"good1": -1, "bad4": 0}
    watched.nats = -1.25
    second, _ = watched.round()
    assert second["drift/judge_accuracy"] == (1 + 0 + 0 + 0.5 + 1) / 5
    assert second["drift/agreement"] == 3 / 4
    assert (second["drift/chosen_logps"], second["drift/chosen_logps_change"]) == (-1.25, -0.25)


def test_without_labels_a_reward_is_compared_with_what_it_was():
    """τ of 3 answers with one pair turned round is 1/3; what transforms made of a reward is not what was said."""
    same = written(["a", "b"], "g-0", implicit=[1.0, 2.0], implicit__previous=[5.0, 9.0])
    turned = written(["a", "b", "c"], "g-1", implicit=[1.0, 2.0, 3.0], implicit__previous=[1.0, 3.0, 2.0])
    capped = written(["a", "b"], "g-2", implicit=[1.0, 1.0], implicit__raw=[1.0, 2.0], implicit__previous=[2.0, 1.0])
    watched = Watched()
    assert "drift/agreement" not in watched.round([same, turned, capped])[0], "there was no round before"
    found, _ = watched.round([same, turned, capped])
    assert found["drift/agreement"] == pytest.approx((1 + (1 + 1 / 3) / 2 + 0) / 3)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_agree_with_one_process(size, tmp_path):
    """The same numbers logged once, the same lines in the order of the round, though a rank has no group."""
    labels = [label(i, chosen="good" * (i + 1), rejected="bad" * 2) for i in range(LABELS)]
    groups = [
        written(["abc" * (i + 1), "ab"], f"g-{i}", x=[1.0, 2.0], x__previous=[0.0, float(i)]) for i in range(size - 1)
    ]

    def rounds(rank, world):
        file = JsonlSink(tmp_path / f"{world.size}.jsonl") if rank == 0 else None
        watched = Watched({"metric": "reward", "above": 5, "action": "stop"}, world=world, labels=labels, file=file)
        found = []
        for reward in (1.0, 9.0):
            mine = [replace(group) for group in groups[rank :: world.size]]
            left = watched.round(mine, news={"reward": Metric(reward * len(mine), float(len(mine)))})
            found.append((left, watched.records[:], watched.said))
        return found

    (alone,) = on_ranks(rounds, [0])
    together = on_ranks(rounds, range(size))
    for ranks in together:
        assert ranks[1][1] == alone[1][1], "every rank knows what ended the run"
        assert ranks[1][2] == alone[1][2]
    own = {"reward"}
    assert {name: x for name, x in together[0][0][0][0].items() if name not in own} == {
        name: x for name, x in alone[0][0][0].items() if name not in own
    }
    assert all(set(ranks[0][0][0]) <= own for ranks in together[1:]), "logged by the first rank alone"
    assert (tmp_path / f"{size}.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("bound", "numbers", "broken"),
    [
        ({"below": 0.5}, [0.6, 0.5, 0.4], [False, False, True]),
        ({"above": 0.5}, [0.6, 0.5], [True, False]),
        ({"falls_by": 0.25}, [0.5, 1.0, 0.75, 0.5, 0.75], [False, False, False, True, False]),
        ({"rises_by": 0.25}, [1.0, 0.5, 0.75, 1.0], [False, False, False, True]),
    ],
)
def test_bounds_by_hand(bound, numbers, broken):
    watched = Watched({"metric": "reward", **bound, "action": "damp"})
    told = []
    for value in numbers:
        before = len(watched.said)
        watched.round(news={"reward": Metric(value, 1.0)})
        told.append(len(watched.said) > before)
    assert told == broken


def test_what_is_said_has_the_numbers():
    watched = Watched({"metric": "reward", "falls_by": 0.25, "action": "stop"})
    watched.round(news={"reward": Metric(1.0, 1.0)})
    watched.progress.step = 4
    watched.round(news={"reward": Metric(0.5, 1.0)})
    assert watched.said == [
        "drift, round 1 after step 4: reward is 0.5, more than 0.25 below the 1 of an earlier round: the run ends "
        "before it learns from this round"
    ]


def test_damping_lasts_and_survives_a_resume():
    """Rates follow their schedule, multiplied, from the very next step on."""
    rule = {"metric": "reward", "above": 0, "action": "damp", "factor": 0.5}
    watched = Watched(rule)
    watched.learn(10)
    watched.round(news={"reward": Metric(1.0, 1.0)})
    assert watched.optimizer.param_groups[0]["lr"] == watched.scheduler.get_last_lr()[0] == 0.9 / 2
    state = watched.scheduler.state_dict(), watched.optimizer.state_dict(), watched.drift.state_dict()
    resumed = Watched(rule)
    resumed.scheduler.load_state_dict(state[0])
    resumed.optimizer.load_state_dict(state[1])
    resumed.drift.load_state_dict(state[2])
    for one in (watched, resumed):
        one.learn(10)
        assert one.optimizer.param_groups[0]["lr"] == pytest.approx(0.8 / 2)
        one.round(news={"reward": Metric(1.0, 1.0)})
        assert one.scheduler.get_last_lr()[0] == pytest.approx(0.8 / 4)


def test_a_stopped_run_logs_what_ended_it_and_learns_nothing():
    watched = Watched({"metric": "reward", "below": 0, "action": "stop"})
    watched.round(news={"reward": Metric(1.0, 1.0)})
    watched.learn(3)
    news, left = watched.round(news={"reward": Metric(-1.0, 1.0)})
    assert (left, watched.drift.ended, watched.progress.step, watched.progress.total_steps) == ([], True, 3, 3)
    (record,) = watched.records
    assert (record["step"], record["round"], record["reward"]) == (3, 1.0, -1.0)
    assert "drift/length_ratio" in record
    assert news == {"reward": -1.0}, "no step logs it"
    assert list(watched.progress.rounds()) == []


def test_going_back_takes_the_weights_of_the_round_before():
    rule = {"metric": "reward", "falls_by": 1.0, "action": "rollback"}
    watched = Watched(rule)
    for reward in (1.0, 2.0, 3.0):
        watched.round(news={"reward": Metric(reward, 1.0)})
        watched.learn(1)
    resumed = Watched(rule)
    resumed.drift.load_state_dict(watched.drift.state_dict())
    resumed.policy.set_weights(watched.policy.weights())
    resumed.progress.load_state_dict(watched.progress.state_dict())
    for one in (watched, resumed):
        assert one.policy.weights()["w"] == 3.0
        assert one.round(news={"reward": Metric(1.5, 1.0)})[1] == []
        assert one.policy.weights()["w"] == 2.0, "with which the third round began"
        assert one.records[0]["step"] == 3
        assert (one.progress.step, one.progress.total_steps) == (4, 4), "other weights have another version"


def test_there_is_nothing_to_go_back_to_in_the_first_round():
    watched = Watched({"metric": "reward", "below": 0, "action": "rollback"})
    assert watched.round(news={"reward": Metric(-1.0, 1.0)})[1] == []
    assert (watched.progress.step, watched.progress.total_steps) == (0, 0)


def test_weights_are_kept_only_for_a_rule_that_goes_back():
    watched = Watched({"metric": "reward", "below": 0, "action": "stop"})
    watched.round(news={"reward": Metric(1.0, 1.0)})
    assert watched.drift.state_dict()["began"] is None


def test_a_number_that_rounds_do_not_have_is_refused_with_those_they_do():
    watched = Watched({"metric": "drift/mean_lenght", "above": 2, "action": "stop"})
    with pytest.raises(
        RecipeError, match=r"drift\.rules\.0\.metric.*did you mean 'drift/mean_length'.*, reward\."
    ) as e:
        watched.round(news={"reward": Metric(1.0, 1.0)})
    assert "drift/agreement" not in str(e.value), "nothing here tells it"


@pytest.mark.parametrize("told", [{"labels": [label(0)]}, {"scores": {"x": [1.0, 2.0], "x__previous": [1.0, 2.0]}}])
def test_agreement_may_be_asked_for_before_there_is_any(told):
    watched = Watched({"metric": "drift/agreement", "below": 2, "action": "stop"}, labels=told.get("labels", ()))
    groups = [written(["ab", "a"], **told.get("scores", {}))]
    assert watched.round(groups)[1] != []
    assert watched.round(groups)[1] == []


def test_a_first_round_without_pairs_does_not_rule_out_their_ratio():
    rule = {"metric": "drift/selected_length_ratio", "above": 1.0, "action": "stop"}
    watched = Watched(rule)
    watched.round(units=[])
    assert watched.round()[1] == []
    group = written(["abc"])
    with pytest.raises(RecipeError, match="selected_length_ratio"):
        Watched(rule).round([group], [(group.row(group.completions[0]),)])


def test_a_round_without_groups_is_none():
    watched = Watched({"metric": "reward", "above": 0, "action": "stop"})
    assert watched.round([], []) == ({}, [])
    assert watched.drift._rounds == []


def test_a_line_says_which_answers_are_learned_from():
    """Equal answers are told apart, rows that are none left out, and nan is nothing."""
    group = written(["ab", "c", "ab"], implicit=[1.0, float("nan"), 3.0])
    group.completions[1].reward = float("nan")
    group.completions[1].scores["implicit"].valid = False
    first, _, again = group.completions
    other = Row([1, 9], [False, True], group="g-0")
    units = [
        (group.row(first, weight=0.5), group.row(again, weight=0.25)),
        (group.row(group.completions[1]), other),
    ]
    line = told_group(group, units)
    assert line["pairs"] == [[0, 2], [1]]
    assert line["scalars"] == [{"weight": [0.5, 0.25]}, {}]
    assert line["prompt"] == "of g-0"
    assert line["completions"][1] == {"text": "c", "reward": None, "scores": {}}
    assert line["completions"][2] == {"text": "ab", "reward": -2.0, "scores": {"implicit": 3.0}}
    json.dumps(line, allow_nan=False)


def test_labels_are_the_ends_of_what_the_data_prefers():
    ranked = Group("r", [], [1], [Completion(t, [1], reward=r) for t, r in (("b", 1.0), ("c", -1.0), ("a", 2.0))])
    (found,) = labelled_pairs([ranked, ranked], limit=1)
    assert [completion.text for completion in found.completions] == ["a", "c"]
    assert all(completion.reward != completion.reward for completion in found.completions)
    for rewards in ([1.0, 1.0], [1.0], [float("nan"), 1.0]):
        plain = Group("p", [], [1], [Completion("a", [1], reward=reward) for reward in rewards])
        with pytest.raises(DataError, match=r"drift\.labels: .*row 'p'"):
            labelled_pairs([plain], limit=9)


MINIMAL = {
    "output_dir": "x",
    "model": {"name_or_path": "owner/model"},
    "data": [{"path": "owner/prompts"}],
    "algorithm": {"name": "self_rewarding"},
}
RULE = {"metric": "reward", "action": "stop"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"drift": {"rules": [RULE]}}, "one bound of below, above, falls_by, rises_by; it has none"),
        ({"drift": {"rules": [{**RULE, "below": 1, "rises_by": 1}]}}, "it has below and rises_by"),
        ({"drift": {"rules": [{**RULE, "below": 1, "factor": 0.1}]}}, "`factor` is of action: damp"),
        ({"drift": {"rules": [{**RULE, "below": 1, "metric": "drift/judge_accuracy"}]}}, "give `labels`"),
        ({"drift": {"num_labels": 3}, "algorithm": {"name": "dpo"}}, "dpo has no rounds to compare; remove the block"),
    ],
)
def test_mistakes_in_the_recipe(change, said):
    with pytest.raises(RecipeError, match="drift") as caught:
        load_recipe({**MINIMAL, **change})
    assert said in str(caught.value)


def test_the_plan_tells_the_rules():
    rules = [{"metric": "reward", "falls_by": 0.1, "action": "stop"}, {"metric": "x", "above": 2, "action": "damp"}]
    said = check(load_recipe({**MINIMAL, "drift": {"rules": rules}}))
    assert [" ".join(line.split()) for line in said if line.startswith("drift")] == [
        "drift stop where reward falls by 0.1",
        "drift damp by 0.5 where x above 2",
    ]


def test_evaluation_may_go_by_the_round():
    def due(step, spent, **config):
        evaluator = SimpleNamespace(_groups=[1], _config=EvalConfig(data=[{"path": "x"}], **config))
        return Evaluator.due(evaluator, step, spent)

    assert [due(step, step == 3, each_round=True) for step in (1, 2, 3)] == [False, False, True]
    assert [due(step, step == 3, each_round=True, every_steps=2) for step in (1, 2, 3)] == [False, True, True]
    assert not due(3, True)
    assert EvalConfig(data=[{"path": "x"}], each_round=True, best_metric="eval_loss", patience=1).patience == 1


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = Bench("self_rewarding", folder=tmp_path_factory.mktemp("drift"))
    rows = "".join(json.dumps(row) + "\n" for row in toy_rows(DPO, LABELS))
    (made.folder / "labels.jsonl").write_text(rows, encoding="utf-8")
    return made


def recipe(bench, run, *rules, **settings):
    """Rounds of seven prompts and three steps; answers in upper case are preferred by labels and by the judge."""
    made = json.loads(bench.recipe(run, **{"batch_size": 3, **settings}).model_dump_json(by_alias=True))
    made["algorithm"] |= {"prompts_per_round": 7, "rounds": 3}
    made["drift"] = {"labels": [{"path": str(bench.folder / "labels.jsonl")}], "rules": list(rules)}
    return load_recipe(made)


def test_a_run_goes_back_and_ends_well(bench, capsys):
    """In the second round, hence to the weights it started from; the report and the lines say so."""
    back = {"metric": "drift/chosen_logps_change", "above": 1e-9, "action": "rollback"}
    damp = {"metric": "drift/judge_accuracy", "above": 0.99, "action": "damp", "factor": 0.25}
    result = train(recipe(bench, "back", back, damp), report=False)
    records = read_metrics(result.folder)
    assert records[0]["learning_rate"] == 0.25e-3
    assert records[0]["drift/judge_accuracy"] == 1.0
    lines = read_lines(result.folder / "rounds.jsonl")
    assert [line["round"] for line in lines if "metrics" in line] == [0, 1]
    assert [line["judge_version"] for line in lines if "id" in line] == [0] * 7 + [3] * 7
    for line in lines[:7]:
        best, worst = line["pairs"][0]
        rewards = [completion["reward"] for completion in line["completions"]]
        assert (rewards[best], rewards[worst]) == (max(rewards), min(rewards))
    assert [rule["action"] for rule in lines[-1]["rules"]] == ["rollback", "damp"]
    assert result.steps == 4
    assert weight_difference(result.folder, bench.model) == 0.0
    said = capsys.readouterr().out
    assert "drift, round 1 after step 3: drift/chosen_logps_change is" in said
    assert "ended after step 4 by a rule of drift" in said
    (section,) = rounds_section(read_run(result.folder))
    assert "Round 1: drift/chosen_logps_change is" in section


@pytest.mark.distributed
def test_two_processes_see_the_same_rounds(bench):
    rules = [{"metric": "drift/judge_accuracy", "above": 0.99, "action": "damp"}]
    many = recipe(bench, "many", *rules, adam_epsilon=1e-5)
    train_in_processes([many], 2)
    alone = train(many.model_copy(update={"output_dir": f"{many.output_dir}-alone"}), quiet=True, report=False)
    found, expected = (read_lines(Path(folder) / "rounds.jsonl") for folder in (many.output_dir, alone.folder))
    assert len(found) == len(expected) == 3 * 8
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        if "metrics" in one:
            assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-5)
        else:
            assert [one[key] for key in ("id", "pairs", "prompt")] == [other[key] for key in ("id", "pairs", "prompt")]
    assert weight_difference(Path(many.output_dir), alone.folder) < 1e-6
