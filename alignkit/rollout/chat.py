"""A model behind a server that speaks OpenAI's protocol, as a judge. Hides HTTP, lost connections and refusals.

What may be otherwise later (nobody answers, 408, 429, 5xx, silence) is asked again after growing pauses, an answer that
is none once more, a refusal never.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from math import exp, log
from typing import Any, TypeVar

from alignkit.core.errors import EnvironmentProblem, RunFailed
from alignkit.core.rng import key
from alignkit.models.config import RosterModelConfig
from alignkit.rollout.vllm import QUOTED, server_words

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between two attempts."""
TOP = 20
"""Tokens whose log-probabilities a server is asked for: the most that the protocol has."""


class _Later(Exception):
    """The server gave no answer, which may be otherwise later. `pause`: seconds it asked for."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason, pause)
        self.reason, self.pause = reason, pause


class _Malformed(Exception):
    """The server answered something that is not of the protocol."""


class ChatModel:
    """A judge behind `config.endpoint`.

    Args:
        config: address, deadline and attempts.
        name: what the recipe calls the model, and so does the server unless `config.served_name` is given.
        sleep: waits so many seconds.

    Raises:
        EnvironmentProblem: the environment lacks the variable that holds the server's API key.
    """

    def __init__(self, config: RosterModelConfig, name: str, sleep: Callable[[float], None] = time.sleep) -> None:
        self.config = config
        self.url = f"{str(config.endpoint).rstrip('/')}/chat/completions"
        self.block = f"models.{name}"
        self.served_name = config.served_name or name
        self._sleep = sleep
        self._headers = {"Content-Type": "application/json"}
        self._told = False
        if config.token_env is not None:
            if not os.environ.get(config.token_env):
                raise EnvironmentProblem(
                    f"{self.block}.token_env names {config.token_env!r}, and there is no such environment variable"
                )
            self._headers["Authorization"] = f"Bearer {os.environ[config.token_env]}"

    def identity(self) -> str:
        """The server and the model's name there: of what is behind it nothing is known."""
        return f"{self.served_name} at {self.config.endpoint}"

    def generate(
        self, prompts: Sequence[str], n: int, temperature: float, max_tokens: int, stop: Sequence[str]
    ) -> list[list[str]]:
        """`n` answers to each prompt; "" where it wrote nothing. Draws carry a seed, which a server may not heed.

        Raises:
            EnvironmentProblem: the server cannot be reached or does not know key or model.
            RunFailed: it refuses a request, or its answers are none.
        """
        bodies: list[dict[str, Any]] = []
        for prompt in prompts:
            for number in range(n):
                body = {"messages": _turn(prompt), "temperature": temperature, "max_tokens": max_tokens}
                drawn = {"seed": key(0, "chat", prompt, number) % 2**31} if temperature else {}
                bodies.append({**body, **drawn, **({"stop": list(stop)} if stop else {})})
        found = self._all(bodies, _text)
        return [found[start : start + n] for start in range(0, len(found), n)]

    def choices(self, prompts: Sequence[str], answers: Sequence[str]) -> list[list[float]]:
        """[B][n] nats: how likely an answer's *first* token is each of these, white space left out.

        One that is not among the likeliest is taken to be as likely as the least of them, which is told once.

        Raises:
            EnvironmentProblem: as `generate`, or the server tells no log-probabilities.
            RunFailed: as `generate`.
        """
        # Nothing is drawn of it: temperature and top_p are those under which no server changes what it tells.
        shape = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "logprobs": True, "top_logprobs": TOP}
        found = self._all([{"messages": _turn(prompt), **shape} for prompt in prompts], self._likeliest)
        table = [[tokens.get(answer.strip()) for answer in answers] for tokens in found]
        missing = sum(logp is None for row in table for logp in row)
        if missing and not self._told:
            self._told = True
            warnings.warn(
                f"{self.block}: {missing} of {len(prompts) * len(answers)} answers to choose from are not among the "
                f"{TOP} likeliest tokens; each counts as the least of them. Does the template say clearly what to "
                "write, and is each answer a single token?",
                stacklevel=2,
            )
        return [
            [min(tokens.values()) if logp is None else logp for logp in row]
            for row, tokens in zip(table, found, strict=True)
        ]

    def _likeliest(self, answer: Any) -> dict[str, float]:
        """Token → log-probability, of the first place. Raises EnvironmentProblem where the server does not tell."""
        told = _choice(answer).get("logprobs")
        try:
            tops = told["content"][0]["top_logprobs"] if told else []
            found: dict[str, float] = {}
            for top in tops:
                # variants of one word, such as with a space in front, add up
                word, p = top["token"].strip(), exp(top["logprob"])
                found[word] = found.get(word, 0.0) + p
            table = {word: log(max(p, 1e-300)) for word, p in found.items()}
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError):
            raise _Malformed(json.dumps(answer)[:QUOTED]) from None
        if not table:
            raise EnvironmentProblem(
                f"{self.block}: the server at {self.url} tells no log-probabilities. Give the judge `verdict: text`, "
                "or mode rating in place of rating_expected"
            )
        return table

    def _all(self, bodies: Sequence[Mapping[str, Any]], read: Callable[[Any], T]) -> list[T]:
        """Every answer, `config.max_requests` at a time. The first failure ends the others."""
        failed = threading.Event()

        def one(body: Mapping[str, Any]) -> T:
            if failed.is_set():
                raise CancelledError
            try:
                return self._one(body, read)
            except BaseException:
                failed.set()
                raise

        with ThreadPoolExecutor(self.config.max_requests) as pool:
            waiting = [pool.submit(one, body) for body in bodies]
            try:
                wait(waiting)
            finally:
                failed.set()  # where the wait was broken off, what has not begun must not begin
        for future in waiting:
            problem = future.exception()
            if problem is not None and not isinstance(problem, CancelledError):
                raise problem
        return [future.result() for future in waiting]

    def _one(self, body: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        lost, malformed = 0, 0
        while True:
            try:
                return read(self._post({"model": self.served_name, **body}))
            except _Later as later:
                if lost == self.config.retries:
                    raise EnvironmentProblem(
                        f"{self.block}: the server at {self.url} did not answer {lost + 1} times, at last: "
                        f"{later.reason}. Start it or look into its log, then go on with `alignkit resume`; one that "
                        f"is only slow needs a longer {self.block}.timeout or fewer {self.block}.max_requests."
                    ) from None
                self._sleep(max(min(FIRST_PAUSE * 2**lost, LONGEST_PAUSE), later.pause))
                lost += 1
            except _Malformed as answer:
                if malformed:
                    raise RunFailed(
                        f"{self.block}: the server at {self.url} answered {answer} twice; expected a chat completion "
                        f"of OpenAI's protocol. Is {self.block}.endpoint its address up to and with /v1?"
                    ) from None
                malformed += 1

    def _post(self, body: Mapping[str, Any]) -> Any:
        """The server's answer. Raises _Later, _Malformed, and what `_refusal` makes of an error of HTTP."""
        request = urllib.request.Request(self.url, json.dumps(body).encode(), self._headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self.config.timeout) as response:
                text = response.read().decode("utf-8", errors="replace")
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, TimeoutError):
                raise _Later(f"no answer within {self.config.timeout:g} s") from None
            raise _Later(f"{type(cause).__name__}: {cause}") from None
        try:
            return json.loads(text)
        except ValueError:
            raise _Malformed(repr(text[:QUOTED])) from None

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """What an error of HTTP means: come again, or give up."""
        said = f"{error.code} {server_words(error)}"
        if error.code in (408, 429) or error.code >= 500:
            return _Later(said, _seconds(error.headers.get("Retry-After")))
        refused = f"{self.block}: the server at {self.url} refused with {said}."
        if error.code in (401, 403):
            return EnvironmentProblem(f"{refused} Name the variable that holds its API key in {self.block}.token_env.")
        if error.code == 404:
            return EnvironmentProblem(
                f"{refused} It was asked for the model {self.served_name!r}; say in {self.block}.served_name what it "
                f"calls it, and see that {self.block}.endpoint ends in /v1."
            )
        return RunFailed(refused)


def _turn(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _choice(answer: Any) -> Mapping[str, Any]:
    """The only choice of a chat completion. Raises _Malformed."""
    try:
        choice = answer["choices"][0]
        if isinstance(choice["message"], dict):
            return dict(choice)
    except (KeyError, IndexError, TypeError):
        pass
    raise _Malformed(json.dumps(answer)[:QUOTED])


def _text(answer: Any) -> str:
    content = _choice(answer)["message"].get("content") or ""  # null where it thought until its tokens were used up
    if not isinstance(content, str):
        raise _Malformed(json.dumps(answer)[:QUOTED])
    return content


def _seconds(wish: str | None) -> float:
    """What a Retry-After asks for, at most `LONGEST_PAUSE`; 0 for none and for dates."""
    return min(float(wish), LONGEST_PAUSE) if wish is not None and wish.strip().isdigit() else 0.0
