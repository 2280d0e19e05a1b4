"""A small HTTP server with the part of OpenAI's chat protocol that judges are asked through, and failures to order."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = tuple[int, bytes, dict[str, str]]
"""Status, body and headers in place of an answer."""

HTML: Fault = (200, b"<html>", {})
WRONG_SHAPE: Fault = (200, b'{"choices": []}', {})


def error(code: int, words: str = "", **headers: str) -> Fault:
    """An error as OpenAI words it."""
    return code, json.dumps({"error": {"message": words}}).encode(), headers


class ChatServer:
    """The server on a thread of this process. `requests` holds the bodies, `tokens` their authorization.

    Args:
        answer: prompt → what is written.
        likely: prompt → log-probabilities of the first token, by token; None = the server tells none.
        model: what it calls its model; another name is not found.
        api_key: what it asks for.

    `faults` are answered first, one a request; `delay` is how many seconds each answer takes.
    """

    def __init__(
        self,
        answer: Callable[[str], str] = lambda prompt: f"{len(prompt)}",
        likely: Callable[[str], dict[str, float]] | None = None,
        model: str = "judge",
        api_key: str | None = None,
    ) -> None:
        self.answer, self.likely, self.model, self.api_key = answer, likely, model, api_key
        self.faults: list[Fault] = []
        self.delay = 0.0
        self.requests: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                code, data, headers = server.respond(self.path, body, self.headers.get("Authorization"))
                self.send_response(code)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *words: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *about: object) -> None:
                pass  # a client that has left is part of a test

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port: connections are refused from now on."""
        self._http.shutdown()
        self._http.server_close()

    def respond(self, path: str, body: dict[str, Any], token: str | None) -> Fault:
        """Status, body and headers of the answer to one request."""
        with self._lock:
            self.requests.append(body)
            self.tokens.append(token)
            fault = self.faults.pop(0) if self.faults else None
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            time.sleep(self.delay)
            if fault is not None:
                return fault
            if self.api_key is not None and token != f"Bearer {self.api_key}":
                return error(401, "Incorrect API key provided")
            if path != "/v1/chat/completions" or body["model"] != self.model:
                return error(404, f"The model `{body['model']}` does not exist.")
            return 200, json.dumps(self.complete(body)).encode(), {}
        finally:
            with self._lock:
                self._at_once -= 1

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """A chat completion."""
        prompt = body["messages"][-1]["content"]
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": self.answer(prompt)},
            "finish_reason": "stop",
        }
        if body.get("logprobs") and self.likely is not None:
            top = sorted(self.likely(prompt).items(), key=lambda item: -item[1])[: body["top_logprobs"]]
            tops = [{"token": token, "logprob": logp} for token, logp in top]
            choice["logprobs"] = {"content": [{**tops[0], "top_logprobs": tops}]}
        return {"object": "chat.completion", "model": self.model, "choices": [choice]}
