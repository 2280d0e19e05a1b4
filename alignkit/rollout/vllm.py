"""Completions from a vLLM server that runs in an environment of its own. Hides HTTP, lost connections and the server.

Prompts go out as token ids, and token ids come back with their log-probabilities, one request a completion. A request
carries its own seed, so that a completion depends neither on the others nor on the number of ranks.

The server is marked with the version of the weights it was given. Completions count only if the mark is still there
when they are done: a server that was started anew, or that another run has used, has lost it, gets the weights again
and writes the completions again. As nothing but HTTP is spoken, vLLM need not be installed here.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from safetensors import SafetensorError

from alignkit.core.contracts import World
from alignkit.core.errors import AlignkitError, DataError, EnvironmentProblem, RunFailed
from alignkit.core.rng import key
from alignkit.core.types import Completion, Group
from alignkit.rollout.config import RolloutConfig

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
"""Seconds between two attempts to reach the server."""
SHORT = 10.0
"""Seconds for an answer that costs the server nothing."""
QUOTED = 300
"""Characters of the server's words that a message quotes."""
NEVER = -9999.0
"""What vLLM reports for a probability of 0, which nothing drawn can have."""

_Place = tuple[int, int]
"""Which completion: the number of its group, and its own within the group."""


class _Lost(Exception):
    """The server gave no whole answer, which may be otherwise later. `waited`: seconds it was silent before."""

    def __init__(self, reason: str, waited: float = 0.0) -> None:
        super().__init__(reason, waited)
        self.reason = reason
        self.waited = waited


