"""Pure tensor functions; torch only.

Names resolve on first use, so an algorithm file that says `ops.sequence_sum` can be imported without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignkit.ops.density import count_tokens, fit_classifier, odds
    from alignkit.ops.logps import shifted, token_logps
    from alignkit.ops.ranking import (
        apo_down_pair,
        apo_zero_pair,
        bco_pair,
        bradley_terry,
        discopop_pair,
        divergence_score,
        exo_pair,
        hinge_pair,
        log_odds,
        log_sum_squares,
        logistic_pair,
        nca_pair,
        peer_select,
        robust_pair,
        same_rank,
        sppo_pair,
        square_pair,
        tail_weights,
        wpo_weights,
    )
    from alignkit.ops.reduce import sequence_mean, sequence_sum
    from alignkit.ops.scores import aggregate_scores, calibration_gaps, discounted, squared_error, standardize

_HOME = {
    "aggregate_scores": "scores",
    "apo_down_pair": "ranking",
    "apo_zero_pair": "ranking",
    "bco_pair": "ranking",
    "bradley_terry": "ranking",
    "calibration_gaps": "scores",
    "count_tokens": "density",
    "discopop_pair": "ranking",
    "discounted": "scores",
    "divergence_score": "ranking",
    "exo_pair": "ranking",
    "fit_classifier": "density",
    "hinge_pair": "ranking",
    "log_odds": "ranking",
    "log_sum_squares": "ranking",
    "logistic_pair": "ranking",
    "nca_pair": "ranking",
    "odds": "density",
    "peer_select": "ranking",
    "robust_pair": "ranking",
    "same_rank": "ranking",
    "sequence_mean": "reduce",
    "sequence_sum": "reduce",
    "shifted": "logps",
    "sppo_pair": "ranking",
    "square_pair": "ranking",
    "squared_error": "scores",
    "standardize": "scores",
    "tail_weights": "ranking",
    "token_logps": "logps",
    "wpo_weights": "ranking",
}

__all__ = [
    "aggregate_scores",
    "apo_down_pair",
    "apo_zero_pair",
    "bco_pair",
    "bradley_terry",
    "calibration_gaps",
    "count_tokens",
    "discopop_pair",
    "discounted",
    "divergence_score",
    "exo_pair",
    "fit_classifier",
    "hinge_pair",
    "log_odds",
    "log_sum_squares",
    "logistic_pair",
    "nca_pair",
    "odds",
    "peer_select",
    "robust_pair",
    "same_rank",
    "sequence_mean",
    "sequence_sum",
    "shifted",
    "sppo_pair",
    "square_pair",
    "squared_error",
    "standardize",
    "tail_weights",
    "token_logps",
    "wpo_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
