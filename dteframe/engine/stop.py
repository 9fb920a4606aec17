"""What Ctrl-C and SIGTERM do to a run: it ends its step and writes a checkpoint; the second time at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and what schedulers end jobs with."""
SECONDS_TO_STOP = 10.0


class StoppedError(KeyboardInterrupt):
    """The end of a run that somebody wanted, after a step and its checkpoint."""


class Stop:
    """Whether somebody wants the run to end, and when it does: never in the middle of what is held together.

    Outside of ``held_together`` the first signal ends the run at once.
    """

    def __init__(self, seconds: float = SECONDS_TO_STOP) -> None:
        """Hear nothing yet: ``on_signals`` listens.

        Args:
            seconds: after the first signal, at which a step that has not ended is given up.
        """
        self.is_wanted = False
        self._seconds = seconds
        self._waits = False
        self._deadline: threading.Timer | None = None
        self._tell: Callable[[str], None] = lambda sentence: None

    @contextmanager
    def on_signals(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Listen to the signals while this goes on; called in the main thread.

        Args:
            tell: says a sentence; called from a signal handler.
        """
        self._tell = tell
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield
        finally:
            self.forget_deadline()
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def held_together(self) -> Iterator[None]:
        """Let what stands inside come to its end before the run ends, if that is soon.

        Raises:
            StoppedError: at the end, if the end of the run is wanted.
            KeyboardInterrupt: inside, if it has taken too long or is wanted twice.
        """
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
            self.forget_deadline()
        if self.is_wanted:
            raise StoppedError

    def forget_deadline(self) -> None:
        """Let what remains, such as writing a checkpoint, take its time."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.is_wanted or not self._waits:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)  # The next one ends whatever hangs.
            raise KeyboardInterrupt
        self.is_wanted = True
        self._tell(f"stopping after this step, in {self._seconds:g} s at most; once more stops at once")
        main = threading.main_thread().ident
        assert main is not None
        self._deadline = threading.Timer(self._seconds, signal.pthread_kill, (main, number))
        self._deadline.daemon = True
        self._deadline.start()
