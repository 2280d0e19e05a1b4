"""The reward a model implies by what it has come to prefer: how much likelier it finds an answer than its start did.

Source: Rafailov et al. 2023 (arXiv 2305.18290), eq. 5 without its constant; as a judge of one's own answers: Wang et
al. 2024 (arXiv 2410.12735).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from alignkit.core.config import Config
from alignkit.core.contracts import Models
from alignkit.core.errors import RunFailed
from alignkit.core.registry import register
from alignkit.core.types import RewardBatch, RewardOutput, Row, Unit
from alignkit.rewards.asking import need_models
from alignkit.rewards.functions import column_output


class ImplicitConfig(Config):
    """Keys of `implicit`."""

    model: str = Field("policy", description="whose reward it is: policy, or an entry of the recipe's `models`")
    base: str = Field("base", description="the model it started from")
    previous: str | None = Field("previous", description="whose reward is the part `previous`; null = nobody's")
    beta: float = Field(1.0, gt=0, description="scale of the reward, dimensionless")
    length_normalize: bool = Field(False, description="divide by the number of tokens: sums favour long answers")


@register.reward("implicit")
class Implicit:
    """β·(Σ log p_model − Σ log p_base) over the tokens of a completion; the part `previous` is that of another model.

    A model with the very weights of the base implies no reward: the mean log-probability of a token under it stands in,
    times β, as in CREAM's code. So does it in the part `previous`.
    """

    config_type: ClassVar[type[Config]] = ImplicitConfig
    requires: tuple[str, ...] = ()

    def __init__(self, config: ImplicitConfig) -> None:
        self.config = config

    def models(self) -> tuple[str, ...]:
        """Names of the run's models that it asks."""
        config = self.config
        return (config.model, config.base, *([config.previous] if config.previous else []))

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """One score a completion, in nats for β = 1; not valid where it has no tokens.

        Raises:
            RecipeError: there are no models to ask, or none of that name.
            RunFailed: the completions come without tokens.
        """
        config, models = self.config, need_models(models, "implicit")
        identities = {name: models.identity(name) for name in self.models()}
        units = _units(rows)
        asked = [unit for unit in units if any(unit[0].trained)]
        found: dict[str, list[list[float]]] = {}
        for name, identity in identities.items():
            if identity not in found:
                found[identity] = models.logps(asked, name)
        base = identities[config.base]

        def rewards(name: str) -> list[float | None]:
            answers = iter(zip(found[identities[name]], found[base], strict=True))
            return [
                self._reward(*next(answers), identities[name] == base) if any(u[0].trained) else None for u in units
            ]

        output = column_output(rewards(config.model))
        if config.previous is not None:
            output.components["previous"] = column_output(rewards(config.previous)).score
        return output

    def _reward(self, model: Sequence[float], base: Sequence[float], same: bool) -> float:
        total = sum(model) if same else sum(model) - sum(base)
        return self.config.beta * (total / len(model) if same or self.config.length_normalize else total)


def _units(rows: RewardBatch) -> list[Unit]:
    """Each completion behind its prompt, as a unit of one row."""
    if rows.completion_ids is None or rows.completion_mask is None or not rows.prompt_ids:
        raise RunFailed("reward 'implicit' scores tokens, and these prompts and completions come without any")
    units: list[Unit] = []
    for prompt, ids, mask in zip(rows.prompt_ids, rows.completion_ids, rows.completion_mask, strict=True):
        tokens: list[int] = ids[mask].tolist()
        units.append((Row([*prompt, *tokens], [False] * len(prompt) + [True] * len(tokens)),))
    return units