class VllmEngine:
    """Gives groups their missing completions, written by the server at `config.url`. All ranks make the same calls.

    Args:
        config: address, deadline and sampling.
        model: what the server calls the model, unless `config.served_name` does.
        write: puts the policy's weights as they are now into a new folder that vLLM loads, adapters merged; called on
            rank 0 only.
        folder: where those folders go, one of the engine's own that the server can read; `config.weights_folder` names
            another place for it.
        decode: token ids (without the stop token) → text.
        stop_ids: tokens that end a completion; the one drawn is kept as its last token.
        seed: root of the keys of all draws.
        say: told when the server is away, and when it is back.
    """

    def __init__(
        self,
        config: RolloutConfig,
        *,
        model: str,
        write: Callable[[Path], None],
        folder: Path,
        decode: Callable[[list[int]], str],
        stop_ids: Collection[int],
        seed: int,
        world: World,
        say: Callable[[str], None],
    ) -> None:
        self.config = config
        self.url = config.url.rstrip("/")
        self.name = config.served_name or model
        self.write = write
        self.folder = folder.absolute()
        if config.weights_folder is not None:  # it may be many runs', and what is in it somebody's
            own = f"alignkit-{key(0, 'weights', str(self.folder)):x}"
            self.folder = Path(config.weights_folder).expanduser().absolute() / own
        self.decode = decode
        self.stop_ids = sorted(stop_ids)
        self.seed = seed
        self.world = world
        self.say = say
        self.version = 0
        self._headers = {"Content-Type": "application/json"}
        token = api_key(config)
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        # The server is a neighbour: what stands between this machine and the internet does not know it.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._run = uuid.uuid4().hex
        self._context = 0
        self._written: Path | None = None
        self._given: str | None = None
        self._away: float | None = None
        self._pause = FIRST_PAUSE

    def sync(self, version: int) -> None:
        """Take note that the weights are now those of `version`; the server gets them with the next prompt."""
        self.version = version

    def close(self) -> None:
        """Remove the weights that were written for the server."""
        if self.world.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def fill(self, groups: list[Group], n: int) -> list[Group]:
        """The same groups with at least `n` completions each; a full group is returned as it is, none is changed.

        A sample's `logps` are of the distribution it was drawn from: after temperature, top-k, top-p and min-p, so 0
        when the temperature is 0.

        Raises:
            DataError: a prompt is empty, or leaves no room in the server's context.
            EnvironmentProblem: the weights cannot be written.
            RunFailed: the server refuses, is another than the recipe's, or is away for longer than `deadline`.
        """
        wanted = [(row, i) for row, group in enumerate(groups) for i in range(len(group.completions), n)]
        written: dict[_Place, Completion] = {}
        if any(self.world.gather(len(wanted))):
            self._hold(None, 0)
        while any(self.world.gather(len(wanted))):
            drawn, trouble = self._draw(groups, wanted)
            if self._hold(trouble, len(drawn)):
                written |= drawn
                wanted = [place for place in wanted if place not in drawn]
        filled = []
        for row, group in enumerate(groups):
            new = [written[row, i] for i in range(len(group.completions), n)]
            filled.append(replace(group, completions=[*group.completions, *new]) if new else group)
        return filled

    def _hold(self, trouble: Exception | None, drawn: int) -> bool:
        """Wait until the server holds the weights of this version; whether it has held them all along.

        `trouble` is what kept this rank from the rest, `drawn` how many completions it got.
        """
        found = self._agree((trouble, drawn), trouble)
        held, problem = False, None
        if self.world.rank == 0:
            losses = [loss for loss, _ in found if isinstance(loss, _Lost)]
            try:
                held = self._restore(max(losses, key=lambda loss: loss.waited, default=None), sum(n for _, n in found))
            except AlignkitError as error:
                problem = error
        all_along, self._context = self._agree((held, self._context), problem)[0]
        return bool(all_along)

    def _agree(self, fact: Any, problem: Exception | None) -> list[Any]:
        """Every rank's fact. What stops one rank is raised on all: none may wait for one that is gone."""
        found = self.world.gather((fact, problem if isinstance(problem, AlignkitError) else None))
        for _, stops in found:
            if stops is not None:
                raise stops
        return [each for each, _ in found]

    def _restore(self, loss: _Lost | None, drawn: int) -> bool:
        """`_hold` on the rank that speaks for all: what became of the last draws is `loss` and `drawn`."""
        held, loss_free = True, loss is None
        while True:
            if loss is not None:
                self._wait(loss)
            try:
                if self._given is None:
                    self._meet()
                if self._get("/weight_info").get("weight_version") == self._mark:
                    break
                held = False
                self._give()
            except _Lost as error:
                loss = error
        if self._away is not None and held and (drawn or loss_free):
            self.say(f"the vLLM server at {self.url} works again after {time.monotonic() - self._away:.0f} s")
            self._away = None
        return held

    def _wait(self, loss: _Lost) -> None:
        """Say once that the server is away, and wait a little. Raises RunFailed at the deadline."""
        now, deadline = time.monotonic(), self.config.deadline
        if self._away is None:
            self._away, self._pause = now - loss.waited, FIRST_PAUSE
            self.say(f"the vLLM server at {self.url}: {loss.reason}; trying for {deadline:g} s (rollout.deadline)")
        left = self._away + deadline - now
        if left <= 0:
            raise RunFailed(
                f"the vLLM server at {self.url} did not do its work for {deadline:g} s (rollout.deadline), at last: "
                f"{loss.reason}. Look into its log, start it again (`alignkit rollout serve RECIPE`) and continue the "
                "run with `alignkit resume`; a server that is only slow needs a longer deadline."
            )
        time.sleep(min(self._pause, left))
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    @property
    def _mark(self) -> str:
        """What the server is marked with while it holds this run's weights of this version."""
        return f"{self._run}-{self.version}"

    def _give(self) -> None:
        """Bring the server to the weights of this version, and mark it."""
        if self._given == self._mark:
            self._given = None
            raise _Lost("it lost the weights it was given, so it was started anew or serves another run too")
        weights = self._weights()
        self._post("/pause")
        self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(weights)}})
        if not self._post("/reset_prefix_cache").get("success", True):
            raise _Lost("it did not forget what it had computed with earlier weights")
        self._post("/resume")
        self._try_out()
        self._post("/update_weight_version", {"new_version": self._mark})
        self._given = self._mark

    def _meet(self) -> None:
        """Ask what the server serves. Raises RunFailed when it is not the run's model."""
        cards = {card["id"]: card for card in self._get("/v1/models").get("data", ())}
        if self.name not in cards:
            raise RunFailed(
                f"the vLLM server at {self.url} serves {', '.join(map(repr, cards)) or 'no model'}, and this run's is "
                f"{self.name!r}. Start it with `alignkit rollout serve RECIPE`, or say in rollout.served_name what it "
                "calls the same model."
            )
        self._context = int(cards[self.name]["max_model_len"])

    def _try_out(self) -> None:
        """Raises RunFailed unless the server's log-probabilities are of what it draws from.

        Where only one token may be drawn its probability is 1. Other ways of counting say how likely the model finds
        it, and of two tokens one has less than half.
        """
        for token in (0, 1):
            tokens, logps = self._ask({"prompt": [0], "max_tokens": 1, "allowed_token_ids": [token]})
            if tokens != [token] or abs(logps[0]) > 1e-3:
                raise RunFailed(
                    f"the vLLM server at {self.url} may draw only token {token}, drew {tokens} and gave it the "
                    f"log-probability {logps[0]:.4g} instead of 0. Training needs those of the distribution that is "
                    "drawn from: start it with --logprobs-mode processed_logprobs, as `alignkit rollout serve` does."
                )

    def _weights(self) -> Path:
        """The folder with the weights of this version, written once; the one before is kept too."""
        final, before = self.folder / f"version-{self.version}", self._written
        if before == final and final.is_dir():
            return final
        temporary = self.folder / f".writing-version-{self.version}"
        try:
            for path in {*self._folders()} - {before}:
                shutil.rmtree(path)
            self.folder.mkdir(parents=True, exist_ok=True)
            self.write(temporary)
            temporary.rename(final)
        except (OSError, SafetensorError) as error:
            raise EnvironmentProblem(
                f"the weights for the vLLM server cannot be written to {self.folder}: {error}. Make room there, or "
                "name another folder that the server can read in rollout.weights_folder."
            ) from error
        self._written = final
        return final

    def _folders(self) -> list[Path]:
        return [*self.folder.glob("version-*"), *self.folder.glob(".writing-version-*")]

    def _draw(
        self, groups: Sequence[Group], wanted: Sequence[_Place]
    ) -> tuple[dict[_Place, Completion], Exception | None]:
        """As many of the wanted completions as the server gives, and what came between."""
        drawn: dict[_Place, Completion] = {}
        trouble: Exception | None = None
        todo, done = deque(wanted), SimpleQueue[tuple[_Place, Completion | BaseException] | None]()

        def work() -> None:
            while todo:
                try:
                    place = todo.popleft()
                except IndexError:  # another thread was quicker
                    break
                try:
                    done.put((place, self._complete(groups[place[0]], place[1])))
                except BaseException as error:  # raised where the draws are waited for
                    todo.clear()
                    done.put((place, error))
            done.put(None)

        threads = min(len(wanted), self.config.max_requests)
        for _ in range(threads):
            # a daemon: a request under way must not keep an interrupted process from ending, as a pool's would
            threading.Thread(target=work, daemon=True).start()
        while threads:
            answer = done.get()
            if answer is None:
                threads -= 1
            elif isinstance(answer[1], Completion):
                drawn[answer[0]] = answer[1]
            elif not isinstance(answer[1], AlignkitError | _Lost):
                raise answer[1]
            elif trouble is None or isinstance(trouble, _Lost):
                trouble = answer[1]
        return drawn, trouble

    def _complete(self, group: Group, index: int) -> Completion:
        """One completion of the group's prompt."""
        config, room = self.config, self._context - len(group.prompt)
        if not group.prompt:
            raise DataError(f"group {group.id!r}: its prompt has no tokens, and nothing can be written after nothing")
        if room < 1:
            raise DataError(
                f"group {group.id!r}: its prompt has {len(group.prompt)} tokens and the context of the vLLM server is "
                f"{self._context} (--max-model-len), which leaves no room for a completion; shorten the prompt "
                "(train.max_length cuts it)"
            )
        tokens, logps = self._ask(
            {
                "prompt": group.prompt,
                "max_tokens": min(config.max_completion_length, room),
                "temperature": config.temperature,
                "top_p": config.top_p,
                "top_k": config.top_k,
                "min_p": config.min_p,
                "stop": config.stop_strings,
                "include_stop_str_in_output": True,
                "stop_token_ids": self.stop_ids,
                "seed": key(self.seed, "sample", self.version, group.id, index),
            }
        )
        stopped = tokens[-1] in self.stop_ids
        text = self.decode(tokens[:-1] if stopped else tokens)
        ends = [text.index(stop) for stop in config.stop_strings if stop in text]
        return Completion(
            text[: min(ends, default=None)],
            tokens,
            logps=logps if config.temperature else [0.0] * len(tokens),
            version=self.version,
            ended=stopped or bool(ends),
        )

    def _ask(self, body: Mapping[str, Any]) -> tuple[list[int], list[float]]:
        """The tokens the server writes, at least one, and their log-probabilities."""
        # What a request leaves out the server takes from the model's generation_config.json.
        plain = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True}
        wishes = {"model": self.name, "logprobs": 0, "return_token_ids": True}
        answer = self._post("/v1/completions", {**plain, **wishes, **body})
        try:
            choice = answer["choices"][0]
            tokens, logps, reason = choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"]
        except (KeyError, IndexError, TypeError):
            raise RunFailed(
                f"the vLLM server at {self.url} answered {json.dumps(answer)[:QUOTED]}, without the token_ids and "
                "log-probabilities that were asked for; vLLM 0.32 gives them"
            ) from None
        if reason not in ("stop", "length"):
            raise _Lost(f"it gave up a completion ({reason})")
        if not tokens or len(tokens) != len(logps):
            raise RunFailed(
                f"the vLLM server at {self.url} answered {len(tokens)} tokens with {len(logps)} log-probabilities"
            )
        for token, logp in zip(tokens, logps, strict=True):
            if logp is None or not isfinite(logp) or logp <= NEVER:
                raise RunFailed(
                    f"the vLLM server at {self.url} drew token {token} with log-probability {logp}, so its logits are "
                    "not finite or not what it drew from. Look into its log; the weights of this version are in "
                    f"{self._written or self.folder}."
                )
        return tokens, logps

    def _get(self, path: str) -> dict[str, Any]:
        return self._call(path, None, min(SHORT, self.config.deadline))

    def _post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self._call(path, json.dumps(body or {}).encode(), self.config.deadline)

    def _call(self, path: str, data: bytes | None, seconds: float) -> dict[str, Any]:
        """The server's answer. Raises RunFailed when it refuses, _Lost when it may answer later."""
        request = urllib.request.Request(self.url + path, data, self._headers)
        began = time.monotonic()
        try:
            with self._opener.open(request, timeout=seconds) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            raise self._refusal(path, error) from None
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, TimeoutError):
                raise _Lost(f"no answer to {path} within {seconds:g} s", time.monotonic() - began) from None
            raise _Lost(f"{path} failed with {type(cause).__name__}: {cause}") from None
        try:
            answer = json.loads(text or b"{}")
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise RunFailed(f"{self.url}{path} answered {text[:QUOTED]!r}, which no vLLM server does; see rollout.url")
        return answer

    def _refusal(self, path: str, error: urllib.error.HTTPError) -> Exception:
        """What an HTTP error means: come again, or give up."""
        said = f"{error.code} {server_words(error)}"
        if error.code in (408, 429) or (error.code >= 500 and not self._is_well()):
            return _Lost(f"{path} failed with {said}")
        hint = ""
        if error.code in (401, 403):
            hint = " Name the environment variable that holds its API key in rollout.token_env."
        elif path == "/collective_rpc" and error.code >= 500:
            hint = f" It must hold a model of the same shape, and be able to read {self._written}."
        elif error.code in (404, 405) and path.startswith("/v1/"):
            hint = " Is it a vLLM server? See rollout.url."
        elif error.code in (404, 405):
            hint = " It takes new weights only with VLLM_SERVER_DEV_MODE=1 in its environment, from vLLM 0.32 on."
        return RunFailed(f"the vLLM server at {self.url} refused {path}: {said}.{hint}")

    def _is_well(self) -> bool:
        try:
            with self._opener.open(urllib.request.Request(f"{self.url}/health", headers=self._headers), timeout=SHORT):
                return True
        except (OSError, http.client.HTTPException):
            return False


def api_key(config: RolloutConfig) -> str | None:
    """The server's API key. Raises EnvironmentProblem when the environment lacks the variable that holds it."""
    if config.token_env is None:
        return None
    if not os.environ.get(config.token_env):
        raise EnvironmentProblem(
            f"rollout.token_env names {config.token_env!r}, and there is no such environment variable"
        )
    return os.environ[config.token_env]


def server_words(error: urllib.error.HTTPError) -> str:
    """What the server says of an error, without the wrapping."""
    try:
        text = error.read().decode("utf-8", errors="replace")
    except (OSError, http.client.HTTPException):
        return error.reason
    try:
        found = json.loads(text)
        return str(found["error"]["message"])[:QUOTED]
    except (ValueError, KeyError, TypeError):
        return (text or error.reason)[:QUOTED]
