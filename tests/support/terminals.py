"""A program on a terminal of its own, as a person has it: it may draw, and Ctrl-C is a key."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Self

from support.processes import MARK, ProcessError, survivors
from support.waiting import LIMIT, check


class Terminal:
    """A program that runs on a pseudo-terminal of 100 columns and 40 lines; a context manager that ends it."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str]) -> None:
        self.mark = uuid.uuid4().hex
        self.output = ""
        """All that it has written, escape sequences and all."""
        self._code: int | None = None
        marks = ",".join(filter(None, (os.environ.get(MARK), self.mark)))
        environment = {**env, "TERM": "xterm-256color", MARK: marks}
        self.pid, self._screen = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], list(command), environment)
        fcntl.ioctl(self._screen, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))

    def press(self, keys: str) -> None:
        """Type something, after the moment that a person needs; `\\x03` is Ctrl-C, SIGINT for all that it runs.

        Python's `input` loses a signal that comes between its last look at signals and its read of the terminal: one in
        some 400 that were pressed at once on a busy machine.
        """
        time.sleep(0.3)
        os.write(self._screen, keys.encode())

    def wait_for(self, text: str) -> None:
        """Read until it has written `text`."""
        deadline = time.monotonic() + LIMIT
        while text not in self.output:
            check(deadline, f"it writes {text!r}:\n{self.output[-3000:]}")
            if not self._read(0.2):
                raise ProcessError(f"never wrote {text!r}:\n{self.output[-3000:]}")

    def wait(self) -> int:
        """Read until it has ended; return its exit code, negative for a signal."""
        deadline = time.monotonic() + LIMIT
        while self._code is None:
            check(deadline, f"it ends:\n{self.output[-3000:]}")
            self._read(0.1)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        while self._read(0.0):
            pass
        return self._code

    def family(self) -> dict[int, str]:
        return survivors(self.mark)

    def _read(self, timeout: float) -> bool:
        """Read what is there; False once there will be no more."""
        ready, _, _ = select.select([self._screen], [], [], timeout)
        if not ready:
            return timeout > 0
        try:
            data = os.read(self._screen, 65536)
        except OSError:  # how Linux says that the last program on it has gone
            return False
        self.output += data.decode(errors="replace")
        return bool(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [*self.family(), *([self.pid] if self._code is None else [])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._code is None:
            os.waitpid(self.pid, 0)
        os.close(self._screen)
