"""Batch → Forward. How rows are laid out for the model is this file's secret."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignkit.core.types import Batch, Forward
from alignkit.data.collate import to_device
from alignkit.dist.engine import DistEngine
from alignkit.models.load import POLICY_ADAPTER, REFERENCE_ADAPTER
from alignkit.ops.logps import shifted, token_logps

SCORING_TOKENS = 8192
"""Padded tokens of one no-grad forward."""


class CausalPolicy:
    """A transformers causal LM, full or with adapters, that scores padded batches.

    `module` is what training forwards call (wrapped for several processes), `bare` the model itself.
    """

    def __init__(self, bare: Any, dist: DistEngine) -> None:
        self.bare, self.dist = bare, dist
        self.module: nn.Module = bare

    @property
    def is_peft(self) -> bool:
        """Whether only adapters train."""
        return hasattr(self.bare, "peft_config")

    @property
    def is_noisy(self) -> bool:
        """Whether adapter dropout, which a recipe may ask for, makes training forwards random."""
        return self.is_peft and self.bare.peft_config[POLICY_ADAPTER].lora_dropout > 0

    def parameters(self) -> list[nn.Parameter]:
        """What trains."""
        return [p for p in self.bare.parameters() if p.requires_grad]

    def forward(self, batch: Batch, outputs: frozenset[str]) -> Forward:
        """Log-probabilities (and what else `outputs` names) of a padded batch, on the run's device.

        Outside `torch.no_grad` it runs through the wrapped module, so that ranks exchange gradients.
        """
        batch = to_device(batch, self.dist.device)
        module = self.module if torch.is_grad_enabled() else self.bare
        with self.dist.autocast():
            # No attention mask: padding is on the right, where causal attention never looks, and without a mask the
            # fast causal kernels apply.
            logits = module(input_ids=batch.inputs["tokens"], use_cache=False).logits
        logps, entropy, correct = token_logps(
            logits,
            batch.inputs["tokens"],
            batch["mask"],
            entropy="entropy" in outputs,
            correct="correct" in outputs,
        )
        return Forward(
            logps=logps,
            entropy=entropy,
            correct=correct,
            logits=shifted(logits) if "logits" in outputs else None,
        )

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """The same weights with the adapter off, or with the frozen adapter the run started from."""
        if REFERENCE_ADAPTER not in self.bare.peft_config:
            with self.bare.disable_adapter():
                yield
            return
        self.bare.set_adapter(REFERENCE_ADAPTER)
        try:
            yield
        finally:
            self.bare.set_adapter(POLICY_ADAPTER)  # the active adapter trains, and no other

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradient, eval mode; the mode before is restored."""
        was_training = self.bare.training
        self.bare.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.bare.train(was_training)

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """A folder plain transformers (or peft) loads, its weights in `dtype`; None = as they are trained.

        An adapter is small and stays as it is trained.
        """
        if self.is_peft:
            self.bare.save_pretrained(folder, selected_adapters=[POLICY_ADAPTER], safe_serialization=True)
        elif dtype is None or all(p.dtype == dtype for p in self.bare.parameters()):
            self.bare.save_pretrained(folder)
        else:
            _cast_copy(self.bare, dtype).save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Weights from a folder `save` wrote, bit for bit."""
        if self.is_peft:
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(self.bare, load_peft_weights(str(folder)), adapter_name=POLICY_ADAPTER)
        else:
            # Through from_pretrained: transformers may rename weights on their way to disk and back.
            fresh = type(self.bare).from_pretrained(folder, dtype=next(self.bare.parameters()).dtype)
            self.bare.load_state_dict(fresh.state_dict())

    def broken_weights(self) -> list[str]:
        """Names of weights that hold nan or infinity."""
        return [name for name, p in self.bare.named_parameters() if not bool(torch.isfinite(p.detach()).all())]


def _cast_copy(model: Any, dtype: torch.dtype) -> Any:
    """The model with its weights in `dtype`, on the CPU; tied weights stay tied, the original is left alone."""
    cast = {id(p): nn.Parameter(p.detach().to("cpu", dtype), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, cast)  # a memo: deepcopy takes these for the parameters it would copy
