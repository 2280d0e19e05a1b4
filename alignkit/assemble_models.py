"""The run's models beside the policy, and what rewards may ask of all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from importlib.metadata import version as installed
from typing import Any

import torch

from alignkit.core.contracts import Algorithm, Needs
from alignkit.core.errors import RecipeError
from alignkit.core.types import Unit
from alignkit.data.render import Renderer
from alignkit.models.cache import LogpsCache
from alignkit.models.config import ModelConfig, RosterModelConfig
from alignkit.models.load import fingerprint, load_policy, load_renderer
from alignkit.models.policy import CausalPolicy, ForwardOptions
from alignkit.models.roster import AdapterReference, FrozenModel, MovingModel, Roster, Sampled, ScoringModel
from alignkit.recipe import Recipe
from alignkit.rollout.chat import ChatModel
from alignkit.rollout.models import RunModels
from alignkit.rollout.native import context_length


def build_models(
    recipe: Recipe,
    policy: CausalPolicy,
    algorithm: Algorithm[Any],
    renderer: Renderer,
    sample: Sequence[Unit],
    asked: Collection[str],
    version: Callable[[], int],
) -> tuple[Roster, RunModels]:
    """What fills columns, and what rewards ask.

    Args:
        sample: rows on which a model's way to log-probabilities is tried.
        asked: models that rewards ask.
        version: the policy's present version.

    Raises:
        RecipeError: a model nobody uses, or one that cannot be what it is used for.
    """
    needs = algorithm.needs
    names = (needs.roster | set(asked)) - {"policy"}
    critic = {"critic"} if policy.critic is not None else set()
    if unknown := sorted(set(recipe.models) - names - critic):
        raise RecipeError(
            f"models.{unknown[0]}: {recipe.algorithm.name} uses no model of that name; it uses "
            f"{', '.join(sorted(names)) or 'none besides the policy'}"
        )
    configs = {name: _config(recipe, needs, name) for name in names}
    served = {name: ChatModel(config, name) for name, config in configs.items() if config.endpoint is not None}
    if wrong := sorted(needs.roster & set(served)):
        raise RecipeError(
            f"models.{wrong[0]}: {recipe.algorithm.name} needs its log-probabilities, which a server does not tell of "
            "given tokens; give local weights instead: `from: PATH`"
        )
    models: dict[str, ScoringModel] = {}
    caches: dict[str, LogpsCache] = {}
    for name in sorted(names - set(served)):
        config = configs[name]
        moves = (config.refresh or needs.models.get(name, "never")) == "round"
        models[name] = _model(recipe.model, config, policy, sample, moves)
        if f"{name}.logps" in needs.columns and config.precompute and not moves and not needs.rewards:
            caches[name] = _cache(recipe.model, config, policy)
    sampled = Sampled(recipe.rollout.trusts_sampler(recipe.model.dtype), recipe.rollout.importance_cap)
    paths = {name: configs[name].source for name in models}
    start = recipe.model.name_or_path
    same = {"policy", start}
    identities = {"policy": start, **{name: start if path in same else path for name, path in paths.items()}}
    run_models = RunModels(
        Roster(policy, models, caches, sampled, identities),
        served,
        renderer,
        {name: _renderer(recipe.model, path) for name, path in paths.items() if path not in same},
        policy.dist,
        recipe.seed,
        version,
        context_length(policy.bare) if policy.heads.is_language else None,
    )
    return run_models.roster, run_models


def _config(recipe: Recipe, needs: Needs, name: str) -> RosterModelConfig:
    """What the recipe says of a model, else where the method has it begin."""
    start = RosterModelConfig.model_validate({"from": "policy"})
    if name not in recipe.models and needs.starts.get(name) in recipe.models:
        source = recipe.models[needs.starts[name]].source
        start = RosterModelConfig.model_validate({"from": source})
    return recipe.models.get(name, start)


def forward_options(model: ModelConfig, temperature: float = 1.0) -> ForwardOptions:
    """How a model of the run computes."""
    return ForwardOptions(model.layout, model.attn_implementation, model.activation_offload, temperature)


def _renderer(model: ModelConfig, path: str) -> Callable[[], Renderer]:
    return lambda: load_renderer(_frozen(model, path))


def _frozen(model: ModelConfig, path: str) -> ModelConfig:
    return model.model_copy(
        update={"name_or_path": path, "lora": None, "quantization": None, "gradient_checkpointing": False}
    )


def _cache(model: ModelConfig, config: RosterModelConfig, policy: CausalPolicy) -> LogpsCache:
    start = policy.bare if config.source == "policy" else load_policy(_frozen(model, config.source))
    software = f"torch {torch.__version__} transformers {installed('transformers')}"
    head = "whole" if policy.path.head is None else "chunked"
    way = f"{model.dtype} {model.attn_implementation} {policy.path.layout} {head}"
    return LogpsCache(f"{fingerprint(start)} {way} {software}", policy.dist.world)


def _model(
    model: ModelConfig, config: RosterModelConfig, policy: CausalPolicy, sample: Sequence[Unit], moves: bool
) -> ScoringModel:
    if config.source == "policy" and moves:
        return MovingModel(policy)
    if config.source == "policy" and model.lora is not None:
        return AdapterReference(policy)
    frozen = _frozen(model, model.name_or_path if config.source == "policy" else config.source)

    def load() -> CausalPolicy:
        options = forward_options(frozen, policy.temperature)
        loaded = CausalPolicy(load_policy(frozen).to(policy.dist.device), policy.dist, options)
        loaded.try_path(sample)
        return loaded

    start = FrozenModel(load)
    return MovingModel(policy, start) if moves else start
