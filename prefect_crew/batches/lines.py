"""Files of whole lines, and lines that wait for their turn."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from types import TracebackType

from prefect_crew.files import PRIVATE

__all__ = ["HeldLines", "LineFile"]

LINES = 200
BYTES = 1 << 20


class LineFile:
    """A file to which whole lines are added, many with one write: killing the process leaves no half one."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), PRIVATE)
        self._end = os.lseek(self._file, 0, os.SEEK_END)
        self._waiting: list[bytes] = []
        self._size = 0

    def __enter__(self) -> LineFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, line: bytes) -> None:
        """Add a line, which ends with a line feed.

        Raises:
            OSError: It cannot be written. The file is as it was before.
        """
        self._waiting.append(line)
        self._size += len(line)
        if len(self._waiting) >= LINES or self._size >= BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand the lines to the operating system, so that others can read them."""
        if not self._waiting:
            return
        content = memoryview(b"".join(self._waiting))
        os.lseek(self._file, self._end, os.SEEK_SET)
        written = 0
        try:
            while written < len(content):
                written += os.write(self._file, content[written:])
        except OSError:
            os.ftruncate(self._file, self._end)  # a full disk takes half a line
            raise
        self._end += written
        self._waiting, self._size = [], 0

    def cut(self, end: int) -> None:
        """Drop everything behind a position, and go on there."""
        self._waiting, self._size = [], 0
        os.ftruncate(self._file, end)
        self._end = end

    def close(self) -> None:
        """Write what is left, sync and close."""
        try:
            self.flush()
            os.fsync(self._file)
        finally:
            os.close(self._file)


class HeldLines:
    """Lines by number that wait for the ones before them; in a temporary file once they are many."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA cache_size=-4000")
        self._database.execute("CREATE TABLE lines (number INTEGER PRIMARY KEY, line BLOB)")
        self._database.execute("BEGIN")

    def put(self, number: int, line: bytes | None) -> None:
        """Keep a line; None for a row that has none."""
        self._database.execute("INSERT OR REPLACE INTO lines VALUES (?, ?)", (number, line))

    def take(self, number: int) -> tuple[bool, bytes | None]:
        """Take a line away; whether it was there, and the line."""
        found = self._database.execute("SELECT line FROM lines WHERE number = ?", (number,)).fetchone()
        if found is None:
            return False, None
        self._database.execute("DELETE FROM lines WHERE number = ?", (number,))
        return True, found[0]

    def first(self) -> int | None:
        """Return the lowest number, None if nothing is held."""
        return self._database.execute("SELECT min(number) FROM lines").fetchone()[0]

    def close(self) -> None:
        """Give the file back."""
        self._database.close()
