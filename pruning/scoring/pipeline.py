"""Two threads beside the one that drives the device: one ahead of it, one behind.

Both hold a bounded number of items, so that memory stays constant, and both hand their errors to
the thread that drives. NumPy, Arrow and XLA release the interpreter's lock, which is why threads
are enough.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class _End:
    """After the last item; `error` is what ended it early."""

    def __init__(self, error: BaseException | None = None):
        self.error = error


class Abandoned(Exception):
    """Raised in the thread behind when the driver gave up: unfinished files are not to be kept."""


def _handed_over(waiting: queue.Queue) -> Iterator[T]:
    """The items of a queue up to its end, whose error is raised."""
    while True:
        item = waiting.get()
        if isinstance(item, _End):
            if item.error is not None:
                raise item.error
            return
        yield item


@contextlib.contextmanager
def ahead(items: Iterator[T], depth: int) -> Iterator[Iterator[T]]:
    """Runs an iterator in a thread of its own, at most `depth` items ahead of its consumer."""
    waiting: queue.Queue = queue.Queue(depth)
    abandoned = threading.Event()

    def put(item: object) -> bool:
        while not abandoned.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put(item, timeout=0.1)
                return True
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(_End())
        except BaseException as error:
            put(_End(error))

    thread = threading.Thread(target=produce, name="ahead", daemon=True)
    thread.start()
    try:
        yield _handed_over(waiting)
    finally:
        abandoned.set()
        thread.join()


@contextlib.contextmanager
def behind(work: Callable[[Iterator[T]], None], depth: int) -> Iterator[Callable[[T], None]]:
    """Runs `work` on a stream of items in a thread of its own.

    Gives a function that hands over one item, and waits while `depth` are waiting. An error of
    `work` is raised by the next hand-over, or at the end of the block, which waits for all items.
    When the block itself fails, `work`'s iterator raises Abandoned.
    """
    waiting: queue.Queue = queue.Queue(depth)
    errors: list[BaseException] = []
    stopped = threading.Event()

    def consume() -> None:
        try:
            work(_handed_over(waiting))
        except Abandoned:
            pass
        except BaseException as error:
            errors.append(error)
        finally:
            stopped.set()

    def put(item: object) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put(item, timeout=0.1)
                return

    def give(item: T) -> None:
        put(item)
        if errors:
            raise errors[0]

    thread = threading.Thread(target=consume, name="behind", daemon=True)
    thread.start()
    try:
        yield give
    except BaseException:
        put(_End(Abandoned()))
        thread.join()
        raise
    put(_End())
    thread.join()
    if errors:
        raise errors[0]
