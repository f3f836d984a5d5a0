"""Removing the records of runs that no flow run can ask for any more: their flow runs ended long ago.

`prune` walks through the server's Variables from the longest unchanged one on, by the server's index of changes, and
stops at the first page with a young Variable. It never holds more than one page.

Everything here raises one of PREFECT_ERRORS if the Prefect API cannot be reached or refuses.
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
from prefect_crew.exceptions import UnreadableRecordError
from prefect_crew.records.budgets import delete_past_counters
from prefect_crew.records.model import RecordPhase, RunRecord
from prefect_crew.records.sessions import has_last_turn, passed_turns
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
"""A Variable that was changed within this time stays, whatever age the caller gives: clocks differ by less."""
PAGE = 50
"""Flow runs in one answer: each brings its parameters, of up to 512 KiB."""
EVERY = 6 * 3600.0
"""Seconds between two prunes of a worker, times a random factor of 0.5 to 1.5: workers that started together must not
prune at the same time."""
FIRST_WITHIN = 3600.0
"""Seconds within which a worker prunes for the first time."""
SHARE = 0.05
"""The share of the Prefect server's time for pruning: after each step it pauses 19 times as long as the step took."""
LONGEST_PAUSE = 60.0
"""The longest pause in seconds: if a machine sleeps within a step, the step seems long."""
FLOW_RUN_ID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Pruned:
    """The number of records that `prune` removed (with `dry_run`, would remove), and of equally old ones that it kept.

    `prune` keeps records of runs that have not ended, and of runs whose flow runs may be retried and ask for them.
    """

    runs: int
    kept: int


GONE = inf
"""Stands for the seconds since the end of a deleted flow run: nobody can retry it."""


def prunable(records: Iterable[RunRecord], older_than: timedelta, owners: Mapping[str, float]) -> list[RunRecord]:
    """Return the records of keys whose attempts, and their flow runs, all ended long enough ago. Pure.

    The first attempt at a key comes last: while it exists, no caller claims its number again below later attempts.

    Args:
        records: All attempts at some keys.
        older_than: The age.
        owners: The result of `read_owners`. A record stays if this lacks a flow run of the record.
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
    """Return the ids of the flow runs that a record names: its owner, and the root flow run in a derived key."""
    names = (record.flow_run_id or "", record.idempotency_key.partition("/")[0])
    return [name for name in dict.fromkeys(names) if FLOW_RUN_ID.fullmatch(name)]


async def read_owners(records: Iterable[RunRecord]) -> dict[str, float]:
    """Return, for each flow run that records name, the seconds since it and all flow runs above it have ended.

    Somebody may retry any of these flow runs, even a completed one, which then asks for its runs again. The value is
    minus infinity while one has not ended, and `GONE` if the flow run was deleted. Seconds are by the Prefect server's
    clock. Each level of flow runs takes two requests.
    """
    owners = dict.fromkeys((owner for record in records for owner in owner_ids(record)), GONE)
    at = {owner: owner for owner in owners}
    while at:
        flow_runs = await read_by_id("/flow_runs/filter", at.values())
        # If a flow run was deleted, the flow run below it counts as the root.
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
    """Return the flow runs, task runs or flows that exist, by id, each with a field `unchanged_for`: the seconds since
    its last change."""
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
    """A walk through the server's Variables from the longest unchanged one on.

    The server lists them from the other end, so the walk asks for each page by its distance from the last Variable. If
    others delete Variables behind the walk, it skips some Variables before it, which the next prune meets.
    """

    def __init__(self) -> None:
        self._passed = 0
        self._until: datetime | None = None
        self.is_over = False

    async def next_page(self) -> list[Variable]:
        """Return the next Variables, the longest unchanged one first."""
        count = await count_variables() - self._passed
        page = (await read_by_change(max(0, count - VARIABLES)))[: max(0, count)][::-1]
        self.is_over = count <= VARIABLES
        self._passed += len(page)
        self._until = page[-1].updated if page else None
        return page

    def deleted(self, variables: Iterable[Variable]) -> None:
        """Note that Variables were deleted: the walk counts only passed Variables that still exist."""
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
    """Remove the records of runs whose flow runs ended long ago, and counters of past periods.

    Several processes may prune at the same time.

    Args:
        store: The record store.
        older_than: The age, counted from the moment at which the end of a run was stored, and from the end of the flow
            run that started it and of all flow runs above it. At least an hour. Default: the setting
            `keep_records_days`.
        dry_run: Only count.
        share: The largest share of the Prefect server's time that this takes.
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
            passed = {variable.id for variable in await passed_turns(old)}
            leftovers = {*await without_claim(claims_named_in(old)), *passed}
            for ref in leftovers:
                await delete_variable(ref)
            walk.deleted(variable for variable in old if variable.id in leftovers)
        await pace.pause()
        for key, theirs in Counter(record.idempotency_key for record in going).items():
            # Read the whole key again: the page has only some of its attempts, and a call may have used the key since.
            removed = await _prune_key(store, key, older_than, walk, dry_run=dry_run)
            kept += 0 if removed else theirs
            # With `dry_run`, the walk meets the other attempts of the key later.
            runs += min(removed, theirs) if dry_run else removed
            await pace.pause()
    return Pruned(runs=runs, kept=kept)


async def _prune_key(store: PrefectRecords, key: str, older_than: timedelta, walk: _Walk, *, dry_run: bool) -> int:
    """Remove all attempts at a key or none. Return the number of removed attempts.

    A caller that read the attempts before, and claims the key now, finds them gone in `confirm`, and decides again.
    """
    try:
        attempts = await store.attempts(key)
        if await has_last_turn(attempts):
            return 0
    except UnreadableRecordError:  # of a later version, which prunes the key
        return 0
    # Read the flow runs again as well: somebody may have retried one since, and it asks for its runs again.
    going = prunable(attempts, older_than, await read_owners(attempts))
    if not dry_run:
        for record in going:
            walk.deleted(await store.delete(record))
    return len(going)


async def prune_regularly(log: logging.Logger | logging.LoggerAdapter[logging.Logger]) -> None:
    """Prune every few hours as long as a worker lives. A prune that fails is tried again hours later."""
    seconds = random.uniform(0.02, 1.0) * FIRST_WITHIN  # noqa: S311  no secret depends on it
    while True:
        await asyncio.sleep(seconds)
        try:
            pruned = await prune(PrefectRecords())
            if pruned.runs:
                log.info("%d old run records were removed, %d others of this age stay.", pruned.runs, pruned.kept)
        except PREFECT_ERRORS as error:
            log.debug("Old run records are not removed now: the Prefect server does not answer (%s).", error)
        except Exception:  # nobody awaits this task, which lives as long as its worker: the log gets the traceback
            log.exception("Old run records could not be removed. The worker tries it again later.")
        seconds = random.uniform(0.5, 1.5) * EVERY  # noqa: S311
