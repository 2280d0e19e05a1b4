import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from alignkit.core.errors import DataError, RecipeError
from alignkit.track.folder import better, read_run, win_rate
from alignkit.track.plots import Line, draw
from alignkit.track.report import verdict, write_report
from tests.track.fake_run import make_run, samples, write_lines

ONE_RECORD = [{"step": 1, "epoch": 0.1, "loss": 0.69}]  # too few to draw: such a page takes no time
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Checker(HTMLParser):
    """Tags must nest, ids must be unique."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.count = [], [], {}

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    return checker.count


def row(page, heading):
    """The cells of the table row with this heading."""
    return re.findall(r"<td>(.*?)</td>", re.search(rf'<th scope="row">{heading}</th>(.*?)</tr>', page).group(1))


def test_the_page_tells_the_run(run_dir):
    path = write_report([run_dir])
    page = path.read_text()
    assert path == run_dir / "report.html"
    count = checked(page)
    assert count["svg"] == 9
    assert "held-out accuracy 0.52 → 0.9476, held-out loss 0.6931 → 0.313, win rate 0.8125" in page
    assert row(page, "train.lr_scheduler") == ["constant"]
    assert row(page, "rewards/accuracies") == ["training", "0.5", "0.9252", "0.9252 (step 30)"]
    assert row(page, "rewards/chosen")[-1] == "–"
    assert row(page, "num_tokens") == ["run", "", "30000", ""]
    assert row(page, "dropped.empty.count") == ["4"]
    assert '<th scope="col">rows of</th><th scope="col">pairs.jsonl</th>' in page
    assert row(page, "packages.torch") == ["2.13.0"]
    assert "name_or_path: acme/tiny" in page


def test_the_page_is_static_and_loads_nothing(run_dir):
    page = write_report([run_dir]).read_text()
    assert "<script" not in page
    assert not re.search(r"""(?:src|href)=["'](?!#)""", page)
    assert "url(http" not in page
    assert "@import" not in page


def test_equal_folders_give_equal_bytes(tmp_path):
    first, second = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")
    assert write_report([first]).read_bytes() == write_report([second]).read_bytes()
    assert write_report([first]).read_bytes() == (first / "report.html").read_bytes()


def test_the_bytes_do_not_follow_the_users_matplotlib(run_dir):
    import matplotlib

    before = write_report([run_dir]).read_bytes()
    with matplotlib.rc_context({"lines.linewidth": 9, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert write_report([run_dir]).read_bytes() == before


def test_samples_stand_side_by_side_escaped_and_marked(run_dir):
    page = write_report([run_dir]).read_text()
    assert page.count('<article class="sample">') == 12
    assert "4 further prompts are in samples.jsonl" in page
    assert "a &lt;b&gt;dog&lt;/b&gt; number 0." in page
    assert "<b>dog" not in page
    assert "home &amp; slept, says step 0." in page
    assert page.count("before training · valence 0 · scores lower") == 12
    assert page.count("after step 30 · valence 1 · scores higher") == 12
    assert "higher on 12 prompts, equal on 2, lower on 2: win rate 0.8125, 95 % bootstrap interval 0.625 to" in page


def test_unscored_samples_are_shown_without_marks(run_dir):
    unscored = [{**s, "scores": {}, "reward": None} for s in samples(0, [0.0] * 3) + samples(30, [0.0] * 3)]
    write_lines(run_dir / "samples.jsonl", unscored)
    write_lines(run_dir / "metrics.jsonl", ONE_RECORD)
    page = write_report([run_dir]).read_text()
    assert page.count('<div class="answer "') == 6
    assert "bootstrap" not in page


def test_win_rate_by_hand():
    before = {str(i): {"reward": 0.0} for i in range(4)}
    after = {str(i): {"reward": r} for i, r in enumerate([1.0, 2.0, 0.0, -1.0])}
    rate = win_rate(before, after)
    assert (rate.rate, rate.wins, rate.ties, rate.losses) == (0.625, 2, 1, 1)
    assert rate.low < 0.625 < rate.high
    assert win_rate(before, after) == rate
    assert win_rate(before, {"9": {"reward": 1.0}}) is None
    assert win_rate(before, {"0": {"reward": None}}) is None


def test_win_rate_interval_has_the_width_of_the_normal_approximation():
    before = {str(i): {"reward": 0.0} for i in range(400)}
    after = {str(i): {"reward": 1.0 if i % 2 else -1.0} for i in range(400)}
    rate = win_rate(before, after)
    assert rate.high - rate.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)


def test_repeated_prompts_keep_all_their_samples(run_dir):
    write_lines(run_dir / "samples.jsonl", [*samples(0, [1.0]), *samples(0, [2.0])])
    assert list(read_run(run_dir).samples_at(0)) == ["pairs:0", "pairs:0#2"]


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("recipe.resolved.yaml", "recipe.resolved.yaml is not in the folder"),
        ("departures.yaml", "what was set differently is not known"),
        ("metrics.jsonl", "too few numbers to draw a curve"),
        ("samples.jsonl", "holds no samples"),
        ("data_report.json", "data_report.json is not in the folder"),
        ("run.lock", "run.lock is not in the folder"),
    ],
)
def test_a_missing_file_costs_a_sentence(run_dir, file, words):
    write_lines(run_dir / "metrics.jsonl", ONE_RECORD)
    (run_dir / file).unlink()
    page = write_report([run_dir]).read_text()
    checked(page)
    assert words in page


