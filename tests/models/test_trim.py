"""The last layer's feed-forward leaves out what no score reads, and only then."""

import pytest
import torch

from alignkit.core.types import Row
from alignkit.data.collate import collate
from alignkit.dist.engine import DistEngine
from alignkit.models.paths import choose_path
from alignkit.models.policy import LOGPS, CausalPolicy, ForwardOptions
from tests.models.test_exactness import build

PROMPT, ANSWERS = [5, 6, 7, 8, 9, 10], ([11, 12], [13, 14, 15])
UNIT = tuple(Row([*PROMPT, *a], [False] * len(PROMPT) + [True] * len(a)) for a in ANSWERS)


@pytest.fixture
def model():
    return build("llama")


@pytest.fixture
def seen(model):
    """Positions that the feed-forward of each layer is given."""
    counts: list[list[int]] = [[] for _ in model.model.layers]
    for layer, found in zip(model.model.layers, counts, strict=True):
        # behind the hooks: what really is computed
        layer.mlp.gate_proj.register_forward_pre_hook(lambda _, x, found=found: found.append(x[0].shape[1]))
    return counts


def forward(model, layout: str) -> torch.Tensor:
    policy = CausalPolicy(model, DistEngine(torch.float32), ForwardOptions(layout))
    return policy.forward(collate([UNIT]), LOGPS).logps


@pytest.mark.parametrize(("layout", "stream", "scored"), [("prefix_shared", 9, 4), ("packed", 15, 5)])
def test_the_last_layer_computes_what_is_scored(model, seen, layout, stream, scored):
    # scored: the last token of the prompt (once where it is shared) and all but the last of each answer
    forward(model, layout)
    assert seen == [[stream], [scored]]


def test_padded_rows_and_plain_calls_compute_everything(model, seen):
    forward(model, "prefix_shared")
    forward(model, "padded")
    model(input_ids=torch.tensor([PROMPT]))
    assert seen[0][1:] == seen[1][1:] == [8, 6]  # of padded rows all but the last column


def test_a_layer_that_runs_again_in_backward_computes_everything(model, seen):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    forward(model, "prefix_shared").sum().backward()
    assert seen == [[9, 9], [9, 9]]


def test_teaching_twice_is_teaching_once(model, seen):
    for _ in range(3):
        choose_path(model, "auto", None)
    forward(model, "prefix_shared")
    assert seen == [[9], [4]]
