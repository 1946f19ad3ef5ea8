"""Connection to a server with an OpenAI-compatible endpoint: requests, retries, errors.

Choices
- HTTP by the standard library: a connection per thread, kept open, without redirects and proxies.
- Requests are repeated after time-outs, lost connections and the statuses of an overloaded or
  failing server (429, 5xx), with growing delays, or those that the server asks for. Where a server
  is overloaded, the delay of one request holds back the others, too; and its attempts are counted
  anew if others were answered meanwhile, so that no document fails by a limit of requests a minute.
- The key comes from an environment variable. It is sent to the endpoint and nowhere else; server
  messages are shown without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import random
import ssl
import threading
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any

from pruning.scores.model.scorer import ScoreError
from pruning.store.settings import ADDRESS

_REPEATED = frozenset((408, 425, 429, 500, 502, 503, 504, 529))
_OVERLOADED = frozenset((429, 503, 529))
_DELAY, _LONGEST_DELAY, _LONGEST_ASKED = 0.5, 60.0, 300.0  # seconds
_MOST_BYTES = 64 << 20
_MOST_SHOWN = 300  # characters of a server's message


class ServerError(ScoreError):
    """Error for a server that is absent, unsuitable, or fails for longer than it is waited for."""


class Refused(Exception):
    """Error for a request that the server refuses; another request may succeed.

    Attributes:
      status: of HTTP.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Unanswered(Exception):
    """Error for a request that was repeated as often as allowed, without an answer."""


@dataclasses.dataclass(frozen=True)
class Server:
    """A server with an OpenAI-compatible endpoint that gives log-probabilities of tokens.

    Attributes:
      endpoint: its URL, such as "http://localhost:8000/v1".
      top: number of tokens whose log-probabilities are asked for at each position. Servers limit
        it: vLLM to 20 unless started with --max-logprobs.
      concurrency: number of documents that are asked about at the same time.
      timeout: seconds until a request without an answer is repeated.
      attempts: largest number of times that a request is made; on an overloaded server, since it
        last answered another.
      key_variable: environment variable with the API key, if the server wants one.
    """

    endpoint: str = dataclasses.field(metadata={ADDRESS: True})
    top: int = 20
    concurrency: int = 32
    timeout: float = 120.0
    attempts: int = 8
    key_variable: str = "WINNOW_API_KEY"

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.endpoint)
        try:
            known = parts.scheme in ("http", "https") and bool(parts.hostname and parts.port != 0)
        except ValueError:  # of the port
            known = False
        if not known:
            raise ScoreError(
                f"Server.endpoint is a URL such as http://localhost:8000/v1, not {self.endpoint!r}."
            )
        if parts.username or parts.password or parts.query:
            raise ScoreError(
                "Server.endpoint must not contain a user name, a password or a query: give the key "
                f"in the environment variable {self.key_variable}."
            )
        for name in ("top", "concurrency", "attempts"):
            if getattr(self, name) < 1:
                raise ScoreError(f"Server.{name} is at least 1, not {getattr(self, name)}.")
        if self.timeout <= 0:
            raise ScoreError(f"Server.timeout is positive, not {self.timeout}.")

    @property
    def address(self) -> str:
        """The endpoint with its path, "/v1" unless another is given."""
        parts = urllib.parse.urlsplit(self.endpoint)
        path = parts.path.rstrip("/") or "/v1"
        return f"{parts.scheme}://{parts.netloc}{path}"


