"""A server that does what a test wants: it answers, slowly too, refuses, or breaks off.

It speaks as much of the API as the playground asks for.
"""

import contextlib
import json
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

FOLDERS = [files("mor.server") / "page", files("mor.page")]
FILES = {
    item.name: item.read_bytes()
    for folder in FOLDERS
    for item in folder.iterdir()
    if item.name.endswith((".html", ".css", ".js"))
}
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}


@dataclass
class Script:
    """What the server does from now on."""

    tokens: list[tuple[str, str, int]] = field(default_factory=list)
    """New text, name and depth of each."""
    model: dict[str, Any] = field(
        default_factory=lambda: {
            "num_recursions": 3,
            "depths": {"min": 1.2, "max": 3.0},
            "has_chat_template": True,
        }
    )
    name: str = "tiny"
    refusal: tuple[int, dict[str, str], str] | None = None
    """Status, headers and message in place of an answer."""
    key: str | None = None
    break_after: int | None = None
    """Tokens after which the connection breaks."""
    fail_after: int | None = None
    """Tokens after which an error comes as an event."""
    hold_at: int | None = None
    """The token before which the answer waits for ``go_on``; -1 is before it begins."""
    go_on: threading.Event = field(default_factory=threading.Event)
    client_left: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Path and body of the requests for an answer."""
    stats: dict[str, Any] = field(
        default_factory=lambda: {
            "tokens_per_second": 41.26,
            "pages_used": 7,
            "pages": 512,
            "running": 1,
            "waiting": 0,
        }
    )

    def choice(self, chat: bool, i: int) -> dict[str, Any]:
        text, name, depth = self.tokens[i]
        top = [(name, -0.5), (" other", -1.5), ("<b>bold</b>", -2.5)]
        last = {"finish_reason": "length"} if i == len(self.tokens) - 1 else {}
        common = {"index": 0, "finish_reason": None, "depths": [depth], **last}
        if not chat:
            scores = {"tokens": [name], "token_logprobs": [-0.5], "top_logprobs": [dict(top)]}
            return {"text": text, "logprobs": scores, **common}
        entries = [{"token": token, "logprob": logprob, "bytes": []} for token, logprob in top]
        content = [{**entries[0], "top_logprobs": entries}]
        return {"delta": {"content": text}, "logprobs": {"content": content}, **common}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "FakeServer"

    def log_message(self, *_):
        pass

    def do_GET(self):
        script = self.server.script
        name = "playground.html" if self.path == "/" else self.path.removeprefix("/page/")
        if name in FILES:
            self._send(200, TYPES[name.rpartition(".")[2]], FILES[name])
        elif not self._is_known():
            self._refuse(401, {}, "no key")
        elif self.path == "/v1/models":
            self._json({"data": [{"id": script.name, "mor": script.model}]})
        elif self.path == "/stats":
            self._json(script.stats)
        else:
            self._refuse(404, {}, "there is no such path")

    def do_POST(self):
        script = self.server.script
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        script.asked.append((self.path, body))
        if not self._is_known():
            self._refuse(401, {}, "no key")
        elif script.refusal:
            self._refuse(*script.refusal)
        else:
            self._stream(script, chat="chat" in self.path)

    def _stream(self, script, *, chat):
        if script.hold_at == -1:
            script.go_on.wait()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            self._events(script, chat)
        except OSError:
            script.client_left.set()
        self.close_connection = True

    def _events(self, script, chat):
        if chat:
            self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for i in range(len(script.tokens)):
            if i == script.hold_at:
                while not script.go_on.wait(0.02):
                    self.wfile.write(b": waiting\n\n")
            if i == script.break_after:
                return
            if i == script.fail_after:
                self._event({"error": {"message": "out of <i>luck</i>"}})
                return
            self._event({"choices": [script.choice(chat, i)]})
        depths = [depth for _, _, depth in script.tokens]
        details = {"mean_depth": sum(depths) / len(depths)}
        self._event({"choices": [], "usage": {"completion_tokens_details": details}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value):
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\r\n\r\n")

    def _is_known(self):
        key = self.server.script.key
        return key is None or self.headers.get("Authorization") == f"Bearer {key}"

    def _json(self, value):
        self._send(200, "application/json", json.dumps(value).encode())

    def _refuse(self, status, headers, message):
        body = json.dumps({"error": {"message": message}}).encode()
        self._send(status, "application/json", body, headers)

    def _send(self, status, kind, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class FakeServer(ThreadingHTTPServer):
    """Serves in threads of its own from ``with`` on."""

    daemon_threads = True

    def __init__(self, script: Script, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.script, self.connections = script, []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def get_request(self):
        found = super().get_request()
        self.connections.append(found[0])
        return found

    def __exit__(self, *_):
        """Gone at once, also for those that are connected."""
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
