"""Whether a row is bought once more. Pure: a purchase is the user's money, so the rule stands in one place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from prefect_crew.batches.ends import LOST, RowEnd
from prefect_crew.records import RunRecord

__all__ = ["RETRYABLE", "STOPPED_WITH_BATCH", "Retries", "RetryRule", "purchases"]

STOPPED_WITH_BATCH = "stopped since the batch was cancelled"
"""The reason, in a record, of a run that we stopped. Going on with the batch means to have that row after all."""
Retries = int | Mapping[str, int]
RETRYABLE = ("CrewFailedError", "CrewStoppedError", "OutputTypeError", "CrewLostError")
"""The errors after which a row may be bought again. All others bought nothing, or left a run that may go on."""


@dataclass(frozen=True)
class RetryRule:
    """What the user has asked for.

    Attributes:
        retries: Further purchases of a row, for all errors but a lost run, or by the class of its error.
        retry_failed: Rows that failed in earlier calls and are bought again: all but lost ones, or those of these keys.
    """

    retries: Retries = 0
    retry_failed: bool | Collection[str] = False

    def again(self, end: RowEnd, *, count: int, before: int, most: int) -> bool:
        """Say whether a row is bought once more.

        Args:
            end: How it has ended.
            count: Its purchases so far.
            before: Those of them that were made in earlier calls.
            most: How many the crew's block allows.
        """
        if end.kind not in RETRYABLE:
            return False
        if isinstance(self.retries, int):
            more = 0 if end.state == LOST else self.retries
        else:
            more = self.retries.get(end.kind, 0)
        if end.found and end.record is not None and end.record.reason == STOPPED_WITH_BATCH:
            more = max(more, before)
        chosen = self.retry_failed
        asked = (chosen and end.state != LOST) if isinstance(chosen, bool) else end.job.key in chosen
        return count < min((before + 1 if asked else 1) + more, most)


def purchases(attempts: Sequence[RunRecord]) -> int:
    """Return how many attempts at a row were, or may have been, a purchase."""
    return sum(attempt.counts for attempt in attempts)
