"""A scoring service on the loopback that can fail on demand: a tiny CLIP behind the standard library's server."""

import json
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from flops_lightning.service import BadRequest, ClipAnswers
from tests.reference.clip import tiny_clip

Fault = tuple[int, Mapping[str, str], bytes] | float | None
"""A status with headers and a body, seconds to be silent before closing, or none."""


def storm(share: float, *, stalled: float = 0.0, silent: float = 0.0, seed: int = 0) -> Callable[[str, int], Fault]:
    """503 for a share of the attempts, silence for another, chosen by the request's key and the attempt alone."""

    def fault(key: str, attempt: int) -> Fault:
        u = zlib.crc32(f"{seed} {key} {attempt}".encode()) / 2**32
        return (503, {}, b"storm") if u < share else silent if u < share + stalled else None

    return fault


@dataclass(eq=False)
class ScoringServer:
    """Answers until it is stopped; ``with`` starts it, and again at the same port.

    ``fault(key, attempt)`` says what happens instead of an answer.
    """

    answers: Any = field(default_factory=lambda: ClipAnswers(tiny_clip().float(), model="tiny", max_rows=16))
    fault: Callable[[str, int], Fault] = lambda key, attempt: None
    change: Callable[[dict[str, Any], dict[str, Any]], Any] = lambda request, answer: answer
    port: int = 0

    def __post_init__(self) -> None:
        self.requests: list[dict[str, Any]] = []  # answered
        self.headers: list[dict[str, str]] = []
        self.attempts: Counter[str] = Counter()
        self.received = 0
        self._lock, self._up = threading.Lock(), True
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def rows(self, kind: str) -> int:
        return sum(len(request["rows"]) for request in self.requests if request["kind"] == kind)

    def start(self) -> "ScoringServer":
        server, self._up = self, True

        class Handler(BaseHTTPRequestHandler):
            protocol_version, wbufsize = "HTTP/1.1", 2**16  # head and body in one packet, or they wait for each other

            def do_GET(self) -> None:
                self.reply(*server.answer(self, "GET", {}))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.reply(*server.answer(self, self.headers["Idempotency-Key"], json.loads(body)))

            def reply(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
                if status == 0:
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, block_on_close, allow_reuse_address, request_queue_size = True, False, True, 64

            def handle_error(self, *args: Any) -> None:
                pass  # the client gave up

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def stop(self) -> None:
        self._up = False
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def answer(self, handler: Any, key: str, request: dict[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        with self._lock:
            self.received += 1
            self.attempts[key] += 1
            fault = self.fault(key, self.attempts[key])
            self.headers.append(dict(handler.headers))
        if isinstance(fault, float):
            time.sleep(fault)
            fault = (0, {}, b"")
        if not self._up:
            return 0, {}, b""  # killed: open connections break
        if fault is not None:
            return fault
        if key == "GET":
            return 200, {}, json.dumps({"model": self.answers.info.as_dict()}).encode()
        try:
            with self._lock:
                answer = self.answers(request)
                if "rows" in answer:
                    self.requests.append({**request, "key": key})
            return 200, {}, json.dumps(self.change(request, answer)).encode()
        except BadRequest as error:
            return error.status, {}, str(error).encode()

    def __enter__(self) -> "ScoringServer":
        return self.start()

    def __exit__(self, *args: object) -> None:
        self.stop()
