"""A proxy in front of an object store that fails a share of the requests, as networks and overloaded servers do."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

STALL_S = 5.0
FAULTS = ("slow_down", "reset_before", "reset_after", "truncate", "stall")
"""reset_before: the request is lost. reset_after: it is served, but its answer is lost."""

_HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}


def refusal(status: int, code: str) -> tuple[int, bytes]:
    """An S3 error as servers word it."""
    return status, f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()


class FaultProxy:
    """Context manager. faults: what may befall a request; share: of the requests; applies: to which (method, path).

    The server's answers to all others pass unchanged. `injected` counts what was done, by kind; `written` holds the
    path and the bytes of each PUT.
    """

    def __init__(
        self,
        upstream: str,
        faults: Sequence[str] = FAULTS,
        share: float = 0.1,
        applies: Callable[[str, str], bool] = lambda method, path: True,
        seed: int = 0,
    ) -> None:
        self.injected: Counter[str] = Counter()
        self.requests = 0
        self.written: list[tuple[str, int]] = []
        self._upstream = urlsplit(upstream).netloc
        self._faults, self._share, self._applies = faults, share, applies
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _draw(self, method: str, path: str) -> str | None:
        with self._lock:
            self.requests += 1
            if not self._applies(method, path) or self._random.random() >= self._share:
                return None
            fault = self._random.choice(self._faults)
            self.injected[fault] += 1
            return fault

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.command == "PUT":
                    proxy.written.append((self.path, len(body)))
                fault = proxy._draw(self.command, self.path)
                if fault == "slow_down":
                    return self._answer(*refusal(503, "SlowDown"))
                if fault == "expired":
                    return self._answer(*refusal(403, "ExpiredToken"))
                if fault == "reset_before":
                    return self._reset()
                if fault == "stall":
                    time.sleep(STALL_S)
                connection = http.client.HTTPConnection(proxy._upstream, timeout=60)
                with contextlib.closing(connection):
                    connection.request(self.command, self.path, body, dict(self.headers))
                    response = connection.getresponse()
                    content = response.read()
                if fault == "reset_after" or (fault == "truncate" and not content):
                    return self._reset()
                self.send_response(response.status)
                for name, value in response.getheaders():
                    if name.lower() not in _HOP_BY_HOP:
                        self.send_header(name, value)
                length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                if fault == "truncate":
                    self.wfile.write(content[: len(content) // 2])
                    return self._reset()
                self.wfile.write(content)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

            def _answer(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def _reset(self) -> None:
                self.wfile.flush()
                # Lingering for 0 s makes close() send RST instead of FIN.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()

            def handle(self) -> None:
                with contextlib.suppress(OSError, ValueError):  # the sockets that it has closed itself
                    super().handle()

            def finish(self) -> None:
                with contextlib.suppress(OSError, ValueError):
                    super().finish()

            def log_message(self, *_: Any) -> None:
                pass

        return Handler
