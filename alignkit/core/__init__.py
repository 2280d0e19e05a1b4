"""The language of alignkit: types, contracts, configs, names, keys and errors. Read `types` and `contracts` first."""

from alignkit.core.config import AlgorithmConfig, Config
from alignkit.core.contracts import Algorithm, Metrics, Needs, RewardSource, Terms, World
from alignkit.core.errors import (
    AlignkitError,
    DataError,
    EnvironmentProblem,
    Interrupted,
    RecipeError,
    RunFailed,
)
from alignkit.core.registry import register
from alignkit.core.types import (
    Batch,
    Completion,
    Forward,
    Group,
    Message,
    Metric,
    RewardBatch,
    RewardOutput,
    Row,
    Score,
    Term,
    Unit,
)

__all__ = [
    "Algorithm",
    "AlgorithmConfig",
    "AlignkitError",
    "Batch",
    "Completion",
    "Config",
    "DataError",
    "EnvironmentProblem",
    "Forward",
    "Group",
    "Interrupted",
    "Message",
    "Metric",
    "Metrics",
    "Needs",
    "RecipeError",
    "RewardBatch",
    "RewardOutput",
    "RewardSource",
    "Row",
    "RunFailed",
    "Score",
    "Term",
    "Terms",
    "Unit",
    "World",
    "register",
]
