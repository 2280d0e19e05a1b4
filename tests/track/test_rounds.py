"""Rounds side by side: which record belongs to which round, what is marked as worse, and what rules did."""

import re

import pytest

from alignkit.track.folder import read_run
from alignkit.track.report import write_report
from alignkit.track.rounds import COLUMNS, numbers_of_rounds, rounds_section, told
from tests.track.fake_run import RECIPE, write_lines

GROUP = {"round": 0, "step": 0, "id": "p", "prompt": "", "completions": [], "pairs": [], "scalars": []}
STOP = {"metric": "reward", "value": 0.25, "bound": "falls_by", "limit": 0.5, "against": 1.0, "action": "stop"}


def line(number, step, rules=(), **metrics):
    metrics = {name.replace("__", "/"): value for name, value in metrics.items()}
    return {"round": number, "step": step, "metrics": {"round": float(number), **metrics}, "rules": list(rules)}


def run(folder, rounds, records, rules=False):
    """A run folder of these rounds."""
    folder.mkdir(exist_ok=True)
    asked = "drift: {rules: [{metric: reward, above: 9, action: stop}]}\n" if rules else ""
    (folder / "recipe.resolved.yaml").write_text(RECIPE.format(beta=0.1) + asked)
    write_lines(folder / "rounds.jsonl", rounds)
    write_lines(folder / "metrics.jsonl", records)
    return read_run(folder)


def cells(section, heading):
    return re.findall(r"<td>(.*?)</td>", re.search(rf'<th scope="row">{heading}</th>(.*?)</tr>', section).group(1))


def test_a_record_belongs_to_the_round_that_it_learned_from(tmp_path):
    """A round ends with the step before the next one is written; of its evaluations the last counts."""
    records = [
        {"step": 0, "eval_reward": 9.0},
        {"step": 1, "cream/consistency": 0.5},
        {"step": 2, "cream/consistency": 1.0},
        {"step": 1, "eval_reward": 1.0},
        {"step": 2, "eval_reward": 2.0},
        {"step": 3, "cream/consistency": 0.25, "eval_samples/mean_length": 3.0},
        {"step": 9, "eval_reward": 3.0},
    ]
    found = numbers_of_rounds(run(tmp_path, [GROUP, line(0, 0, reward=0.1), GROUP, line(1, 2, reward=0.2)], records))
    assert found[0] == {"round": 0.0, "reward": 0.1, "consistency": 0.75, "eval_reward": 2.0}
    assert found[1] == {"round": 1.0, "reward": 0.2, "consistency": 0.25, "eval_reward": 3.0}


def test_what_got_worse_is_marked_and_told(tmp_path):
    rounds = [
        line(0, 0, reward=0.1, drift__judge_accuracy=0.8, drift__mean_length=10.0),
        line(1, 4, reward=0.2, drift__judge_accuracy=0.76, drift__mean_length=14.9, drift__agreement=0.9),
        line(2, 8, reward=0.0, drift__judge_accuracy=0.74, drift__mean_length=15.1, drift__agreement=0.9),
    ]
    records = [{"step": 0, "eval_win_rate": 0.5}, {"step": 4, "eval_win_rate": 0.7}, {"step": 8, "eval_win_rate": 0.6}]
    (section,) = rounds_section(run(tmp_path, rounds, records))
    assert cells(section, "start") == ["", "–", "–", "–", "–", "0.5"]
    assert cells(section, "round 0") == ["0", "0.1", "0.8", "–", "10", "0.7"]
    assert cells(section, "round 1") == ["4", "0.2", "0.76", "0.9", "14.9", "0.6 ▼"]
    assert cells(section, "round 2") == ["8", "0", "0.74 ▼", "0.9", "15.1 ▲", "–"]
    worse = "judge accuracy 0.8 → 0.74, length 10 → 15.1, win rate, held out 0.7 → 0.6"
    assert f"Moved the wrong way since its best: {worse}." in section
    assert "No drift rule had to act" not in section


def test_a_run_that_keeps_well_is_told_so(tmp_path):
    rounds = [line(0, 0, drift__judge_accuracy=0.8), line(1, 4, drift__judge_accuracy=0.8)]
    (section,) = rounds_section(run(tmp_path, rounds, [], rules=True))
    assert "Nothing moved the wrong way." in section
    assert "No drift rule had to act." in section
    assert "start" not in section, "nothing was measured before the first round"


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.title)
def test_a_column_knows_its_better_end_and_what_is_a_trifle(column):
    slack = column.slack * (2.0 if column.relative else 1.0)
    earlier = [2.0, 2.0 + column.good * -9]  # of a good end the first is the best
    if not column.good:
        assert not column.lost(-99.0, earlier)
        assert not column.lost(99.0, earlier)
        return
    assert slack > 0
    assert column.best(earlier) == 2.0
    assert column.lost(2.0 - column.good * slack * 1.01, earlier)
    assert not column.lost(2.0 - column.good * slack * 0.99, earlier)
    assert not column.lost(-99.0 * column.good, [])


def test_what_rules_did_is_in_the_report_escaped(tmp_path):
    damp = {**STOP, "metric": "rewards/<b>/mean", "bound": "above", "action": "damp", "factor": 0.5}
    folder = run(tmp_path / "run", [line(0, 0, [damp], reward=1.0), line(1, 4, [STOP], reward=0.25)], []).path
    page = write_report([folder]).read_text()
    assert "<li>Round 0: rewards/&lt;b&gt;/mean is 0.25, above 0.5: the learning rate is multiplied by 0.5" in page
    assert f"<li>Round 1: {told(STOP)}.</li>" in page
    assert told(STOP) == (
        "reward is 0.25, more than 0.5 below the 1 of an earlier round: the run ends before it learns from this round"
    )


def test_a_run_without_rounds_has_no_section(tmp_path):
    assert rounds_section(run(tmp_path, [], [{"step": 1, "loss": 0.5}])) == []
