"""A live page of running work, served on this machine: `winnow status --serve runs/demo`.

Choices
- Read-only: GET and HEAD of one address. The content security policy forbids scripts and whatever
  the page does not contain itself.
- Served on a loopback address, to requests that name one. A page of another site, whose name was
  made to resolve to this machine, gets no answer. Another address must be asked for.
- The state is read at most once a second, however many browsers look at it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from models.terminal import escaped, say
from pruning.cli import status_page
from pruning.store.manifest import ArtifactError

ADDRESS = "127.0.0.1:8321"

_READ_EVERY = 1.0  # seconds
_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class AddressError(ValueError):
    """The address cannot be served on. The message says what to give."""


def serve(
    paths: Sequence[str],
    address: str,
    public: bool = False,
    started: Callable[[int], None] | None = None,
) -> None:
    """Serve the page until interrupted.

    Args:
      paths: directories to look at.
      address: HOST:PORT, or PORT on 127.0.0.1; port 0 takes any free one.
      public: allow an address that other machines can reach.
      started: called with the port.

    Raises:
      AddressError: the address is not of this machine alone and `public` is False, or is in use.
    """
    host, port = _parsed(address)
    if not (public or _is_loopback(host)):
        raise AddressError(
            f"{host} can be reached by other machines, and the page shows paths, names and errors "
            "to whoever asks: give --public as well, or forward a port of 127.0.0.1 (ssh -L)."
        )
    page = _Cached(lambda: status_page.rendered(paths))
    try:
        server = _Server((host, port), _handler(page, any_host=public and not _is_loopback(host)))
    except OSError as error:
        raise AddressError(
            f"cannot serve on {host}:{port} ({error.strerror or error}): give another, "
            "--address=HOST:PORT."
        ) from error
    with server:
        port = server.server_address[1]
        shown = f"[{host}]" if ":" in host else host
        say(f"http://{shown}:{port}/ shows {', '.join(paths)}; Ctrl-C ends it")
        if started is not None:
            started(port)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever(poll_interval=0.2)


def _parsed(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not port.isdecimal() or int(port) > 65535:
        raise AddressError(
            f"{address!r} is not an address: give --address=PORT or --address=HOST:PORT."
        )
    return host, int(port)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]):
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # NOTE: the method of the base class looks up the name of the host, which can take seconds.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: the browser has closed the connection."""


class _Cached:
    """The page, made again if it is older than `_READ_EVERY`."""

    def __init__(self, make: Callable[[], str]):
        self._make = make
        self._lock = threading.Lock()
        self._until = float("-inf")
        self._content = b""

    def __call__(self) -> bytes:
        with self._lock:
            if time.monotonic() >= self._until:
                self._content = self._make().encode("utf-8", "replace")
                self._until = time.monotonic() + _READ_EVERY
            return self._content


def _handler(page: Callable[[], bytes], any_host: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "winnow", ""
        timeout = 10  # seconds in which a request must arrive

        def do_GET(self) -> None:
            self._answer(send=True)

        def do_HEAD(self) -> None:
            self._answer(send=False)

        def _answer(self, send: bool) -> None:
            host = self.headers.get("Host", "").rpartition("@")[2]
            name = host.partition("]")[0][1:] if host.startswith("[") else host.partition(":")[0]
            if not (any_host or _is_loopback(name)):
                self.send_error(403, "this page is served to this machine alone")
            elif self.path.partition("?")[0] != "/":
                self.send_error(404)
            elif (content := self._made()) is None:
                self.send_error(500, "the page cannot be made; the server's terminal says why")
            else:
                self.send_response(200)
                for key, value in _HEADERS.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if send:
                    self.wfile.write(content)

        def _made(self) -> bytes | None:
            """Return the page, or None after a line on stderr if it cannot be made."""
            try:
                return page()
            except Exception as error:  # of any file below, which others may have written
                reason = escaped(f"{type(error).__name__}: {error}")
                say(f"error: the page cannot be made: {reason}", error=True)
                return None

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    return Handler


def require_any(paths: Sequence[str]) -> None:
    """Raise ArtifactError if a path is no directory."""
    for path in paths:
        if not Path(path).is_dir():
            raise ArtifactError(
                f"{path} is not a directory on this machine: give one with work in it."
            )
