"""A file that outlives the server: which runs were accepted and how they ended.

One JSON object a line, flushed to the disk before the server answers, so that a server which is killed and started
again with the same file still knows what it promised. A line cut off by the crash is ignored.

    {"event": "accepted", "id": …, "crew": …, "at": …, "inputs": {…}, "meta": {…}, "hooks": {…},
     "restore_from": …}
    {"event": "ended", "id": …, "state": …, "planned": […], "output": …, "data": …, "tasks": […], "usage": {…},
     "error": …, "seconds": …}

The file holds the webhooks' URLs and tokens, since runs that start again need them: it is made readable for its owner
only.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from prefect_crew.server.wire import to_json

__all__ = ["Journal"]


class Journal:
    """The journal at `path`, which is created where it is missing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: int | None = None

    def check(self) -> None:
        """See that the file can be read and written, creating it where it is missing.

        Raises:
            OSError: It cannot.
        """
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600))

    def read(self) -> list[dict[str, Any]]:
        """Return all whole entries, oldest first."""
        if not self.path.exists():
            return []
        entries: list[dict[str, Any]] = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the line that the crash cut off
            if isinstance(entry, dict) and "id" in entry:
                entries.append(entry)  # pyright: ignore[reportUnknownArgumentType]
        return entries

    def append(self, entry: dict[str, Any]) -> None:
        """Write one entry and return once it is on the disk."""
        if self._file is None:
            self._file = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                os.write(self._file, b"\n")  # a line that a crash cut off must not swallow this one
        os.write(self._file, to_json(entry) + b"\n")
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file; appending opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
