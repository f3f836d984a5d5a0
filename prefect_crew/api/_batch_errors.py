"""Errors about a batch: its data set, its ledger, its output, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect_crew.api._error import CrewError

__all__ = [
    "BadRowsError",
    "BatchBusyError",
    "BatchCancelledError",
    "BatchChangedError",
    "BatchFailedError",
    "DatasetError",
    "LedgerError",
    "LedgerMissingError",
    "OutputError",
    "by_reason",
    "listed_rows",
]

SHOWN = 20
"""Reasons that a message lists, and columns."""
LINES = 10
"""Lines that a message names for each reason."""


class BatchFailedError(CrewError):
    """A batch did not come to a full end. Attributes: report."""

    def __init__(self, report: Any) -> None:
        self.report = report
        advice = "The same call goes on with what is left; failed rows are bought again with retry_failed=True."
        super().__init__(f"{str(report).rstrip('.')}. {advice}")


class BatchCancelledError(CrewError):
    """The flow run of a batch was cancelled. Attributes: name."""

    def __init__(self, *, name: str) -> None:
        self.name = name
        super().__init__(f"Batch {name!r} was cancelled. The same call goes on where it stopped.")


class BatchBusyError(CrewError):
    """Another process works on the batch at this moment. Attributes: name."""

    def __init__(self, *, name: str, what: str = "") -> None:
        self.name = name
        super().__init__(
            f"{what or f'Batch {name!r}'} is being run by another process at this moment. Nothing was started or "
            "changed here. Wait for it, or end it; then do the same again."
        )


class BatchChangedError(CrewError):
    """The rows or the crew are not those that the batch was begun with. Attributes: name, difference."""

    def __init__(self, *, name: str, difference: str) -> None:
        self.name = name
        self.difference = difference
        super().__init__(
            f"Batch {name!r} was begun with something else: {difference}. Nothing was started. To run what is new and "
            "keep what is done, say on_change='continue'; for a new purchase of everything choose another name."
        )


class DatasetError(CrewError):
    """A data set cannot be read. Attributes: source (its name), line (1-based, None where there is none), reason."""

    def __init__(self, reason: str, *, source: str, line: int | None = None) -> None:
        self.reason = reason
        self.source = source
        self.line = line
        where = source if line is None else f"{source}, line {line}"
        super().__init__(f"{where}: {reason} Nothing of this data set was started.")


class BadRowsError(DatasetError):
    """Rows of a data set cannot be run. Attributes: rows (all of them, up to 1,000), count."""

    def __init__(self, rows: Sequence[Any], count: int, *, source: str, alone: bool = False) -> None:
        self.rows = list(rows)
        self.count = count
        cannot = "a row cannot be run" if count == 1 else f"{count:,} rows cannot be run"
        what = f"{cannot}{', which are all' if alone else ''}: {listed_rows(self.rows, count)}."
        advice = "" if alone else " Correct them, or set them aside with on_bad_row='set-aside'."
        super().__init__(f"{what}{advice}", source=source)


def by_reason(rows: Sequence[Any], count: int) -> tuple[list[tuple[str, str]], int]:
    """Return where and why rows cannot be run, a reason at a time, and how many more there are beside these.

    Args:
        rows: The rows that are kept.
        count: How many there are in all.
    """
    groups: dict[str, list[int]] = {}
    for row in rows:
        groups.setdefault(row.reason, []).append(row.line)
    found: list[tuple[str, str]] = []
    more = count
    for reason, lines in list(groups.items())[:SHOWN]:
        most = count if len(groups) == 1 else len(lines)
        found.append((_lines(lines[:LINES], most - len(lines[:LINES])), reason))
        more -= most
    return found, more


def listed_rows(rows: Sequence[Any], count: int) -> str:
    """Return where and why rows cannot be run, as one text."""
    found, more = by_reason(rows, count)
    return "; ".join([f"{where}: {reason}" for where, reason in found] + ([f"and {more:,} more rows"] if more else []))


def _lines(lines: Sequence[int], more: int) -> str:
    words = [str(line) for line in lines] + ([f"{more:,} more"] if more else [])
    if len(words) == 1:
        return f"line {words[0]}"
    return f"lines {', '.join(words[:-1])} and {words[-1]}"


class LedgerError(CrewError):
    """The ledger cannot be used. Attributes: ledger (its address without a password)."""

    def __init__(self, reason: str, *, ledger: str, advice: str | None = None) -> None:
        self.ledger = ledger
        if advice is None:
            advice = (
                "No row is kicked off without it; mend it and run the batch again with the same name, which goes on "
                "where it stopped."
            )
        super().__init__(f"The ledger {ledger} {reason} {advice}")


class LedgerMissingError(CrewError):
    """The batch is kept in another ledger than the one at hand. Attributes: name, ledger (where it is kept)."""

    def __init__(self, *, name: str, ledger: str) -> None:
        self.name = name
        self.ledger = ledger
        super().__init__(
            f"Batch {name!r} is kept in another ledger, {ledger}, which is not the one here. Going on without it would "
            "buy every row again, so nothing was started. Give that ledger (ledger=…), or choose another name."
        )


class OutputError(CrewError):
    """The output cannot be written. What has ended is in the ledger: run the batch again with the same name."""
