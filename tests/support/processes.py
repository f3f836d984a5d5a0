"""Processes that surely end.

A process that a test starts may start others, in sessions of their own, that outlive it: a Prefect worker starts flow
runs that way. So each process gets a mark in its environment, which every descendant inherits whatever becomes of its
parent, and `stop` looks for the mark until nobody bears it.
"""

import contextlib
import os
import pwd
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from support.waiting import LIMIT, TooLateError, wait_until

MARK = "PREFECT_CREW_TEST_PROCESS"
"""The environment variable that names the process a descendant came from; nested ones are joined by a comma."""

PROC = Path("/proc")


class ProcessError(Exception):
    """A process did not start or did not end; the text holds the end of its log."""


class Process:
    """A process with a session of its own, its output in a file, and an end."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        user: str | None = None,
        stdin: bool = False,
    ) -> None:
        self.command = [str(part) for part in command]
        self.log = log
        self.mark = uuid.uuid4().hex
        environment = dict(os.environ if env is None else env)
        environment[MARK] = ",".join(filter(None, (os.environ.get(MARK), self.mark)))
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=cwd,
                start_new_session=True,
                user=user,
                group=None if user is None else pwd.getpwnam(user).pw_gid,
                extra_groups=None if user is None else [],
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def running(self) -> bool:
        """Whether the process itself runs; its descendants may outlive it."""
        return self.popen.poll() is None

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def tail(self, characters: int = 3000) -> str:
        return self.output[-characters:]

    def family(self) -> list[int]:
        """Return the process ids of everything alive that descends from it, itself first, zombies left out.

        Reads /proc; where there is none (macOS), only the process itself is known.
        """
        found = [self.pid] if self.running else []
        if not PROC.exists():
            return found
        return found + [pid for pid in _bearers(self.mark) if pid != self.pid]

    def send(self, number: int) -> None:
        if self.running:
            self.popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the process and to everything that descends from it, and wait until all are gone."""

        def gone() -> bool:
            for pid in (family := self.family()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if family and not PROC.exists():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
            return not family

        wait_until(gone, f"{self.command[0]} and its family end after SIGKILL")
        self.popen.wait()
        if self.popen.stdin:
            self.popen.stdin.close()

    def stop(self, first: int = signal.SIGTERM, *, grace: float = 10.0, again: int | None = None) -> int:
        """End it politely, then by force, with all descendants; return its exit code."""
        for number in (first, again):
            if number is None or not self.running:
                continue
            self.send(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(grace)
        self.kill()
        return self.popen.returncode

    def wait(self, seconds: float = LIMIT) -> int:
        """Wait for its own end; return its exit code."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TooLateError(f"{self.command} still runs after {seconds:g} seconds:\n{self.tail()}") from None

    def wait_for(self, text: str, seconds: float = LIMIT) -> str:
        """Wait until its output holds `text`; return the output."""

        def look() -> str:
            ended = not self.running  # looked at before the output, so that last words count
            if text in (output := self.output):
                return output
            if ended:
                raise ProcessError(
                    f"{self.command} ended with {self.popen.returncode} and never wrote {text!r}:\n{self.tail()}"
                )
            return ""

        try:
            return wait_until(look, seconds=seconds, pause=0.05)
        except TooLateError:
            raise TooLateError(f"{self.command} did not write {text!r} in time:\n{self.tail()}") from None


class Program:
    """A program that runs as one process at a time; a context manager that starts and stops it."""

    _process: Process | None = None

    def start(self) -> Self:
        raise NotImplementedError

    def stop(self) -> None:
        """End it with all its descendants. Harmless if it does not run."""
        if self._process is not None:
            self._process.stop()

    @property
    def process(self) -> Process:
        """The process, for tests that hurt it. `family()` returns its descendants too."""
        assert self._process is not None, f"this {type(self).__name__} was never started: call start()"
        return self._process

    def kill(self) -> None:
        """SIGKILL for it and all its descendants: the machine is gone."""
        self.process.kill()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _bearers(mark: str) -> Iterator[int]:
    needle = mark.encode()
    for folder in PROC.iterdir():
        if not folder.name.isdigit():
            continue
        # A process may end between two reads, or belong to someone else: then it is none of ours.
        with contextlib.suppress(OSError):
            environment = _environment(folder)
            if any(line.startswith(MARK.encode() + b"=") and needle in line for line in environment.split(b"\0")):
                yield int(folder.name)


def _environment(folder: Path) -> bytes:
    """Return a process's environment. A zombie and a thread of the kernel have none: OSError.

    It reads as empty for a moment also while a program is being loaded, after whoever started it was informed that it
    was: on a busy machine that moment is long enough for a scan that then misses a process for good.
    """
    for _ in range(20):
        environment = (folder / "environ").read_bytes()
        if environment:
            return environment
        (folder / "exe").readlink()  # raises OSError for those whose environment stays empty
        time.sleep(0.005)
    return b""


def alive(pid: int) -> bool:
    """Whether a process runs. A zombie, which waits only for its parent to read its exit code, does not."""
    try:
        os.kill(pid, 0)
        return not PROC.exists() or (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def survivors(mark: str) -> dict[int, str]:
    """Return process id and command line of everything alive that bears `mark`; empty where there is no /proc."""
    found: dict[int, str] = {}
    if PROC.exists():
        for pid in _bearers(mark):
            with contextlib.suppress(OSError):
                command = (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if "multiprocessing.resource_tracker" not in command:  # Python's own, ends with its parent
                    found[pid] = command.strip()
    return found
