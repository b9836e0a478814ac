"""A loopback server that speaks the OpenAI chat protocol, counts requests, and fails on demand."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWER: dict[str, Any] = {
    "domain": "object",
    "normal": [f"an even surface number {number}" for number in range(6)],
    "defects": [{"name": f"defect {number}", "look": f"a dark mark number {number}"} for number in range(6)],
}

Reply = tuple[int, dict[str, str], str]
"""Status, headers and body of a scripted answer; status 0 closes the connection without one, HANG never answers."""

HANG: Reply = (-1, {}, "")


def chat(content: str | None, finish: str = "stop", **message: str) -> Reply:
    """A well-formed answer of the chat protocol with this content. message: other keys beside it."""
    body = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "test",
        "choices": [
            {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150},
    }
    return 200, {}, json.dumps(body)


class LLMServer:
    """Context manager. script: replies for the next requests, in order; afterwards every answer is good.

    on_request is called with the class of each request before it is answered; a question about no class counts as "".
    refuse: what the server answers to a request that it does not take, else None.
    """

    def __init__(
        self,
        script: list[Reply] | None = None,
        on_request: Callable[[str], None] = lambda _: None,
        refuse: Callable[[dict[str, Any]], Reply | None] = lambda _: None,
    ) -> None:
        self.script = list(script or [])
        self.requests: Counter[str] = Counter()
        self.bodies: list[str] = []
        self._on_request, self._refuse = on_request, refuse
        self._lock, self._over = threading.Lock(), threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True

    @property
    def api_base(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> LLMServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                request = json.loads(body)
                messages, refusal = request["messages"], server._refuse(request)
                class_name = json.loads(messages[1]["content"])["class"] if len(messages) > 1 else ""
                with server._lock:
                    server.requests[class_name] += 1
                    server.bodies.append(body)
                    good = chat(json.dumps(ANSWER) if class_name else "ready")
                    status, headers, text = refusal or (server.script.pop(0) if server.script else good)
                server._on_request(class_name)
                if status < 0:
                    server._over.wait()
                if status <= 0:
                    self.connection.close()
                    return
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        return Handler
