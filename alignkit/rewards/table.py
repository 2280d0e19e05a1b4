"""The scores of a round as columns: sources write them, transforms rewrite them, combiners read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from alignkit.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class RewardTable:
    """A column of scores for each source, over B completions.

    `scores` [B] float64 and `valid` [B] booleans by reward name; `group` [B] numbers the prompts, equal numbers not
    necessarily adjacent; `columns` hold B data set values each, `texts` the completions.
    """

    scores: Mapping[str, Tensor]
    valid: Mapping[str, Tensor]
    group: Tensor
    columns: Mapping[str, Sequence[Any]]
    texts: Sequence[str]
    step: int = 0

    def with_scores(self, name: str, scores: Tensor) -> RewardTable:
        """The same table with another column [B] under that name."""
        return replace(self, scores={**self.scores, name: scores})

    def stack(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The scores and what is valid of K rewards, side by side: [B, K] each."""
        return torch.stack([self.scores[name] for name in names], 1), torch.stack([self.valid[n] for n in names], 1)


def by_group(function: Callable[[Tensor], Tensor], scores: Tensor, valid: Tensor, group: Tensor) -> Tensor:
    """`function` of the valid scores of each group, in their places; 0 elsewhere. [B], [B], [B] → [B]."""
    found = torch.zeros_like(scores)
    for number in sorted(set(group.tolist())):
        members = ((group == number) & valid).nonzero()[:, 0]
        if len(members):
            found[members] = function(scores[members])
    return found
