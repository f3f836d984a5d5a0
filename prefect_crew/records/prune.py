"""Removing the records of runs that nobody can ask for any more: their flow runs ended long ago.

It walks through the server's Variables from the end of those that nobody has changed for longest, of which the server
has an index, and stops at the first page with one that is young. It never holds more than a page of them.

Everything here raises one of PREFECT_ERRORS where the Prefect API is away or refuses.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from math import inf
from typing import Any, Literal

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import TERMINAL_STATES

from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.records.budgets import delete_past_counters
from prefect_crew.records.model import RecordPhase, RunRecord
from prefect_crew.records.store import PrefectRecords, claims_named_in
from prefect_crew.records.variables import PAGE as VARIABLES
from prefect_crew.records.variables import (
    Variable,
    count_variables,
    delete_variable,
    read_by_change,
    server_time,
    without_claim,
)
from prefect_crew.settings import CrewSettings

YOUNGEST = timedelta(hours=1)
"""What was changed within this time stays, whatever age is asked for: more than clocks may differ."""
PAGE = 50
"""Flow runs in one answer: each brings its parameters, of up to 512 KiB."""
EVERY = 6 * 3600.0
"""Seconds between two times that a worker prunes: half of that to one and a half, so that workers that started together
do not all do it at once."""
FIRST_WITHIN = 3600.0
"""Seconds within which it does so for the first time."""
SHARE = 0.05
"""Of the Prefect server's time that pruning takes: after each step it pauses 19 times as long as the step took."""
LONGEST_PAUSE = 60.0
"""Seconds of a pause at most: a machine may sleep within a step."""
FLOW_RUN_ID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Pruned:
    """How many records `prune` removed, or with `dry_run` would have; and how many it kept that are as old.

    Those are of runs that have not ended, or that their flow runs may still ask for.
    """

    runs: int
    kept: int


GONE = inf
"""Seconds since a flow run ended that was deleted: it cannot be retried."""


def prunable(records: Iterable[RunRecord], older_than: timedelta, owners: Mapping[str, float]) -> list[RunRecord]:
    """Return the records that may go: of keys whose every attempt, and its flow runs, ended so long ago. Pure.

    The first attempt at a key comes last: as long as it stands, nobody claims it anew before later ones that are left.

    Args:
        records: All attempts at some keys.
        older_than: The age.
        owners: As `read_owners`. A record stays if one of the flow runs that it names is not there.
    """
    by_key = defaultdict[str, list[RunRecord]](list)
    for record in records:
        by_key[record.idempotency_key].append(record)
    return [
        attempt
        for attempts in by_key.values()
        if all(_is_old(record, older_than) and _owners_ended(record, older_than, owners) for record in attempts)
        for attempt in sorted(attempts, key=lambda attempt: attempt.attempt, reverse=True)
    ]


def _is_old(record: RunRecord, older_than: timedelta) -> bool:
    least = max(older_than.total_seconds(), YOUNGEST.total_seconds() + record.good_for)
    return record.phase in (RecordPhase.ENDED, RecordPhase.NOT_STARTED) and record.idle >= least


def _owners_ended(record: RunRecord, older_than: timedelta, owners: Mapping[str, float]) -> bool:
    least = max(older_than, YOUNGEST).total_seconds()
    return all(owners.get(owner, -inf) >= least for owner in owner_ids(record))


def owner_ids(record: RunRecord) -> list[str]:
    """Return the ids of the flow runs that a record names: its owner, and the root in a key that was made."""
    names = (record.flow_run_id or "", record.idempotency_key.partition("/")[0])
    return [name for name in dict.fromkeys(names) if FLOW_RUN_ID.fullmatch(name)]


async def read_owners(records: Iterable[RunRecord]) -> dict[str, float]:
    """Return the seconds, by the Prefect server's clock, since each flow run that records name ended, and all flow runs
    above it: any of them may be retried, also if it has completed, and then asks for its runs again.

    Minus infinity while one has not ended; `GONE` if it was deleted. The server is asked level by level.
    """
    owners = dict.fromkeys((owner for record in records for owner in owner_ids(record)), GONE)
    at = {owner: owner for owner in owners}
    while at:
        flow_runs = await read_by_id("/flow_runs/filter", at.values())
        # One that was deleted has left the one below it as a root.
        roots = {first: flow_runs[reached] for first, reached in at.items() if reached in flow_runs}
        tasks = await read_by_id("/task_runs/filter", (owner["parent_task_run_id"] for owner in roots.values()))
        at = {}
        for first, flow_run in roots.items():
            ended_for = flow_run["unchanged_for"] if flow_run["state_type"] in TERMINAL_STATES else -inf
            owners[first] = min(owners[first], ended_for)
            if parent := tasks.get(flow_run["parent_task_run_id"], {}).get("flow_run_id"):
                at[first] = parent
    return owners


