"""Questions about one document, asked of a server, and what its answers leave open.

Choices
- A server lists the most probable tokens only. An answer that is not among them gets the largest
  log-probability that it can have; the column `..._unlisted` says by how much the sum of a
  question's answers may be too high. A document with a window in which none of a question's answers
  is listed has the status "not_listed" and no values.
- All questions about a window are asked one after the other, so that a server with a cache of
  prefixes computes the document once.
- llama.cpp's server lists nothing if the token that it draws ends the text, or is a part of a
  character. It is asked not to end the text (`ignore_eos`), and for other draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pruning.scores.model.answers import Reading
from pruning.scores.model.served import listing
from pruning.scores.model.served.prompts import Prompts, Window
from pruning.scores.model.served.server import Connection, Refused, ServerError, Unanswered

_DRAWS = 16  # of a token, where a server lists nothing for the one that it drew


@dataclasses.dataclass
class Usage:
    """Requests made for some documents: their number, and the tokens of their prompts."""

    requests: int = 0
    prompt_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Answered:
    """Answers about one document.

    Attributes:
      values: float64 [windows, slots], log-probabilities of all questions' candidates: upper bounds
        where `listed`, bool of the same shape, is False.
      tokens: int64 [windows], tokens of the document in each.
      lost: number of tokens that no window shows.
      failed: the server's message if it refused the document.
      usage: of all its requests.
    """

    values: np.ndarray
    listed: np.ndarray
    tokens: np.ndarray
    lost: int
    failed: str | None
    usage: Usage


@dataclasses.dataclass(frozen=True)
class Judge:
    """A model behind a server, and the questions to it.

    Attributes:
      connection: to the server.
      model: its name there.
      prompts: of the questions.
      further: further entries of a request, which the server understands.
    """

    connection: Connection
    model: str
    prompts: Prompts
    further: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def slots(self) -> int:
        """Number of candidates at all points of all questions."""
        return sum(len(point.candidates) for points in self.prompts.points for point in points)

    def ask(self, text: str) -> Answered:
        """Ask all questions about a document.

        Raises:
          ServerError: the server is gone.
        """
        usage = Usage()
        windows: list[Window] = []
        lost = 0
        rows: list[tuple[list[float], list[bool]]] = []
        failed = None
        try:
            windows, lost = self.prompts.windows(text)
            rows = [self._window(window, usage) for window in windows]
        except (Refused, Unanswered) as error:
            self._require_alive(error)
            failed = str(error)
        except ServerError:
            raise
        except ValueError as error:  # the document cannot be put into the prompts
            failed = f"{type(error).__name__}: {error}"
        if failed is not None:
            windows, rows = [], []
        shape = (len(windows), self.slots)
        return Answered(
            np.array([values for values, _ in rows], np.float64).reshape(shape),
            np.array([listed for _, listed in rows], bool).reshape(shape),
            np.array([window.tokens for window in windows], np.int64),
            lost,
            failed,
            usage,
        )

    def _window(self, window: Window, usage: Usage) -> tuple[list[float], list[bool]]:
        values: list[float] = []
        found: list[bool] = []
        for prompt, points in zip(window.prompts, self.prompts.points, strict=True):
            known: dict[tuple[int, ...], list[listing.Token]] = {}
            for point in points:
                if point.after not in known:
                    known[point.after] = self.tokens(prompt, point.after, usage)
                read = listing.read(known[point.after], point.candidates)
                values += read.log_probabilities
                found += read.listed
        return values, found

    def tokens(
        self, prompt: Any, after: tuple[int, ...], usage: Usage | None = None
    ) -> list[listing.Token]:
        """Return the most probable tokens after a prompt.

        Raises:
          Refused: see `Connection.post`; also if the server lists no tokens.
          Unanswered, ServerError: see `Connection.post`.
        """
        top = self.connection.server.top
        path, body = self.prompts.request(self.model, prompt, after, top, self.further)
        for seed in range(_DRAWS):
            answer = self.connection.post(path, {**body, "seed": seed})
            if usage is not None:
                usage.requests += 1
                usage.prompt_tokens += listing.prompt_tokens(answer) or self.prompts.count(prompt)
            if tokens := listing.listed(answer):
                return tokens
        raise Refused(200, f"an answer from {path} without log-probabilities of tokens")

    def _require_alive(self, error: Refused | Unanswered) -> None:
        """Raise ServerError unless the server answers about a trivial document.

        A server that has unloaded the model refuses every request: its documents must not fail.
        """
        windows, _ = self.prompts.windows("a")
        try:
            self.tokens(windows[0].prompts[0], ())
        except (Refused, Unanswered):
            raise ServerError(
                f"the server at {self.connection.server.address} no longer answers ({error}): run "
                "the same command again when it does, it will go on."
            ) from error


def by_question(values: np.ndarray, prompts: Prompts) -> list[np.ndarray]:
    """Return values [windows, slots] by question: [windows, points, most candidates] each.

    Values of missing candidates are zero.
    """
    found, first = [], 0
    for points in prompts.points:
        widest = max(len(point.candidates) for point in points)
        own = np.zeros((len(values), len(points), widest), values.dtype)
        for number, point in enumerate(points):
            size = len(point.candidates)
            own[:, number, :size] = values[:, first : first + size]
            first += size
        found.append(own)
    return found


def answers(
    readings: Sequence[Reading], values: Sequence[np.ndarray], listed: Sequence[np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return upper and lower log-probabilities of the answers, [windows, answers], by question."""
    found = []
    for reading, upper, known in zip(readings, values, listed, strict=True):
        lower = np.where(known, upper, -np.inf)
        with np.errstate(invalid="ignore"):
            found.append((reading.log_probabilities(upper), reading.log_probabilities(lower)))
    return found