class Connection:
    """Requests to a server, from any number of threads.

    Attributes:
      retries: number of requests that were repeated so far.
    """

    def __init__(self, server: Server):
        self.server = server
        self.retries = 0
        self._parts = urllib.parse.urlsplit(server.address)
        self._key = os.environ.get(server.key_variable, "")
        if not (self._key.isascii() and self._key.isprintable()):
            raise ServerError(f"the key in {server.key_variable} is not printable ASCII.")
        self._of_thread = threading.local()
        self._lock = threading.Lock()
        self._not_before = 0.0
        self._answers = 0  # so far, to any thread
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Make all requests fail, those that wait for another attempt at once."""
        self._stopped.set()

    def get(self, path: str) -> dict[str, Any]:
        """Return the JSON object at a path, such as "/models"; see `post`."""
        return self._request("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send a JSON object and return the JSON object in the answer.

        Raises:
          Refused: the server refuses this request.
          Unanswered: no attempt had an answer.
          ServerError: no server is there, or it refuses the key.
        """
        return self._request("POST", path, json.dumps(body).encode())

    def _request(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        failures, answers = 0, self._answers
        while True:
            self._wait()
            status, asked = 0, None
            try:
                status, headers, content = self._once(method, path, body)
            except ssl.SSLCertVerificationError as error:
                raise ServerError(
                    f"the certificate of {self.server.address} is invalid: {error.verify_message}."
                ) from error
            except ConnectionRefusedError as error:
                last = f"no server answers ({error.strerror})"
            except OSError as error:  # time-outs, lost connections, unknown hosts
                last = str(error) or type(error).__name__
            except http.client.HTTPException as error:
                last = self._shown(f"{type(error).__name__}: {error}")
            else:
                found = _object(content)
                if status == 200 and found is not None:
                    with self._lock:
                        self._answers += 1
                    return found
                message = self._said(found, content)
                if status in (401, 403):
                    raise ServerError(
                        f"the server at {self.server.address} refuses the key in the environment "
                        f"variable {self.server.key_variable}: {message}"
                    )
                if status not in _REPEATED and status != 200:
                    raise Refused(status, f"HTTP {status}: {message}")
                last = f"HTTP {status}: {message}"
                asked = _seconds(headers.get("Retry-After"))
            overloaded, before, answers = status in _OVERLOADED, answers, self._answers
            failures = 0 if overloaded and answers > before else failures + 1
            if failures == self.server.attempts:
                raise Unanswered(last)
            with self._lock:
                self.retries += 1
            self._delay(max(failures - 1, 0), asked, for_all=overloaded)

    def _once(
        self, method: str, path: str, body: bytes | None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = getattr(self._of_thread, "connection", None) or self._open()
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            connection.request(method, self._parts.path + path, body, headers)
            answer = connection.getresponse()
            content = answer.read(_MOST_BYTES)
            if not answer.isclosed():  # there is more
                raise http.client.HTTPException("the answer is too long")
            return answer.status, answer.headers, content
        except BaseException:
            self._of_thread.connection = None
            with contextlib.suppress(OSError):
                connection.close()
            raise

    def _open(self) -> http.client.HTTPConnection:
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        assert self._parts.hostname  # checked by `Server`
        made = kind(self._parts.hostname, self._parts.port, timeout=self.server.timeout)
        self._of_thread.connection = made
        return made

    def _said(self, found: dict[str, Any] | None, content: bytes) -> str:
        """Return a server's message, as `_shown`."""
        error: Any = (found or {}).get("error", found)
        for name in ("message", "detail", "error"):
            if isinstance(error, dict) and name in error:
                error = error[name]
        text = content.decode(errors="replace") if error is None else str(error)
        return self._shown(text) or "without a message"

    def _shown(self, text: str) -> str:
        """Return the beginning of a text from the server, in one line and without the key."""
        line = " ".join(text.split())
        if self._key:
            line = line.replace(self._key, "***")
        return line[:_MOST_SHOWN]

    def _delay(self, doublings: int, asked: float | None, *, for_all: bool) -> None:
        """Wait before the next attempt; or make the next request of any thread wait."""
        delay = min(_DELAY * 2**doublings, _LONGEST_DELAY) * random.uniform(0.5, 1.0)
        if asked is not None:
            delay = max(delay, min(asked, _LONGEST_ASKED))
        if not for_all:
            self._stopped.wait(delay)
            return
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + delay)

    def _wait(self) -> None:
        while not self._stopped.is_set():
            left = self._not_before - time.monotonic()
            if left <= 0:
                return
            self._stopped.wait(left)
        raise Unanswered("the run ended")


def _object(content: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _seconds(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header; None without one, or for a date."""
    try:
        return max(float(header or ""), 0.0)
    except ValueError:
        return None
