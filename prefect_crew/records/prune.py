"""Removing the records of runs that ended long ago."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

from prefect_crew.records.model import RecordPhase, RunRecord
from prefect_crew.records.store import PrefectRecords, waiter_prefix

OLDER_THAN = timedelta(days=90)
"""The age at which ended runs are removed unless another is given: how long they are started at most once."""
YOUNGEST = timedelta(hours=1)
"""What was changed within this time stays, whatever age is asked for: more than clocks may differ."""


@dataclass(frozen=True)
class Pruned:
    """What `prune` removed, or with `dry_run` would have."""

    runs: int
    notes: int
    kept: int
    """Records that stay."""


def prunable(records: Iterable[RunRecord], older_than: timedelta) -> list[RunRecord]:
    """Return the records that may go: of keys whose every attempt has ended, or never started, so long ago. Pure.

    The first attempt at a key comes last: as long as it stands, nobody claims it anew before later ones that are left.
    """
    by_key: defaultdict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        by_key[record.idempotency_key].append(record)
    return [
        attempt
        for attempts in by_key.values()
        if all(_is_old(attempt, older_than) for attempt in attempts)
        for attempt in sorted(attempts, key=lambda attempt: attempt.attempt, reverse=True)
    ]


def _is_old(record: RunRecord, older_than: timedelta) -> bool:
    least = max(older_than.total_seconds(), YOUNGEST.total_seconds() + record.good_for)
    return record.phase in (RecordPhase.ENDED, RecordPhase.NOT_STARTED) and record.idle >= least


async def prune(store: PrefectRecords, *, older_than: timedelta = OLDER_THAN, dry_run: bool = False) -> Pruned:
    """Remove the records of runs that ended longer ago than `older_than`, and notes and permits that are left over.

    Args:
        store: The record store.
        older_than: The age, counted from when a run's end was written down. An hour at least.
        dry_run: Only count.
    """
    # The notes first: a run that is claimed and waited for after that has a record that we know of.
    notes = await store.waiter_notes()
    permits = [permit async for permit in store.permits()]
    records = [record async for record in store.all()]
    going = prunable(records, older_than)
    needed = tuple(waiter_prefix(record) for record in records if record.phase is RecordPhase.STARTED)
    left_over = [name for name in notes if not name.startswith(needed)]
    if not dry_run:
        for idempotency_key in dict.fromkeys(record.idempotency_key for record in going):
            # Read again: since the list was made, the key may have been used. Whoever claims it from here on sees that
            # attempts are gone which it decided by, and decides again.
            for record in prunable(await store.attempts(idempotency_key), older_than):
                await store.delete(record)
        refs = {record.ref for record in records}
        for claim, permit in permits:
            if claim not in refs:
                await store.delete_orphan(claim, permit)
        for name in left_over:
            await store.delete_note(name)
    return Pruned(runs=len(going), notes=len(left_over), kept=len(records) - len(going))
