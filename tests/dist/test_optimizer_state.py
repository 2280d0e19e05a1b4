"""The optimizer's state in pieces: written by one layout of processes, taken up by another."""

import pytest
import torch

from alignkit.core.errors import RunFailed
from alignkit.dist.backend import MOMENTS, Backend, OptimizerState, Slot, units_of
from alignkit.dist.world import LocalWorld


def backend(steps=3):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    module[1].bias.requires_grad_(False)
    found = Backend(LocalWorld(), torch.device("cpu"))

    def build():
        trained = [p for p in module.parameters() if p.requires_grad]
        return torch.optim.AdamW([{"params": trained[:1], "lr": 0.5}, {"params": trained[1:], "lr": 0.1}])

    found.prepare(module, build, 1.0)
    for _ in range(steps):
        module(torch.ones(2, 3)).square().sum().backward()
        found.step()
    return found


def same(first, second):
    states = [
        {name: first.optimizer.state[p] for name, p in first.module.named_parameters()} for first in (first, second)
    ]
    assert states[0].keys() == states[1].keys()
    for name, state in states[0].items():
        assert state.keys() == states[1][name].keys(), name
        for key, value in state.items():
            assert torch.equal(value, states[1][name][key]), (name, key)


def cut(state, name, at):
    """Two ranks' states whose parts of this weight meet at a number, and of which the second has all else."""
    part = state["parts"][name]
    first = {**part, **{key: part[key][:at] for key in MOMENTS}}
    second = {**part, "begin": at, **{key: part[key][at:] for key in MOMENTS}}
    return [{**state, "parts": {name: first}}, {**state, "parts": {**state["parts"], name: second}}]


def test_state_comes_back_whole():
    before, after = backend(), backend(steps=0)
    state = OptimizerState(before).state_dict()
    assert set(state["parts"]) == {"0.weight", "0.bias", "1.weight"}
    before.optimizer.param_groups[1]["lr"] = 0.25
    state = OptimizerState(before).state_dict()
    OptimizerState(after).load_state_dict(state)
    same(before, after)
    assert [group["lr"] for group in after.optimizer.param_groups] == [0.5, 0.25]


@pytest.mark.parametrize("at", [0, 1, 5, 12])
def test_parts_of_several_ranks_are_put_together(at):
    before, after = backend(), backend(steps=1)
    OptimizerState(after).load_parts(cut(OptimizerState(before).state_dict(), "0.weight", at))
    same(before, after)


def test_rank_takes_its_own_part_of_what_others_wrote():
    before, after = backend(), backend(steps=0)
    states = cut(OptimizerState(before).state_dict(), "0.weight", 5)
    holder = torch.zeros(9, requires_grad=True)  # of three numbers of another weight, and six of this one
    after.used = [Slot("0.weight", 12, 3, 6, holder, offset=3)]
    OptimizerState(after).load_parts(states)
    found = after.optimizer.state[holder]
    expected = before.optimizer.state[before.module[0].weight]
    for key in MOMENTS:
        assert torch.equal(found[key][3:], expected[key].flatten()[3:9])
        assert torch.equal(found[key][:3], torch.zeros(3))
    assert float(found["step"]) == 3


def test_state_before_the_first_step_is_empty():
    after = backend(steps=0)
    state = OptimizerState(backend(steps=0)).state_dict()
    assert state["parts"] == {}
    OptimizerState(after).load_state_dict(state)
    assert not after.optimizer.state


def test_missing_part_is_told():
    states = cut(OptimizerState(backend()).state_dict(), "0.weight", 5)
    with pytest.raises(RunFailed, match=r"holds 5 of 12 numbers of the optimizer state of 0.weight"):
        OptimizerState(backend(steps=0)).load_parts(
            [
                {
                    **states[0],
                    "parts": states[0]["parts"]
                    | {name: part for name, part in states[1]["parts"].items() if name != "0.weight"},
                }
            ]
        )
    alone, _ = cut(OptimizerState(backend()).state_dict(), "0.weight", 12)
    with pytest.raises(RunFailed, match=r"no optimizer state of 0.bias"):
        OptimizerState(backend(steps=0)).load_parts([alone])


def test_layout_decides_whether_a_file_is_enough():
    state = OptimizerState(backend()).state_dict()
    assert OptimizerState(backend(0)).needs_all(state)  # under DDP the first process writes for all
    sharded = backend(0)
    sharded.name = "fsdp2"
    assert OptimizerState(sharded).needs_all(state)
    assert not OptimizerState(sharded).needs_all({**state, "layout": "fsdp2 1"})
    assert OptimizerState(sharded).needs_all({**state, "layout": "fsdp2 2"})


def test_units_are_the_decoder_layers():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=1, head_dim=8
    )
    model = LlamaForCausalLM(config)
    assert units_of(torch.nn.ModuleList([model])) == list(model.model.layers)
    assert units_of(torch.nn.Linear(2, 2)) == []
