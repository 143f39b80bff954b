"""A receiver of webhooks on loopback, which does by the path of a message what receivers do."""

import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LONG = b"x" * 100_000


@dataclass
class Heard:
    """Requests that came: path, headers, body."""

    port: int = 0
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)

    def of(self, path: str) -> list[tuple[dict[str, str], bytes]]:
        return [(headers, body) for asked, headers, body in list(self.requests) if asked == path]

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


@contextmanager
def running_receiver(tls: ssl.SSLContext | None = None) -> Iterator[Heard]:
    """A receiver, and what it hears."""
    heard = Heard()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            heard.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            answers = {"/fail": 500, "/redirect": 302, "/gone": 410, "/later": 503, "/long": 400}
            self.send_response(answers.get(self.path, 204))
            if self.path == "/redirect":
                self.send_header("Location", heard.url("/elsewhere"))
            if self.path == "/later":
                self.send_header("Retry-After", "600")
            if self.path == "/slow":
                self._drip()
                return
            self.end_headers()
            if self.path in ("/fail", "/long"):
                self.wfile.write(b"no \0 \xff" if self.path == "/fail" else LONG)

        def _drip(self) -> None:
            """A header a moment, for ever: each read of the sender succeeds."""
            self.send_response(200)
            for number in range(200):
                self.wfile.write(f"X-{number}: {number}\r\n".encode())
                self.wfile.flush()
                time.sleep(0.05)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # senders hang up

    server = Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    heard.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield heard
    finally:
        server.shutdown()
        server.server_close()
