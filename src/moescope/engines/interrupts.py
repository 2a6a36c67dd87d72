"""Waiting that Ctrl-C must not end, because what is waited for is finished work."""

from __future__ import annotations

from collections.abc import Callable


def despite_interrupts(wait: Callable[[], object]) -> KeyboardInterrupt | None:
    """Call `wait` until it returns, whatever Ctrl-C says; return the last Ctrl-C there was.

    `Thread.join`, and what uses it, will not do: interrupted, it takes a thread that still runs for ended (Python 3.11
    and 3.12, issue 45274 of CPython).
    """
    interrupt = None
    while True:
        try:
            wait()
            return interrupt
        except KeyboardInterrupt as again:
            interrupt = again
