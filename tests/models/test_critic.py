"""The critic: what plain transformers says of the same rows, one backward for two models, what a run keeps of it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import log_softmax

from alignkit import ops
from alignkit.assemble import CRITIC_HEAD
from alignkit.core import Forward
from alignkit.core.types import Row
from alignkit.data.collate import collate
from alignkit.dist.engine import DistEngine
from alignkit.loop.config import TrainConfig
from alignkit.loop.optim import build_optimizer
from alignkit.loop.reduction import emptied
from alignkit.models.config import LoraConfig, ModelConfig
from alignkit.models.heads import score_layer
from alignkit.models.load import DTYPES, load_policy
from alignkit.models.policy import CausalPolicy, ForwardOptions
from alignkit.ops import logps as head_sizes
from alignkit.recipe import load_recipe
from alignkit.run import train
from alignkit.testing import build_tiny_model, read_metrics, toy_rows
from tests.models.workshop import LORA, assembled

LAYOUTS = ["padded", "packed", "prefix_shared"]
OUTPUTS = frozenset({"logps", "values"})
PROMPT, ANSWERS = [1, 10, 11, 12, 13, 14, 15], [[20, 21, 2], [30, 2], [40, 41, 42, 43, 2]]
ROWS = [Row([*p, *a], [False] * len(p) + [True] * len(a)) for p in (PROMPT, [1, 9]) for a in ANSWERS]
BATCH = collate([(row,) for row in ROWS])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("critic") / "model")


def policy_of(model, layout="auto", *, lora=None, dtype="float32", checkpointing=False, drawn=True):
    """A policy with a critic, whose score layer is drawn: one that says 0 of everything would hide what it reads."""
    config = ModelConfig(
        name_or_path=str(model), dtype=dtype, lora=lora and LoraConfig(**lora), gradient_checkpointing=checkpointing
    )
    critic = load_policy(config, 1, CRITIC_HEAD)
    if drawn:
        draw = torch.Generator().manual_seed(0)
        for parameter in score_layer(critic).parameters():
            torch.nn.init.normal_(parameter.data, generator=draw)
    return CausalPolicy(load_policy(config), DistEngine(DTYPES[dtype]), ForwardOptions(layout), critic=critic)


def values_of(policy, batch=BATCH):
    with policy.evaluating():
        return policy.forward(batch, OUTPUTS).values


def plain_values(critic, rows=ROWS):
    """[N, L]: what the token classifier says at the token before each trained one, a row at a time."""
    critic.eval()
    found = torch.zeros(BATCH["mask"].shape)
    with torch.no_grad():
        for n, row in enumerate(rows):
            said = critic(input_ids=torch.tensor([row.tokens])).logits[0, :, 0]
            found[n, 1 : len(row.tokens)] = said[:-1].float()
    return found.where(BATCH["mask"], 0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_values_are_those_of_a_plain_token_classifier(model, layout, lora):
    policy = policy_of(model, layout, lora=lora)
    assert type(policy.critic.get_base_model() if lora else policy.critic).__name__ == "LlamaForTokenClassification"
    found = values_of(policy)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain_values(policy.critic), rtol=0, atol=1e-5)
    assert found[BATCH["mask"]].abs().min() > 0
    alone = policy.forward(BATCH, frozenset({"values"}))
    assert torch.equal(alone.values, found)
    assert not alone.logps.any()


def test_values_in_bfloat16_are_near_and_in_float32(model):
    policy = policy_of(model, dtype="bfloat16")
    found = values_of(policy)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, values_of(policy_of(model)), rtol=0.05, atol=0.1)


def test_a_new_critic_expects_nothing(model):
    assert not values_of(policy_of(model, drawn=False)).any()


def objective(out: Forward, batch):
    """A loss in which policy, critic and entropy all have a part."""
    mask = batch["mask"]
    weight = torch.arange(mask.shape[1]) / 7.0
    entropy = 0.0 if out.entropy is None else 0.1 * out.entropy
    value = ops.value_loss(out.values, weight, out.values.detach() - 0.05, 0.1)
    return (weight * out.logps.exp() + 0.3 * value - entropy).where(mask, 0.0).sum()


def gradients_of(policy):
    found = {f"policy.{name}": p.grad for name, p in policy.bare.named_parameters() if p.requires_grad}
    return found | {f"critic.{name}": p.grad for name, p in policy.critic.named_parameters() if p.requires_grad}


def plain_gradients(policy, outputs):
    """By autograd on whole logits of padded rows."""
    tokens = BATCH.inputs["tokens"]
    mask = BATCH["mask"]
    logits = torch.cat(
        [
            torch.zeros(len(ROWS), 1, 1).expand(-1, -1, policy.bare.config.vocab_size),
            policy.bare(input_ids=tokens).logits[:, :-1],
        ],
        1,
    )
    log_p = log_softmax(logits, -1)
    values = torch.cat([torch.zeros(len(ROWS), 1), policy.critic(input_ids=tokens).logits[:, :-1, 0]], 1)
    out = Forward(
        logps=log_p.gather(-1, tokens[..., None]).squeeze(-1).where(mask, 0.0),
        values=values.where(mask, 0.0),
        entropy=-(log_p.exp() * log_p).sum(-1) if "entropy" in outputs else None,
    )
    loss = objective(out, BATCH)
    loss.backward()
    return loss.detach(), gradients_of(policy)


@pytest.mark.parametrize("outputs", [OUTPUTS, OUTPUTS | {"entropy"}], ids=["", "entropy"])
@pytest.mark.parametrize(("layout", "checkpointing"), [(layout, False) for layout in LAYOUTS] + [("auto", True)])
def test_one_backward_trains_both(model, layout, checkpointing, outputs, monkeypatch):
    monkeypatch.setattr(head_sizes, "CHUNK_BYTES", 1)  # a chunk for every unit: values are cut with them
    expected_loss, expected = plain_gradients(policy_of(model), outputs)
    policy = policy_of(model, layout, checkpointing=checkpointing)
    policy.module.train()
    loss = policy.loss(BATCH, outputs, objective)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected_loss, rtol=1e-5, atol=1e-6)
    found = gradients_of(policy)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(
            found[name], grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("layout", ["padded", "auto"])
def test_a_rank_without_rows_has_a_gradient_of_nothing_for_every_weight(model, layout):
    policy = policy_of(model, layout)
    policy.loss(emptied(BATCH), OUTPUTS, objective).backward()
    for name, grad in gradients_of(policy).items():
        assert grad is not None, name
        assert not grad.any(), name


def test_its_weights_have_a_rate_of_their_own(model):
    policy = policy_of(model)
    config = TrainConfig(learning_rate=1e-4, critic_learning_rate=3e-4, weight_decay=0.1)
    optimizer = build_optimizer(policy.parameters(), config, policy.critic_parameters())
    own = {id(p) for p in policy.critic_parameters()}
    seen = [
        (id(p) in own, group["lr"], group["weight_decay"] > 0, p.ndim >= 2)
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert len(seen) == len(policy.parameters())
    assert all(rate == (3e-4 if critic else 1e-4) and decays == wide for critic, rate, decays, wide in seen)
    assert TrainConfig(learning_rate=1e-4).critic_rate == pytest.approx(1e-3)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_saved_and_loaded_it_says_the_same(model, tmp_path, lora):
    policy, other = (policy_of(model, lora=lora, drawn=drawn) for drawn in (True, False))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)
    policy.save(tmp_path)
    assert not torch.equal(values_of(policy), values_of(other))
    other.load(tmp_path)
    assert torch.equal(values_of(policy), values_of(other))
    if lora is None:
        from transformers import AutoModelForTokenClassification

        alone = AutoModelForTokenClassification.from_pretrained(tmp_path / "critic")
        torch.testing.assert_close(plain_values(alone), values_of(policy), rtol=0, atol=1e-5)


def share_of_a(completions, **_):
    return [text.count("a") / 4 for text in completions]


def recipe_of(start, folder, **blocks):
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in toy_rows_of()))
    settings = {"batch_size": 8, "learning_rate": 1e-3, "max_length": 64, "save_steps": 0, "epochs_per_round": 2}
    return load_recipe(
        {
            "output_dir": str(folder / blocks.pop("run", "run")),
            "model": {"name_or_path": str(start), "dtype": "float32", **blocks.pop("model", {})},
            "data": [{"path": str(data)}],
            "algorithm": {"name": "ppo"},
            "rewards": [{"name": f"{__name__}:share_of_a"}],
            "rollout": {"num_generations": 4, "max_completion_length": 6},
            "train": {"max_steps": 4, **settings, **blocks.pop("train", {})},
            **blocks,
        }
    )


def toy_rows_of():
    from alignkit.algorithms.ppo import PPO

    return toy_rows(PPO, 4)


def test_a_run_leaves_its_critic_and_another_begins_with_it(model, tmp_path):
    first = train(recipe_of(model, tmp_path), quiet=True, report=False)
    kept = load_file(first.folder / "critic" / "model.safetensors")
    assert kept["score.weight"].abs().sum() > 0
    again = recipe_of(model, tmp_path, run="again", models={"critic": {"from": str(first.folder / "critic")}})
    critic = assembled(again).trainer.policy.critic
    assert torch.equal(critic.score.weight.detach(), kept["score.weight"])


def test_a_run_that_is_thrown_away_takes_its_critic_with_it(model, tmp_path):
    first = train(recipe_of(model, tmp_path), quiet=True, report=False)
    (first.folder / "critic" / "left").write_text("")
    train(recipe_of(model, tmp_path, train={"max_steps": 0}), quiet=True, report=False, overwrite=True)
    assert not (first.folder / "critic" / "left").exists()


def test_adapters_train_policy_and_critic(model, tmp_path):
    done = train(recipe_of(model, tmp_path, model={"lora": LORA, "dtype": "bfloat16"}), quiet=True, report=False)
    assert json.loads((done.folder / "critic" / "adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"
    weights = load_file(done.folder / "critic" / "adapter_model.safetensors")
    assert any("score" in name and x.abs().sum() > 0 for name, x in weights.items())
    assert all(record["loss"] == record["loss"] for record in read_metrics(done.folder))
