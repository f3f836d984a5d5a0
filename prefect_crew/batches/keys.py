"""A table of keys that lives in a temporary file once it is large, so that memory stays flat."""

from __future__ import annotations

import sqlite3

__all__ = ["Keys"]


class Keys:
    """Texts, each with a number and a mark. It belongs to one thread at a time."""

    def __init__(self) -> None:
        # An empty name is SQLite's own temporary database, which spills to disk and goes with the connection. Rows are
        # read in a thread, one at a time, but not always the same one.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA cache_size=-4000")
        self._database.execute("CREATE TABLE keys (key TEXT PRIMARY KEY, value INTEGER, mark TEXT) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def __contains__(self, key: str) -> bool:
        return self.find(key) is not None

    def __len__(self) -> int:
        return int(self._database.execute("SELECT count(*) FROM keys").fetchone()[0])

    def find(self, key: str) -> tuple[int, str] | None:
        """Return the number and the mark of a key, None if it is not there."""
        found = self._database.execute("SELECT value, mark FROM keys WHERE key = ?", (key,)).fetchone()
        return None if found is None else (int(found[0]), str(found[1]))

    def put(self, key: str, value: int = 0, mark: str = "") -> None:
        """Keep a number and a mark for a key."""
        self._database.execute("INSERT OR REPLACE INTO keys VALUES (?, ?, ?)", (key, value, mark))

    def count(self, key: str) -> int:
        """Note one more of a key and return how many there are now."""
        query = "INSERT INTO keys VALUES (?, 1, '') ON CONFLICT (key) DO UPDATE SET value = value + 1 RETURNING value"
        return int(self._database.execute(query, (key,)).fetchone()[0])

    def close(self) -> None:
        """Give the file back."""
        self._database.close()
