"""One entry of a recipe's `data` list. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alignkit.core.config import Config

Format = Literal["auto", "text", "messages", "prompt", "prompt_completion", "preference", "unpaired", "ranked"]


class DataConfig(Config):
    """Where rows come from and how they are read."""

    path: str = Field(description="file (.jsonl, .json, .parquet, .csv, .arrow, each also .gz), folder, or hub id")
    name: str | None = Field(None, description="configuration of a hub data set")
    split: str = Field("train", description="split, with the slices `datasets` knows: train[:10%]")
    format: Format = Field("auto", description="shape of a row; auto looks at the columns")
    fields: dict[str, str] = Field({}, description="our column → theirs (answer: solution); '=text' is a constant")
    weight: float = Field(1.0, gt=0, description="how often each row is seen per epoch; 0.5 = every other row")
    limit: int | None = Field(None, ge=1, description="use only the first rows")
    overlong: Literal["drop", "cut"] = Field(
        "drop", description="completions that do not fit max_length: drop the row, or cut it and lose its stop token"
    )
    max_bad_fraction: float = Field(
        0.9, ge=0, le=1, description="stop if a larger share of rows is unusable or loses its stop token"
    )
