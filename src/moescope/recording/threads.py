"""Two threads beside the model: one reads ahead of it, one writes behind it.

Both keep the order, raise errors as they came, and are gone when their ``with`` block ends, however it ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import Queue, SimpleQueue
from typing import Generic, TypeVar

from moescope.engines.interrupts import despite_interrupts

Source = TypeVar("Source")
Item = TypeVar("Item")


class _End:
    """Follows the last item of a queue; carries the error that ended it, if one did."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


@contextmanager
def read_ahead(
    source: Iterable[Source], prepare: Callable[[Iterator[Source]], Iterator[Item]]
) -> Iterator[Iterator[Item]]:
    """Read a source and prepare its items on a thread, ahead of whoever takes them.

    One item waits to be taken and one is being prepared; what is left is not read. When the block ends early, the
    thread ends before the next piece of the source.

    Args:
        source: Read on the thread, once.
        prepare: Makes the items; called and iterated on the thread.
    Yields:
        The items in their order. An error of `source` or `prepare` is raised where its item would have been.
    """
    queue: SimpleQueue[Item | _End] = SimpleQueue()
    vacancy = threading.Semaphore(1)
    stopped, ended = threading.Event(), threading.Event()

    def until_stopped() -> Iterator[Source]:
        for piece in source:
            if stopped.is_set():
                return
            yield piece

    def run() -> None:
        end = _End()
        try:
            for item in prepare(until_stopped()):
                vacancy.acquire()
                if stopped.is_set():
                    return
                queue.put(item)
        except BaseException as error:
            end = _End(error)
        finally:
            queue.put(end)
            ended.set()

    def taken() -> Iterator[Item]:
        while not isinstance(item := queue.get(), _End):
            vacancy.release()
            yield item
        if item.error is not None:
            raise item.error

    thread = threading.Thread(target=run, name="moescope reads ahead", daemon=True)
    try:
        thread.start()
        yield taken()
    finally:
        stopped.set()
        vacancy.release()
        interrupt = despite_interrupts(ended.wait) if thread.ident is not None else None
    if interrupt is not None:
        raise interrupt


class WriteBehind(Generic[Item]):
    """Writes items on a thread, in their order: one is being written and one waits; after an error none is."""

    def __init__(self, write: Callable[[Item], None]) -> None:
        self._write = write
        self._queue: Queue[Item | _End] = Queue(maxsize=1)
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moescope writes behind", daemon=True)

    def put(self, item: Item) -> None:
        """Hand over the next item; waits while one is waiting already.

        Raises:
            BaseException: What an earlier item met; this one is not written.
        """
        self._raise_error()
        self._queue.put(item)

    def __enter__(self) -> WriteBehind[Item]:
        try:
            self._thread.start()
        except BaseException:
            self._queue.put(_End())
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait until everything handed over is written, also after an error or Ctrl-C: it is finished work."""
        interrupt = despite_interrupts(lambda: self._queue.put(_End()))
        # A thread left alone would write what its owner has closed.
        interrupt = despite_interrupts(self._ended.wait) or interrupt
        if kind is None:
            self._raise_error()
            if interrupt is not None:
                raise interrupt

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not isinstance(item := self._queue.get(), _End):
                if self._error is None:
                    try:
                        self._write(item)
                    except BaseException as error:
                        self._error = error
                del item  # its memory is free while the next is awaited
        finally:
            self._ended.set()
