"""Multi-action-head DPO: numbers by hand, golden numbers of the authors' program, invariants."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from typer.testing import CliRunner

from alignkit.algorithms.dpo import DPO, DPOConfig
from alignkit.algorithms.mah_dpo import MahDPO, MahDPOConfig, under_every_head
from alignkit.assemble import assemble
from alignkit.cli import app
from alignkit.core import DataError, Group, register
from alignkit.core.contracts import Heads
from alignkit.core.types import Completion
from alignkit.data.collate import collate
from alignkit.dist.engine import DistEngine
from alignkit.dist.world import LocalWorld
from alignkit.loop.reduction import combine, global_counts
from alignkit.models.heads import LanguageHeads, extra
from alignkit.run import train
from alignkit.testing import Bench, check_micro_batches, check_resume, read_metrics, save_quietly, toy_rows
from tests.algorithms.fakes import averages, pair_batch
from tests.shared import golden_case

HEADED = ["three_heads_balanced", "two_heads_unbalanced", "missing_head", "single_head_is_dpo", "label_smoothing"]


def mah(*objectives: str, **keys) -> MahDPO:
    return MahDPO(MahDPOConfig(name="mah_dpo", objectives=list(objectives), **keys))


def heads_batch(policy, reference, mask, heads):
    """Pairs given by token log-probabilities [2U, T], each under its head."""
    out, batch = pair_batch(policy, reference, mask)
    batch.inputs["head"] = torch.tensor(heads, dtype=torch.float32).repeat_interleave(2)
    return out, batch


def evaluated(algorithm, policy, reference, mask, heads=None):
    """Loss and metrics as the loop forms them."""
    out, batch = heads_batch(policy, reference, mask, heads) if heads else pair_batch(policy, reference, mask)
    batch = algorithm.annotate(batch, LocalWorld())
    terms, metrics = algorithm.loss(out, batch)
    loss, _ = combine(terms, batch, global_counts(batch, list(range(batch.num_units)), LocalWorld()))
    return loss, {name: metric for name, metric in metrics.items() if metric.how == "sum" or float(metric.count)}


@pytest.fixture
def pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Six pairs of answers of 1 to 6 tokens: policy, reference, mask."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-3 * torch.rand(12, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(6) < torch.tensor([6, 2, 1, 4, 3, 3, 5, 6, 1, 1, 2, 5])[:, None]
    return policy * mask, reference * mask, mask


def test_it_is_registered_under_its_name():
    assert register.algorithm.get("mah_dpo").target is MahDPO
    assert MahDPO.config_type is MahDPOConfig


def test_three_pairs_by_hand():
    # margins β·h = 0.5·(2, −4, 6) = (1, −2, 3); the first two are of objective a, the third of b
    policy = torch.tensor([[-1.0], [-3], [-5], [-1], [-1], [-7]], dtype=torch.float64)
    reference = torch.full_like(policy, -2.0)
    mask = torch.ones_like(policy)
    losses = [math.log1p(math.exp(-m)) for m in (1, -2, 3)]
    algorithm = mah("a", "b", beta=0.5)
    loss, metrics = evaluated(algorithm, policy, reference, mask, [0, 0, 1])
    assert loss.item() == pytest.approx(((losses[0] + losses[1]) / 2 + losses[2]) / 2, rel=1e-12)
    logged = averages(metrics)
    assert logged["mah_dpo/a/loss"] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-12)
    assert logged["mah_dpo/b/loss"] == pytest.approx(losses[2], rel=1e-12)
    assert (logged["mah_dpo/a/accuracy"], logged["mah_dpo/b/accuracy"]) == (0.5, 1.0)
    assert (logged["mah_dpo/a/margin"], logged["mah_dpo/b/margin"]) == pytest.approx((-0.5, 3.0))
    assert (float(metrics["mah_dpo/a/count"].sum), float(metrics["mah_dpo/b/count"].sum)) == (2, 1)
    assert logged["rewards/margins"] == pytest.approx(2 / 3)

    weighted = mah("a", "b", beta=0.5, objective_weights={"a": 3.0, "b": 1.0})
    loss, _ = evaluated(weighted, policy, reference, mask, [0, 0, 1])
    assert loss.item() == pytest.approx((3 * (losses[0] + losses[1]) / 2 + losses[2]) / 4, rel=1e-12)
    loss, metrics = evaluated(weighted, policy, reference, mask, [1, 1, 1])
    assert loss.item() == pytest.approx(sum(losses) / 3, rel=1e-12), "the weight of an absent head counts nowhere"
    assert "mah_dpo/a/loss" not in metrics


@pytest.mark.parametrize("keys", [{}, {"loss_type": "ipo", "beta": 0.3}], ids=["sigmoid", "ipo"])
def test_policy_at_the_reference_has_its_closed_form(keys, pairs):
    policy, _, mask = pairs
    algorithm = mah("a", "b", "c", objective_weights={"a": 1, "b": 2, "c": 3}, **keys)
    loss, metrics = evaluated(algorithm, policy, policy, mask, [0, 1, 1, 2, 0, 0])
    expected = algorithm.at_reference()
    assert expected["loss"] == pytest.approx((2 * 0.3) ** -2 if keys else math.log(2))
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-12)
    assert averages(metrics)["rewards/margins"] == expected["rewards/margins"] == 0.0
    assert mah("a", "b", head_init_noise=0.001).at_reference() == {}


@pytest.mark.parametrize("keys", [{"label_smoothing": 0.1}, {"loss_type": "ipo"}], ids=["sigmoid", "ipo"])
def test_one_head_is_dpo_to_the_last_bit(keys, pairs):
    policy, reference, mask = pairs
    ours, theirs = policy.clone().requires_grad_(), policy.clone().requires_grad_()
    loss, metrics = evaluated(mah("only", beta=0.3, **keys), ours, reference, mask, [0] * 6)
    expected, others = evaluated(DPO(DPOConfig(name="dpo", beta=0.3, **keys)), theirs, reference, mask)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert torch.equal(ours.grad, theirs.grad)
    logged, wanted = averages(metrics), averages(others)
    assert {name: logged[name] for name in wanted if name != "nll_loss"} == {
        name: value for name, value in wanted.items() if name != "nll_loss"
    }


def test_equal_counts_are_a_plain_mean(pairs):
    loss, _ = evaluated(mah("a", "b", "c"), *pairs, [2, 0, 1, 1, 2, 0])
    expected, _ = evaluated(DPO(DPOConfig(name="dpo")), *pairs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_other_names_in_another_order_change_nothing(pairs):
    first, metrics = evaluated(mah("a", "b", "c"), *pairs, [0, 0, 1, 2, 2, 2])
    second, others = evaluated(mah("z", "x", "y"), *pairs, [1, 1, 2, 0, 0, 0])
    assert first.item() == pytest.approx(second.item(), rel=1e-12)
    renamed = {"a": "x", "b": "y", "c": "z"}
    for old, new in renamed.items():
        assert float(metrics[f"mah_dpo/{old}/margin"].sum) == float(others[f"mah_dpo/{new}/margin"].sum)


def test_gradient_by_finite_differences(pairs):
    policy, reference, mask = pairs
    algorithm = mah("a", "b", label_smoothing=0.2, objective_weights={"a": 1.0, "b": 0.3})

    def loss(x):
        return evaluated(algorithm, x, reference, mask, [0, 1, 0, 0, 1, 0])[0]

    assert torch.autograd.gradcheck(loss, policy.clone().requires_grad_())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", HEADED)
def test_golden_numbers(name, dtype, tolerance):
    case = golden_case("mah_dpo.json", name)
    params, inputs, expected = case["params"], case["inputs"], case["outputs"]
    heads = inputs["head_of_example"]
    sides = ("chosen", "rejected")

    def stacked(model: str) -> list[torch.Tensor]:
        return [torch.tensor(inputs[f"{model}_{side}_token_logps"], dtype=dtype) for side in sides]

    def rows(tables: list[torch.Tensor]) -> torch.Tensor:
        """[2U, T], each pair's answers from the table of its head."""
        picked = [[table[head, i] for table in tables] for i, head in enumerate(heads)]
        return torch.stack([row for pair in picked for row in pair])

    leaves = [table.requires_grad_() for table in stacked("policy")]
    mask = torch.tensor([row for pair in zip(*(inputs[f"{s}_mask"] for s in sides), strict=True) for row in pair])
    names = [f"head {i}" for i in range(params["num_heads"])]
    algorithm = mah(*names, beta=params["beta"], label_smoothing=params["label_smoothing"])
    loss, metrics = evaluated(algorithm, rows(leaves) * mask, rows(stacked("ref")) * mask, mask, heads)
    loss.backward()

    close = {"rtol": tolerance, "atol": tolerance / 100}
    torch.testing.assert_close(loss.detach(), torch.tensor(expected["loss"], dtype=dtype), **close)
    for side, leaf in zip(sides, leaves, strict=True):
        wanted = torch.tensor(expected[f"grad_policy_{side}_token_logps"], dtype=dtype)
        torch.testing.assert_close(leaf.grad, wanted, **close)
    logged = averages(metrics)
    for i, head in enumerate(names):
        for ours, theirs in (("loss", "loss_per_head"), ("accuracy", "accuracy_per_head")):
            if expected[theirs][i] is None:
                assert f"mah_dpo/{head}/{ours}" not in logged
            else:
                # accuracies of the file went through float32
                assert logged[f"mah_dpo/{head}/{ours}"] == pytest.approx(expected[theirs][i], rel=max(tolerance, 1e-7))


