"""Rewards that a server gives over HTTP, in our own form or as OpenRLHF's remote reward models speak."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from alignkit.core.config import Config
from alignkit.core.contracts import Models
from alignkit.core.errors import EnvironmentProblem, RunFailed
from alignkit.core.registry import register
from alignkit.core.types import RewardBatch, RewardOutput
from alignkit.rewards.adapters import prompt_text
from alignkit.rewards.calls import scatter, select_rows
from alignkit.rewards.functions import answer_output

QUOTED = 200
"""Characters of a server's answer that a message quotes."""


class HttpConfig(Config):
    """Keys of `http`."""

    url: str = Field(pattern="^https?://", description="where completions are posted to")
    protocol: Literal["alignkit", "openrlhf"] = Field("alignkit", description="what is posted, and what comes back")
    columns: list[str] = Field([], description="data columns to send; openrlhf takes one, as `labels`")
    batch_size: int = Field(64, ge=1, description="completions of one request")
    timeout_s: float = Field(60.0, gt=0, description="seconds a request may take")
    token_env: str | None = Field(None, description="environment variable of a bearer token")


@register.reward("http")
class Http:
    """Scores from a server.

    alignkit: posts `{"prompts": [messages, …], "completions": [text, …], "columns": {name: [value, …]}, "step": n}`,
    reads `{"scores": [number or null, …], "components": {name: [number, …]}}`, the components optional.
    openrlhf: posts `{"query": [prompt and completion, …], "prompts": [text, …], "labels": […]}`, reads
    `{"rewards": [number, …]}`.
    """

    config_type: ClassVar[type[Config]] = HttpConfig

    def __init__(self, config: HttpConfig) -> None:
        self.config = config
        self.requires: tuple[str, ...] = tuple(config.columns)
        if config.token_env is not None and not os.environ.get(config.token_env):
            raise EnvironmentProblem(
                f"reward 'http': args.token_env names {config.token_env!r}, and there is no such environment variable"
            )

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """One score a completion; null is not valid.

        Raises:
            RunFailed: the server refused, or its answer is not what the protocol says.
            OSError: it cannot be reached, or is late.
        """
        del models
        size = len(rows.completions)
        parts = []
        for start in range(0, size, self.config.batch_size):
            index = list(range(start, min(start + self.config.batch_size, size)))
            parts.append((index, self._some(select_rows(rows, index))))
        return scatter(parts, size)

    def _some(self, rows: RewardBatch) -> RewardOutput:
        ours = self.config.protocol == "alignkit"
        answer = self._post(self._ours(rows) if ours else self._openrlhf(rows))
        name = "scores" if ours else "rewards"
        if not isinstance(answer, Mapping) or name not in answer:
            raise RunFailed(
                f"reward 'http': {self.config.url} answered {json.dumps(answer)[:QUOTED]}; expected an object with "
                f"{name!r}"
            )
        output = answer_output("http", answer[name], rows.completions)
        for part, values in (answer.get("components", {}) if ours else {}).items():
            output.components[part] = answer_output("http", values, rows.completions).score
        return output

    def _ours(self, rows: RewardBatch) -> dict[str, Any]:
        columns = {name: rows.columns[name] for name in self.config.columns}
        return {"prompts": rows.prompts, "completions": rows.completions, "columns": columns, "step": rows.step}

    def _openrlhf(self, rows: RewardBatch) -> dict[str, Any]:
        prompts = [prompt_text(messages) for messages in rows.prompts]
        queries = [prompt + text for prompt, text in zip(prompts, rows.completions, strict=True)]
        labels = rows.columns[self.config.columns[0]] if self.config.columns else [None] * len(prompts)
        return {"query": queries, "prompts": prompts, "labels": labels}

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.config.token_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.config.token_env]}"
        request = urllib.request.Request(
            self.config.url, json.dumps(body, default=str).encode(), headers, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=self.config.timeout_s) as response:
                text = response.read().decode("utf-8", errors="replace")
        except urllib.error.HTTPError as error:
            said = error.read().decode("utf-8", errors="replace")[:QUOTED]
            raise RunFailed(
                f"reward 'http': {self.config.url} answered {error.code} {error.reason}: {said!r}"
            ) from None
        except OSError as error:
            raise OSError(f"{self.config.url} within {self.config.timeout_s:g} s: {error}") from error
        try:
            return json.loads(text)
        except ValueError:
            raise RunFailed(f"reward 'http': {self.config.url} answered {text[:QUOTED]!r}, which is no JSON") from None
