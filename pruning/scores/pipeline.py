"""Prefetch and write-behind threads around the thread that drives the device.

Both hold a bounded number of items, so that memory stays constant, and both raise their errors in
the driving thread. NumPy, Arrow and XLA release the GIL, so threads are sufficient.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class _End:
    """Sentinel after the last item; `error` is the error that ended the stream early."""

    def __init__(self, error: BaseException | None = None):
        self.error = error


class Abandoned(Exception):
    """Error in the write-behind thread when the driver failed; unfinished files are dropped."""


def _handed_over(waiting: queue.Queue) -> Iterator[T]:
    """Yield the items of a queue up to its end, and raise the error of the end, if any."""
    while True:
        item = waiting.get()
        if isinstance(item, _End):
            if item.error is not None:
                raise item.error
            return
        yield item


@contextlib.contextmanager
def ahead(items: Iterator[T], depth: int) -> Iterator[Iterator[T]]:
    """Run an iterator in a separate thread, at most `depth` items ahead of its consumer."""
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
    """Run `work` on a stream of items in a separate thread.

    Yields a function that passes on one item, and blocks while `depth` items are waiting. An error
    of `work` is raised by the next call, or at the end of the block, which waits for all items.
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