def test_golden_mixture_of_logits():
    case = golden_case("mah_dpo.json", "head_mixing")
    weights = torch.tensor(case["inputs"]["head_weight_matrices"], dtype=torch.float64)
    states = torch.tensor(case["inputs"]["hidden_states"], dtype=torch.float64)
    heads = LanguageHeads(weights[0], Heads(names=("a", "b", "c")), 0).double()
    for head, weight in zip(heads.weights, weights, strict=True):
        head.data.copy_(weight)
    given = case["params"]["head_weights"]
    expected = torch.tensor(case["outputs"]["mixed_logits"], dtype=torch.float64)
    torch.testing.assert_close(states @ heads.mixture(given).T, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(states @ heads.mixture([10 * w for w in given]).T, expected, rtol=1e-8, atol=1e-10)


def test_held_out_pairs_come_under_every_head():
    policy = torch.arange(8, dtype=torch.float64).reshape(8, 1)
    _, batch = heads_batch(policy, torch.zeros_like(policy), torch.ones_like(policy), [0, 2, 2, 1])
    batch = mah("a", "b", "c").annotate(batch, LocalWorld())
    repeated = under_every_head(batch, ["a", "b", "c"])
    assert (repeated.num_units, repeated.k) == (12, 2)
    assert repeated.inputs["head"][::2].tolist() == [0, 2, 2, 1, 1, 0, 0, 2, 2, 1, 1, 0]
    assert repeated.inputs["head"][1::2].tolist() == repeated.inputs["head"][::2].tolist()
    assert repeated["unit"].tolist() == [True] * 4 + [False] * 8
    assert repeated["row"].tolist() == [True] * 8 + [False] * 16
    assert repeated["objective/c"].tolist() == [False, True, True, False] + [False] * 8
    assert repeated["asked/c"].tolist() == [False, True, True, False] * 3
    assert repeated["mask"].sum() == 3 * batch["mask"].sum()


def group(name: str, objective: object) -> Group:
    answers = [Completion("good", [5, 2], reward=1.0), Completion("bad", [6, 2], reward=0.0)]
    return Group(name, [], [1, 4], answers, fields={"objective": objective})


def test_rows_go_through_the_head_of_their_objective():
    units = mah("a", "b").build([group("first", "b"), group("second", "a")])
    assert [[row.inputs["head"] for row in unit] for unit in units] == [[1.0, 1.0], [0.0, 0.0]]
    assert [row.tokens for row in units[0]] == [[1, 4, 5, 2], [1, 4, 6, 2]]


@pytest.mark.parametrize("objective", ["c", None, ["a"]])
def test_an_unknown_objective_is_refused_with_its_row(objective):
    with pytest.raises(DataError, match=r"row 'second': objective is .*expected one of algorithm.objectives: a, b"):
        mah("a", "b").build([group("first", "a"), group("second", objective)])


def test_an_objective_without_rows_is_refused():
    with pytest.raises(DataError, match="no row has the objective 'b'"):
        mah("a", "b").prepare([group("first", "a")])


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"objectives": []}, "objectives"),
        ({"objectives": ["a", "a"]}, "names each objective once"),
        ({"objectives": ["a", ""]}, "none of them is empty"),
        ({"objectives": ["a"], "loss_type": "ipo", "label_smoothing": 0.1}, "does nothing to ipo"),
        ({"objectives": ["a", "b"], "objective_weights": {"a": 1.0}}, "for each of a, b"),
        ({"objectives": ["a"], "objective_weights": {"a": 0.0}}, "above 0"),
        ({"objectives": ["a"], "head_init_noise": -0.1}, "head_init_noise"),
        ({"objectives": ["a"], "beta": 0.0}, "beta"),
    ],
)
def test_config_bounds(keys, complaint):
    with pytest.raises(ValidationError, match=complaint):
        MahDPOConfig(name="mah_dpo", **keys)


