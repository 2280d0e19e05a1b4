"""One entry of a recipe's `data` list. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator

from alignkit.core.config import Config
from alignkit.data.operations import OperationConfig, find_operation

Format = Literal[
    "auto",
    "text",
    "messages",
    "prompt",
    "prompt_completion",
    "preference",
    "unpaired",
    "ranked",
    "stepwise",
    "sharegpt",
    "alpaca",
    "alpaca_eval",
    "ultrafeedback",
    "nemo_rl",
    "helpsteer",
    "verl",
    "open_instruct",
    "halos",
    "transcripts",
]
"""`auto`, the shapes of `shapes.py`, and the layouts of `foreign.py`."""


class DataConfig(Config):
    """Where rows come from and how they are read."""

    path: str = Field(description="file (.jsonl, .json, .parquet, .csv, .arrow, each also .gz), folder, or hub id")
    name: str | None = Field(None, description="configuration of a hub data set")
    split: str = Field("train", description="split, with the slices `datasets` knows: train[:10%]")
    format: Format = Field("auto", description="shape or layout of a row; auto looks at columns and rows")
    fields: dict[str, str] = Field({}, description="our column → theirs (answer: solution); '=text' is a constant")
    weight: float = Field(1.0, gt=0, description="how often each row is seen per epoch; 0.5 = every other row")
    limit: int | None = Field(None, ge=1, description="use only the first rows")
    overlong: Literal["drop", "cut"] = Field(
        "drop", description="completions that do not fit max_length: drop the row, or cut it and lose its stop token"
    )
    max_bad_fraction: float = Field(
        0.9, ge=0, le=1, description="stop if a larger share of rows is unusable or loses its stop token"
    )
    operations: list[SerializeAsAny[OperationConfig]] = Field(
        [], description="what is done to rows before they are rendered, one after the other"
    )

    @field_validator("operations", mode="before")
    @classmethod
    def _named_operations(cls, value: Any) -> Any:
        return [_as_config(item) for item in value] if isinstance(value, list) else value


def _as_config(value: Any) -> Any:
    """The entry as its operation's own config, defaults of its name included."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return value
    entry = find_operation(value["name"])
    return entry.target.config_type.model_validate({**entry.preset, **value})
