"""The last layer's feed-forward, for the positions that are scored.

What the last layer makes of the other positions is read by nobody: their keys and values come from the layer's input,
and only scored states reach the head. So its feed-forward, most of the layer's work, may leave them out.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from alignkit.models.layout import Segments

_TAUGHT: WeakSet[nn.Module] = WeakSet()


class _Rows:
    """The positions that the call under way has use for; None = all."""

    def __init__(self) -> None:
        self.index: Tensor | None = None
        self.whole: Tensor | None = None


def install_trim(body: nn.Module) -> None:
    """Teach the last layer of a decoder to leave out what a call with `segments` does not score.

    A decoder without a list `layers` or `h`, or whose layers have no `mlp`, stays as it is.
    """
    layers = getattr(body, "layers", None) or getattr(body, "h", None)
    last = layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None
    feed_forward = getattr(last, "mlp", None)
    if last is None or last in _TAUGHT or not isinstance(feed_forward, nn.Module):
        return
    _TAUGHT.add(last)
    rows = _Rows()

    def begin(layer: nn.Module, _: Any, options: dict[str, Any]) -> None:
        segments: Segments | None = options.get("segments")
        # A checkpointed layer runs again in backward, when another call may have been here in between.
        again = bool(getattr(layer, "gradient_checkpointing", False)) and layer.training
        rows.index = None if segments is None or again else segments.scored

    def choose(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if rows.index is None:
            return None
        rows.whole = arguments[0]
        return (arguments[0].index_select(1, rows.index), *arguments[1:])

    def put_back(_: nn.Module, __: Any, out: Any) -> Any:
        if rows.index is None or rows.whole is None:
            return None
        whole, rows.whole = rows.whole, None
        few, *more = out if isinstance(out, tuple) else (out,)
        full = few.new_zeros(*whole.shape[:2], few.shape[-1]).index_copy(1, rows.index, few)
        return (full, *more) if more else full

    last.register_forward_pre_hook(begin, with_kwargs=True)
    feed_forward.register_forward_pre_hook(choose)
    feed_forward.register_forward_hook(put_back)