def assembled(bench: Bench, run: str):
    recipe = bench.recipe(run)
    Path(recipe.output_dir).mkdir(parents=True)
    return assemble(recipe, DistEngine(torch.float32), Console(quiet=True))


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench("mah_dpo", folder=tmp_path_factory.mktemp("bench"))


def test_the_key_without_a_default_is_shown_as_required():
    shown = CliRunner().invoke(app, ["algorithms", "show", "mah_dpo"]).output
    assert re.search(r"^  objectives +required +a list of at least 1, each entry text", shown, re.MULTILINE)
    assert re.search(r"^  beta +0\.1 ", shown, re.MULTILINE)
    rows = json.loads(CliRunner().invoke(app, ["algorithms", "show", "mah_dpo", "--json"]).output)["config"]
    assert [row["key"] for row in rows if row["required"]] == ["objectives"]
    assert next(row["default"] for row in rows if row["key"] == "objectives") is None


class AdapterBench(Bench):
    """The same with adapters under the heads."""

    def recipe(self, run, *, model=None, **settings):
        return super().recipe(run, model={"lora": {"r": 4, "alpha": 8}, **(model or {})}, **settings)


def test_adapters_keep_the_contract(tmp_path):
    toys = AdapterBench("mah_dpo", folder=tmp_path)
    check_micro_batches(toys)
    check_resume(toys)


