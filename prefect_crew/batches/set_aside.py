"""Rows that cannot be run and are left out: written beside the output, and kept in mind by the ledger."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from pydantic_core import to_json

from prefect_crew.batches.rows import BadRow

__all__ = ["SetAside", "SetAsideFile", "rejected_name"]


def rejected_name(output: str) -> str:
    """Return where the rows go that are set aside, by the batch's output."""
    return f"{output}.rejected.jsonl"


@dataclass(frozen=True)
class SetAside:
    """The rows of a batch that cannot be run.

    Attributes:
        count: How many there are.
        rows: The first 1,000, with their lines and why.
        output: Where all of them are, for people; None where there are none.
    """

    count: int = 0
    rows: Sequence[BadRow] = ()
    output: str | None = None

    def shown(self, most: int) -> list[str]:
        """Return some of them for people, and how many more there are."""
        found = [f"line {row.line}: {row.reason}" for row in self.rows[:most]]
        return [*found, f"{self.count - len(found):,} more"] if self.count > len(found) else found


class SetAsideFile:
    """Keeps rows that cannot be run in a temporary file, until it is known whether the batch goes on without them."""

    def __init__(self) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile(prefix="prefect-crew-")  # noqa: SIM115  closed by `close`

    def put(self, bad: BadRow, shown: Any) -> None:
        """Keep a row: its line, why it cannot be run, and what stands there, without secrets."""
        line = {"line": bad.line, "reason": bad.reason, "row": shown}
        self.file.write(to_json(line, inf_nan_mode="null", serialize_unknown=True) + b"\n")

    def close(self) -> None:
        """Give the file back."""
        self.file.close()
