"""SIGINT, SIGTERM and SIGHUP end a run where it can be resumed."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Unbreakable:
    """A stream that goes on where nobody reads it any more (`| head`), or where it cannot show a character."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self.trying(lambda: self.stream.write(text), len(text))

    def flush(self) -> None:
        self.trying(self.stream.flush, None)

    def trying(self, work: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return work()
        except OSError:  # from now on into the void, or Python's own flush at exit would fail
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            return otherwise


def survive_closed_output() -> None:
    """A run of days must not end because a line of it could not be printed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")  # None: closed before we began
        if not isinstance(stream, Unbreakable):
            setattr(sys, name, Unbreakable(stream))


RESUMABLE = 75  # the exit code EX_TEMPFAIL of sysexits.h: try again later


class Interrupted(KeyboardInterrupt):
    """A signal asks the run to end. Like its parent no Exception: no library takes it for an error of its own."""


class Signals:
    """Inside `with Signals() as signals`, SIGINT, SIGTERM and SIGHUP raise Interrupted, once.

    Within `with signals.deferred()` that waits for the end of the block. A Ctrl-C after that ends the process at once;
    a further SIGTERM or SIGHUP changes nothing, because a closing terminal often sends two.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.holding = False
        self.terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def __enter__(self) -> "Signals":
        self.before = {
            s: signal.signal(s, self.handle)
            for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(s) is not signal.SIG_IGN  # nohup stays nohup
        }
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if number == signal.SIGINT:
                os._exit(130)
            return
        self.received = signal.Signals(number).name
        if number == signal.SIGHUP:  # the terminal is gone: to print there would fail before anything is saved
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for fd in self.terminals:
                os.dup2(nowhere, fd)
        if not self.holding:
            raise Interrupted(self.received)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self.check()  # where an exception is raised in a destructor, Python drops it
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        self.check()

    def check(self) -> None:
        if self.received:
            raise Interrupted(self.received)
