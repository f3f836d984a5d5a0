"""Removing old records. What is removed is no longer promised: a later call with such a key is a new purchase.

Only ended runs, and kickoffs that surely did not start, are removed, and only whole keys: as long as one attempt at a
key has to stay, the others are needed to count its purchases. What is in flight or uncertain is never touched.

How old something is is told by the store's clock: whoever claimed a run that others have voided since may be alive, and
asks for a permit as long as its claim is good for. Until then the record has to stay, which refuses that.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from prefect_crew.api.errors import ConfigurationError
from prefect_crew.records import RecordPhase, RunRecord

__all__ = ["OLDER_THAN", "Pruned", "parse_age", "prunable", "prune"]

OLDER_THAN = timedelta(days=90)
"""The age at which ended runs are removed if nobody says another: how long the never-twice promise holds for them."""
YOUNGEST = timedelta(hours=1)
"""What was changed within this time stays, whatever age is asked for: more than clocks may differ."""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True)
class Pruned:
    """What `prune` removed, or with `dry_run` would have."""

    runs: int
    notes: int
    kept: int
    """Records that stay."""


class PrunableStore(Protocol):
    """What `prune` asks of a record store."""

    def all(self, phase: RecordPhase | None = None) -> AsyncIterator[RunRecord]:
        """Yield every record."""
        ...

    async def attempts(self, run_key: str) -> Sequence[RunRecord]:
        """Return all attempts at a key."""
        ...

    async def delete(self, record: RunRecord) -> None:
        """Forget an attempt."""
        ...

    def permits(self) -> AsyncIterator[tuple[str, str]]:
        """Yield the `ref` of each permit's claim, and its own."""
        ...

    async def delete_orphan(self, claim: str, permit: str) -> bool:
        """Take a permit away whose claim is gone, and return whether it is."""
        ...

    def waiter_notes(self) -> AsyncIterator[str]:
        """Yield the names of all notes that some flow run waits for a run."""
        ...

    def notes_of(self, record: RunRecord) -> str:
        """Return what the names of a record's notes begin with."""
        ...

    async def delete_note(self, name: str) -> None:
        """Take a note away."""
        ...


def parse_age(text: str) -> timedelta:
    """Return an age such as `90d`, `12h` or `2w`; a bare number is days.

    Raises:
        ConfigurationError: It is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhdw]?)\s*", text)
    if match is None:
        raise ConfigurationError(f"{text!r} is no age: give a number and s, m, h, d or w, such as 90d.")
    return timedelta(seconds=float(match[1]) * _UNITS[match[2] or "d"])


def prunable(records: Iterable[RunRecord], older_than: timedelta) -> list[RunRecord]:
    """Return the records that may go: of keys whose every attempt has ended, or never started, so long ago. Pure.

    The first attempt at a key comes last: as long as it stands, nobody claims it anew before later ones that are left.
    """
    by_key: defaultdict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        by_key[record.run_key].append(record)
    return [
        attempt
        for attempts in by_key.values()
        if all(_old(attempt, older_than) for attempt in attempts)
        for attempt in sorted(attempts, key=lambda attempt: attempt.attempt, reverse=True)
    ]


def _old(record: RunRecord, older_than: timedelta) -> bool:
    over = record.phase in (RecordPhase.ENDED, RecordPhase.NOT_STARTED)
    least = max(older_than.total_seconds(), YOUNGEST.total_seconds() + record.good_for)
    return over and record.idle >= least


async def prune(store: PrunableStore, *, older_than: timedelta = OLDER_THAN, dry_run: bool = False) -> Pruned:
    """Remove the records of runs that ended longer ago than `older_than`, and what is left over of others.

    That are notes of who waits for what, and permits of records that are gone.

    Args:
        store: The record store.
        older_than: The age, counted from when a run's end was written down. An hour at least.
        dry_run: Only count.
    """
    # The notes first: a run that is claimed and joined meanwhile then has a record that we know of.
    notes = [name async for name in store.waiter_notes()]
    permits = [permit async for permit in store.permits()]
    records = [record async for record in store.all()]
    going = prunable(records, older_than)
    needed = tuple(store.notes_of(record) for record in records if record.phase is RecordPhase.STARTED)
    left_over = [name for name in notes if not name.startswith(needed)]
    if not dry_run:
        for run_key in dict.fromkeys(record.run_key for record in going):
            # Read again: since the list was made, the key may have been used. Whoever claims it from here on sees that
            # attempts are gone which it decided by, and decides again.
            for record in prunable(await store.attempts(run_key), older_than):
                await store.delete(record)
        standing = {record.ref for record in records}
        for claim, permit in permits:
            if claim not in standing:
                await store.delete_orphan(claim, permit)
        for name in left_over:
            await store.delete_note(name)
    return Pruned(runs=len(going), notes=len(left_over), kept=len(records) - len(going))
