"""A small HTTP server with the part of vLLM's interface that the engine speaks, over a tiny transformers model.

It answers as vLLM 0.32 was seen to: same paths, names, refusals, clamping of lengths, and pause without an answer. As
a process, `python -m tests.rollout.vllm_server --model FOLDER --port N`, it takes the flags of vLLM's own server.
"""

import argparse
import json
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import log
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODES = ("processed_logprobs", "raw_logprobs")


class Refused(Exception):
    """An error of HTTP, with its code and words."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(code, words)
        self.code, self.words = code, words


class VllmServer:
    """The server on a thread of this process. `requests` holds what was asked for: path and body.

    Faults to order: `delay` seconds before every completion; `die_after` so many completions it closes every connection
    and its port; `answers`, by path, stand in for the server's own (a Refused is raised, another value returned).
    """

    def __init__(
        self,
        model: Path,
        *,
        name: str = "tiny",
        port: int = 0,
        host: str = "127.0.0.1",
        max_model_len: int | None = None,
        mode: str = "processed_logprobs",
        dev_mode: bool = True,
        api_key: str | None = None,
    ) -> None:
        assert mode in MODES
        self.folder, self.name, self.host, self.port = model, name, host, port
        self.mode, self.dev_mode, self.api_key = mode, dev_mode, api_key
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.length = max_model_len
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Any] = {}
        self.delay = 0.0
        self.die_after: int | None = None
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._http: ThreadingHTTPServer | None = None
        self._open: set[socket.socket] = set()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def __enter__(self) -> "VllmServer":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def start(self) -> None:
        """Serve the weights the server was made with, whatever it held before."""
        self.weights = self._load(self.folder)
        self.length = self.length or self.weights.config.max_position_embeddings
        self.version, self.awake = "default", threading.Event()
        self.awake.set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def setup(self) -> None:
                super().setup()
                server._open.add(self.request)

            def finish(self) -> None:
                server._open.discard(self.request)
                super().finish()

            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, body: dict[str, Any]) -> None:
                try:
                    code, said = 200, server.answer(self.path, body, self.headers.get("Authorization"))
                except Refused as error:
                    code, said = error.code, {"error": {"message": error.words, "code": error.code}}
                data = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *words: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *about: object) -> None:
                pass  # a connection that `kill` closed

        self._http = Quiet((self.host, self.port), Handler)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def kill(self) -> None:
        """Close the port and every connection, as the end of a process does."""
        http, self._http = self._http, None
        if http is None:
            return
        http.shutdown()
        http.server_close()
        for connection in list(self._open):
            connection.shutdown(socket.SHUT_RDWR)

    def answer(self, path: str, body: dict[str, Any], authorization: str | None = None) -> Any:
        self.requests.append((path, body))
        if path == "/health":
            return b""
        if self.api_key is not None and authorization != f"Bearer {self.api_key}":
            raise Refused(401, "Unauthorized")
        if path in self.answers:
            found = self.answers[path]
            found = found(body) if callable(found) else found
            if isinstance(found, Exception):
                raise found
            if found is not None:
                return found
        if path == "/v1/models":
            return {"data": [{"id": self.name, "root": str(self.folder), "max_model_len": self.length}]}
        if path == "/v1/completions":
            return self._counted(body)
        if not self.dev_mode:
            raise Refused(404, "Not Found")
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return {"success": True, "new_version": self.version}
        if path == "/pause":
            self.awake.clear()
            return {"status": "paused"}
        if path == "/resume":
            self.awake.set()
            return {"status": "resumed"}
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path == "/collective_rpc" and body["method"] == "reload_weights":
            assert not self.awake.is_set()
            with self._lock:
                try:
                    self.weights = self._load(Path(body["kwargs"]["weights_path"]))
                except OSError as error:
                    raise Refused(500, f"Call to collective_rpc method failed: {error}") from error
            return {"results": [None]}
        raise Refused(404, "Not Found")

    def _load(self, folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder).eval()

    def _counted(self, body: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            if self.die_after is not None:
                self.die_after -= 1
                if self.die_after < 0:
                    self.die_after = None
                    threading.Thread(target=self.kill).start()
                    time.sleep(1.0)
        try:
            time.sleep(self.delay)
            self.awake.wait()
            return self.complete(body)
        finally:
            with self._lock:
                self._at_once -= 1

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """One completion, drawn token by token."""
        if body["model"] != self.name:
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        prompt = body["prompt"]
        room = min(body["max_tokens"], self.length - len(prompt))
        if room < 1:
            raise Refused(400, f"max_tokens must be at least 1, got {room}.")
        if max(prompt) >= self.weights.config.vocab_size:
            raise Refused(400, f"Token id {max(prompt)} is out of vocabulary")
        random = torch.Generator().manual_seed(body.get("seed") or 0)
        tokens: list[int] = []
        logps: list[float] = []
        reason = "length"
        while len(tokens) < room:
            with self._lock:
                logits = self.weights(torch.tensor([[*prompt, *tokens]])).logits[0, -1].double()
            raw = logits.log_softmax(-1)
            processed = _support(logits, body).log_softmax(-1)
            token = int(torch.multinomial(processed.exp(), 1, generator=random))
            if body.get("temperature") == 0:
                token = int(logits.argmax())
            tokens.append(token)
            logps.append(float((raw if self.mode == "raw_logprobs" else processed)[token]))
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if token in body.get("stop_token_ids", ()) or any(stop in text for stop in body.get("stop", ())):
                reason = "stop"
                break
        choice = {"logprobs": {"token_logprobs": logps}, "finish_reason": reason}
        if body.get("return_token_ids"):
            choice["token_ids"] = tokens
        return {"object": "text_completion", "model": self.name, "choices": [choice]}


def _support(logits: torch.Tensor, body: dict[str, Any]) -> torch.Tensor:
    """[V] logits after temperature, min-p, top-k and top-p, -inf for what may not be drawn."""
    allowed = body.get("allowed_token_ids")
    if allowed is not None:
        kept = torch.full_like(logits, -torch.inf)
        kept[allowed] = logits[allowed]
        logits = kept
    logits = logits / (body.get("temperature", 1.0) or 1.0)
    if body.get("min_p", 0.0) > 0:
        logits = logits.masked_fill(logits < logits.max() + log(body["min_p"]), -torch.inf)
    if body.get("top_k", 0) > 0:
        logits = logits.masked_fill(logits < logits.topk(body["top_k"]).values[-1], -torch.inf)
    ordered, order = logits.sort(descending=True)
    shares = ordered.softmax(-1)
    ordered = ordered.masked_fill(shares.cumsum(-1) - shares >= body.get("top_p", 1.0), -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(0, order, ordered)


def main() -> None:
    """Serve until the process ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--logprobs-mode", default="raw_logprobs", choices=MODES)
    parser.add_argument("--generation-config")
    given = parser.parse_args()
    server = VllmServer(
        given.model,
        name=given.served_model_name,
        port=given.port,
        host=given.host,
        max_model_len=given.max_model_len,
        mode=given.logprobs_mode,
        dev_mode=os.environ.get("VLLM_SERVER_DEV_MODE") == "1",
    )
    server.start()
    print(f"serving {given.served_model_name} in {given.dtype}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