def test_a_head_without_rows_has_no_gradient(bench):
    run = assembled(bench, "absent")
    trainer = run.trainer
    loud = [one for one in run.groups if one.fields["objective"] == "loud"]
    batch = trainer.roster.fill(collate(trainer.algorithm.build(loud)), trainer.algorithm.needs.columns)
    batch = trainer.algorithm.annotate(batch, LocalWorld())
    counts = global_counts(batch, list(range(batch.num_units)), LocalWorld())
    loss = trainer.policy.loss(
        batch, frozenset({"logps"}), lambda out, some: combine(trainer.algorithm.loss(out, some)[0], some, counts)[0]
    )
    loss.backward()
    first, second = (weight.grad for weight in extra(trainer.policy.bare).weights)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert first.abs().max() > 1e-4
    assert not second.any()
    assert trainer.policy.bare.get_input_embeddings().weight.grad.abs().max() > 0
    run.close()


def test_one_head_is_dpo_to_the_last_bit_in_a_run(tmp_path):
    """From an untied model: several heads never share weights with the input embeddings."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = []
    for name, keys in (("dpo", {}), ("mah_dpo", {"objectives": ["loud"]})):
        rows = [{**row, "objective": "loud"} for row in toy_rows(MahDPO, 7)]
        toys = Bench(name, folder=tmp_path / name, config=keys, rows=rows)
        model = AutoModelForCausalLM.from_pretrained(toys.model)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
        model.config.tie_word_embeddings = False
        toys.model = save_quietly(tmp_path / name / "untied", model, AutoTokenizer.from_pretrained(toys.model))
        # the norm of a gradient adds up weights in the order of their names
        recipe = toys.recipe("run", batch_size=3, num_epochs=2, max_grad_norm=0)
        weights.append(load_file(train(recipe, quiet=True, report=False).folder / "model.safetensors"))
    dpo, ours = weights
    assert dpo.keys() == ours.keys()
    assert all(torch.equal(ours[key], weight) for key, weight in dpo.items())


def test_noisy_heads_start_apart_and_are_measured_on_each_other(tmp_path):
    toys = Bench("mah_dpo", folder=tmp_path, config={"head_init_noise": 0.3})
    recipe = toys.recipe("run", max_steps=1)
    recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"data": recipe.data})})
    before = next(r for r in read_metrics(train(recipe, quiet=True, report=False).folder) if "eval_loss" in r)
    assert before["step"] == 0
    assert before["eval_loss"] != pytest.approx(math.log(2), abs=1e-3)

    run = assembled(toys, "direct")
    for objective in ("loud", "late"):
        groups = [one for one in run.groups if one.fields["objective"] == objective]
        units = run.trainer.algorithm.build(groups)
        for number, head in enumerate(("loud", "late")):
            for unit in units:
                for row in unit:
                    row.inputs["head"] = float(number)
            batch = run.trainer.roster.fill(collate(units), {"reference.logps"})
            with torch.no_grad():
                ratios = run.trainer.policy.forward(batch, frozenset({"logps"})).logps - batch["reference.logps"]
            chosen, rejected = batch.by_unit(ratios.where(batch["mask"], 0.0).sum(-1)).unbind(1)
            share = float((chosen > rejected).float().mean())
            assert before[f"eval_mah_dpo/{head}/accuracy_on/{objective}"] == pytest.approx(share)
        assert (
            before[f"eval_mah_dpo/{objective}/accuracy_on/{objective}"] == before[f"eval_mah_dpo/{objective}/accuracy"]
        )
        assert before[f"eval_mah_dpo/{objective}/count"] == len(groups)
    matrix = [value for name, value in before.items() if "accuracy_on" in name]
    assert len(matrix) == 4
    assert len(set(matrix)) > 1, "heads that agree on everything would show nothing"
    run.close()