async def read_by_id(
    path: Literal["/flow_runs/filter", "/task_runs/filter", "/flows/filter"], ids: Iterable[str | None]
) -> dict[str | None, dict[str, Any]]:
    """Return what there is, by id, with the seconds for which nobody has changed it."""
    wanted_ids = sorted({item for item in ids if item is not None})
    by_id = dict[str | None, dict[str, Any]]()
    async with get_client() as client:
        for start in range(0, len(wanted_ids), PAGE):
            json = {path.split("/")[1]: {"id": {"any_": wanted_ids[start : start + PAGE]}}, "limit": PAGE}
            response = await client.request("POST", path, json=json)
            now = server_time(response)
            for item in response.json():
                unchanged_for = (now - datetime.fromisoformat(item["updated"])).total_seconds()
                by_id[item["id"]] = {**item, "unchanged_for": unchanged_for}
    return by_id


class _Walk:
    """The way through the server's Variables from the one that nobody has changed for longest.

    The server lists them from the other end only, so each page is asked for by its distance from the last one. Where
    others delete some that were passed, the walk passes over some that were not: the next prune meets those.
    """

    def __init__(self) -> None:
        self._passed = 0
        self._until: datetime | None = None
        self.is_over = False

    async def next_page(self) -> list[Variable]:
        """Return the next Variables, those first that nobody has changed for longest."""
        count = await count_variables() - self._passed
        page = (await read_by_change(max(0, count - VARIABLES)))[: max(0, count)][::-1]
        self.is_over = count <= VARIABLES
        self._passed += len(page)
        self._until = page[-1].updated if page else None
        return page

    def deleted(self, variables: Iterable[Variable]) -> None:
        """Note that Variables were deleted: those that the walk has passed count no more."""
        self._passed -= sum(self._until is not None and variable.updated <= self._until for variable in variables)


class _Pace:
    """Pauses that leave the Prefect server to others for most of the time."""

    def __init__(self, share: float) -> None:
        self._factor = 1 / share - 1
        self._began = self._now()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def pause(self) -> None:
        """Pause in proportion to the time since the last pause."""
        await asyncio.sleep(min((self._now() - self._began) * self._factor, LONGEST_PAUSE))
        self._began = self._now()


async def prune(
    store: PrefectRecords, *, older_than: timedelta | None = None, dry_run: bool = False, share: float = SHARE
) -> Pruned:
    """Remove the records of runs whose flow runs ended long ago, and counters of the past.

    Several may prune at the same time.

    Args:
        store: The record store.
        older_than: The age, counted from when a run's end was written down, and from the end of the flow run that
            started it and of those above it. An hour at least; left out, the setting `keep_records_days`.
        dry_run: Only count.
        share: Of the Prefect server's time that this takes, at most.
    """
    older_than = timedelta(days=CrewSettings().keep_records_days) if older_than is None else older_than
    least = max(older_than, YOUNGEST).total_seconds()
    runs, kept, pace, walk = 0, 0, _Pace(share), _Walk()
    if not dry_run:
        await delete_past_counters(older_than)
    is_young = False
    while not (walk.is_over or is_young):
        page = await walk.next_page()
        old = [variable for variable in page if variable.idle >= least]
        is_young = len(old) < len(page)
        records, _ = await store.readable(old)
        going = prunable(
            records, older_than, await read_owners(record for record in records if _is_old(record, older_than))
        )
        kept += len(records) - len(going)
        if not dry_run:
            orphans = {*await without_claim(claims_named_in(old))}
            for ref in orphans:
                await delete_variable(ref)
            walk.deleted(variable for variable in old if variable.id in orphans)
        await pace.pause()
        for key, theirs in Counter(record.idempotency_key for record in going).items():
            # Read again, as a whole: the page has some of the attempts at the key, and it may have been used since.
            removed = await _prune_key(store, key, older_than, walk, dry_run=dry_run)
            kept += 0 if removed else theirs
            # Where nothing is deleted, the walk meets the other attempts later.
            runs += min(removed, theirs) if dry_run else removed
            await pace.pause()
    return Pruned(runs=runs, kept=kept)


async def _prune_key(store: PrefectRecords, key: str, older_than: timedelta, walk: _Walk, *, dry_run: bool) -> int:
    """Remove all attempts at a key or none; return how many.

    Whoever claims it from here on sees that attempts are gone which it decided by, and decides again.
    """
    attempts = await store.attempts(key)
    # So may its flow runs: one that was retried since asks for its runs again.
    going = prunable(attempts, older_than, await read_owners(attempts))
    if not dry_run:
        for record in going:
            walk.deleted(await store.delete(record))
    return len(going)


async def prune_regularly(log: logging.Logger | logging.LoggerAdapter[logging.Logger]) -> None:
    """Prune now and then, for as long as a worker lives. Where it fails, it is tried again the next time."""
    seconds = random.uniform(0.02, 1.0) * FIRST_WITHIN  # noqa: S311  no secret depends on it
    while True:
        await asyncio.sleep(seconds)
        try:
            pruned = await prune(PrefectRecords())
            if pruned.runs:
                log.info("%d old run records were removed, %d as old stay.", pruned.runs, pruned.kept)
        except PREFECT_ERRORS as error:
            log.debug("Old run records are not removed now: the Prefect server does not answer (%s).", error)
        except Exception:  # nobody waits for this task, which lives as long as its worker: the log has it, whole
            log.exception("Old run records could not be removed. The worker tries it again later.")
        seconds = random.uniform(0.5, 1.5) * EVERY  # noqa: S311
