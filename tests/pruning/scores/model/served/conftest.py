"""A server of llama.cpp with a tiny random model, and a proxy before it that makes faults."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import importlib.util
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_HERE = Path(__file__).parent
_STARTS_IN = 60.0  # seconds
MODEL = "tiny-qwen"
KEY = "sk-test-0123456789"


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, _HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def gguf_model(tiny_judge, tmp_path_factory) -> Path:
    """The judge "qwen" as a GGUF file."""
    pytest.importorskip("gguf", reason="writes the model for llama.cpp: pip install gguf")
    _, _, model, tokenizer = tiny_judge("qwen")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    _load("to_gguf").write(path, model, tokenizer)
    return path


@contextlib.contextmanager
def serving(model: Path, *arguments: str) -> Iterator[str]:
    """Run a server in a process; yield its address with /v1."""
    process = subprocess.Popen(
        [sys.executable, str(_HERE / "serve.py"), str(model), MODEL, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        address = process.stdout.readline().strip()
        assert address, "the server did not start"
        if "://" not in address:
            address = f"http://{address}"
        yield f"{address}/v1"
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def endpoint(gguf_model) -> Iterator[str]:
    """Address of a running server."""
    pytest.importorskip("xllamacpp", reason="runs llama.cpp's server: pip install xllamacpp")
    with serving(gguf_model) as address:
        yield address


@pytest.fixture
def with_key(gguf_model) -> Iterator[str]:
    """Address of a running server that wants the key KEY."""
    pytest.importorskip("xllamacpp", reason="runs llama.cpp's server: pip install xllamacpp")
    with serving(gguf_model, KEY) as address:
        yield address


class Proxy:
    """A proxy before the server.

    Attributes:
      fault: number of a request for an answer, its body -> None to pass it on; an HTTP status with
        headers and body to answer itself; or "close" or "hang".
      requests: bodies of the requests for answers, in order of arrival.
      most: the largest number of requests at the same time.
    """

    def __init__(self, endpoint: str):
        self.fault: Callable[[int, bytes], Any] = lambda number, body: None
        self.requests: list[bytes] = []
        self.most = self._now = 0
        self._lock = threading.Lock()
        behind = urllib.parse.urlsplit(endpoint)
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._pass(b"")

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with proxy._lock:
                    number = len(proxy.requests)
                    proxy.requests.append(body)
                    proxy._now += 1
                    proxy.most = max(proxy.most, proxy._now)
                try:
                    self._answer(number, body)
                finally:
                    with proxy._lock:
                        proxy._now -= 1

            def _answer(self, number: int, body: bytes) -> None:
                fault = proxy.fault(number, body)
                if fault == "close":
                    self.close_connection = True
                    self.connection.close()
                elif fault == "hang":
                    time.sleep(8)
                    self.close_connection = True
                elif fault is not None:
                    self._send(*fault)
                else:
                    self._pass(body)

            def _pass(self, body: bytes) -> None:
                connection = http.client.HTTPConnection(behind.hostname, behind.port, timeout=60)
                headers = {"Content-Type": "application/json"}
                if "Authorization" in self.headers:
                    headers["Authorization"] = self.headers["Authorization"]
                connection.request(self.command, self.path, body or None, headers)
                answer = connection.getresponse()
                self._send(answer.status, {}, answer.read())
                connection.close()

            def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def proxy(endpoint) -> Iterator[Proxy]:
    made = Proxy(endpoint)
    yield made
    made.close()