def test_a_run_killed_while_writing_is_read_up_to_there(run_dir):
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 31, "lo')
    assert read_run(run_dir).curve("loss")[-1][0] == 30


def test_a_damaged_file_is_named_with_its_line(run_dir):
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        write_report([run_dir])
    metrics.write_text("")
    (run_dir / "run.lock").write_text("{")
    with pytest.raises(DataError, match=r"run\.lock is damaged"):
        write_report([run_dir])


def test_a_folder_that_is_no_run_is_a_usage_error(run_dir):
    with pytest.raises(RecipeError, match=r"is not a run folder.*metrics\.jsonl.*dpo-test") as caught:
        write_report([run_dir.parent])
    assert caught.value.exit_code == 2
    with pytest.raises(RecipeError, match="there is no such folder"):
        write_report([run_dir / "nowhere"])
    with pytest.raises(RecipeError, match="no run folder was named"):
        write_report([])


def test_runs_are_compared(tmp_path):
    fast, slow = make_run(tmp_path / "fast", speed=0.3, beta=0.5), make_run(tmp_path / "slow")
    path = write_report([fast, slow])
    page = path.read_text()
    assert path == fast / "report.html"
    assert not (slow / "report.html").exists()
    checked(page)
    assert row(page, "algorithm.beta") == ["0.5", "0.1"]
    assert row(page, "rewards/accuracies, held out") == ["0.9699", "0.9476"]
    assert "fast (training) from 0.693" in page
    assert "slow (held-out) from 0.693" in page
    assert page.count('<article class="sample">') == 12


def test_runs_of_equal_name_are_told_apart(tmp_path):
    first, second = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", beta=0.2)
    for run in (first, second):
        write_lines(run / "metrics.jsonl", ONE_RECORD)
    page = write_report([first, second]).read_text()
    assert f"<strong>{first}</strong>" in page
    assert f"<strong>{second}</strong>" in page


def test_verdict_falls_back_to_training_and_then_to_a_sentence(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    write_lines(run_dir / "metrics.jsonl", [line for line in lines if "loss" in line])
    assert verdict(read_run(run_dir), None) == "training accuracy 0.5 → 0.9252, training loss 0.6931 → 0.2206"
    (run_dir / "metrics.jsonl").write_text("")
    assert "no change to report" in verdict(read_run(run_dir), None)


def test_the_page_tells_of_the_best_weights(run_dir):
    assert "in best/" not in write_report([run_dir]).read_text()
    best = {
        "metric": "eval_rewards/accuracies",
        "mode": "min",
        "value": 0.52,
        "step": 0,
        "last_step": 30,
        "stopped_early": True,
    }
    (run_dir / "best.json").write_text(json.dumps(best))
    page = write_report([run_dir]).read_text()
    checked(page)
    assert "Best eval_rewards/accuracies 0.52 at step 0: the weights are in best/. This folder holds those of" in page
    assert "of step 30, where the run stopped early." in page
    # the recipe's own idea of better is shown, whatever the name says
    held_out = re.search(r"<td>held out</td>.*?</tr>", page[page.index('<th scope="row">rewards/accuracies</th>') :])
    assert "0.52 (step 0)" in held_out.group()
    (run_dir / "best.json").write_text(json.dumps({**best, "step": 30, "stopped_early": False}))
    page = write_report([run_dir]).read_text()
    assert "at step 30, where the run ended: best/ and this folder hold the same weights." in page


def test_verdict_names_the_chosen_answers_as_opponents(run_dir):
    with (run_dir / "recipe.resolved.yaml").open("a") as file:
        file.write("eval:\n  opponent: chosen\n")
    assert verdict(read_run(run_dir), None).endswith("win rate 0.9086 against the data's chosen answers")


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("eval_loss", "min"),
        ("nll_loss", None),
        ("rewards/accuracies", "max"),
        ("eval_win_rate", "max"),
        ("rewards/chosen", None),
        ("grad_norm", None),
    ],
)
def test_better(metric, direction):
    assert better(metric) == direction


def test_a_picture_describes_itself_and_uses_the_pages_ink():
    svg = draw("A & B", [Line("loss", [(1, 2.0), (3, 1.0)], [(0, 2.5)])])
    assert 'role="img"' in svg
    assert "A &amp; B: loss (training) from 2 at step 1 to 1 at step 3; loss (held-out) from 2.5 at step 0" in svg
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert "#000000" not in svg


def test_reading_a_folder_changes_nothing(run_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    read_run(run_dir)
    assert {p.name: p.read_bytes() for p in run_dir.iterdir()} == {p.name: p.read_bytes() for p in copy.iterdir()}


def test_the_report_needs_neither_torch_nor_the_trackers(run_dir):
    code = (
        "import sys; from pathlib import Path; from alignkit.track.report import write_report; "
        "import alignkit.track.sinks, alignkit.track.card; write_report([Path(sys.argv[1])]); "
        "print([name for name in ('torch', 'wandb', 'tensorboard', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, run_dir], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
