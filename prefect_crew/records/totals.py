"""What removed runs used: a total for each day, so that costs outlive the records. Each run counts exactly once.

`crew_usage_DAY_NUMBER` is a Variable that is created and never changed. A new one takes in the one before it, or
follows it where both together are too large. So creating a number compares with what was read: of two processes that
add to a day at the same time, one gets the number, and the other reads again. `refs` names the records that were
counted and still stood at that moment: a process may be killed after it has counted, and before it deletes them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import date

from pydantic import BaseModel, Field, ValidationError
from pydantic_core import to_json

from prefect_crew.client.models import TokenUsage
from prefect_crew.exceptions import CrewError
from prefect_crew.records.model import RecordPhase, RunRecord
from prefect_crew.records.store import VALUE_LIMIT, Variable, create_variable, is_there, read_named, read_pages

TAG = "prefect-crew-usage"
AT_ONCE = 40
"""Runs that are added in one step: the ids of their records take 1,500 of the 5,000 bytes of a Variable."""
MOST_TRIES = 20
"""Each that fails is one of another process that does not."""
LONGEST, MOST_TAGS = 60, 10
"""Characters of a name in a total, and tags: one run has to fit into a Variable."""
MOST = 2**53
"""What a count, or a cost, is at most: Prefect stores no larger numbers, and a crew may report any."""
_NAME = re.compile(r"crew_usage_\d{8}_(\d+)")


class DayTotal(BaseModel):
    """What the removed runs of a crew that ended on a day (UTC) used, by the flow and the tags of their flow runs.

    `reported` of the `runs` reported their tokens, and the cost of `priced` is known: nothing is known of the others.
    A run counts from just before its record is deleted.
    """

    day: date
    crew: str
    flow: str | None = None
    tags: list[str] = Field(default_factory=list[str])
    runs: int = 0
    reported: int = 0
    priced: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cost: float = 0.0


class _Part(BaseModel):
    """What one of a day's Variables holds. It stands for those with the numbers from `since` on to its own."""

    since: int
    totals: list[DayTotal] = Field(default_factory=list[DayTotal])
    refs: list[str] = Field(default_factory=list[str])


def _parts_in(variables: Sequence[Variable]) -> tuple[dict[int, _Part], int, list[str]]:
    """Return what counts of a day's Variables by their numbers, the next free number, and the ids of the others."""
    found, ids = dict[int, _Part](), dict[int, str]()
    for variable in variables:
        if (name := _NAME.fullmatch(variable.name)) is not None:
            ids[int(name[1])] = variable.id
            with suppress(ValidationError):  # somebody else uses our names
                found[int(name[1])] = _Part.model_validate(variable.value)
    free = since = max(ids, default=0) + 1
    parts = dict[int, _Part]()
    for number in sorted(found, reverse=True):
        if number < since:
            parts[number] = found[number]
            since = found[number].since
    return parts, free, [ids[number] for number in found if number not in parts]


def total_of(record: RunRecord, flow: str | None, tags: Sequence[str]) -> DayTotal:
    """Return the total of one run that has ended."""
    usage = record.usage or (record.result and record.result.usage) or TokenUsage()
    return DayTotal(
        day=(record.ended_at or record.claimed_at).date(),
        crew=record.crew[:LONGEST],
        flow=flow and flow[:LONGEST],
        tags=[tag[:LONGEST] for tag in sorted(tags)[:MOST_TAGS]],
        runs=1,
        reported=usage.total_tokens is not None,
        priced=record.cost is not None,
        prompt_tokens=usage.prompt_tokens or 0,
        completion_tokens=usage.completion_tokens or 0,
        total_tokens=usage.total_tokens or 0,
        cost=record.cost or 0.0,
    )


def _summed(totals: Sequence[DayTotal]) -> list[DayTotal]:
    """Return one total for each day, crew, flow and tags."""
    groups = defaultdict[tuple[object, ...], list[DayTotal]](list)
    for total in totals:
        groups[total.day, total.crew, total.flow or "", *total.tags].append(total)
    counted = ("runs", "reported", "priced", "prompt_tokens", "completion_tokens", "total_tokens", "cost")
    return [
        group[0].model_copy(update={name: min(sum(getattr(one, name) for one in group), MOST) for name in counted})
        for _, group in sorted(groups.items(), key=lambda item: str(item[0]))
    ]


async def add_to_totals(records: Sequence[RunRecord], total: Callable[[RunRecord], DayTotal]) -> None:
    """Add the runs of records that are about to be deleted to the totals of their days; those that were added, not.

    Args:
        records: As they were read from the store.
        total: Gives the total of one.

    Raises:
        httpx.HTTPError: The Prefect API is away or refuses.
        CrewError: Others add to the same day without a pause.
    """
    by_day = defaultdict[date, list[tuple[str, DayTotal]]](list)
    for record in records:
        if record.phase is RecordPhase.ENDED and record.ref is not None:
            by_day[(one := total(record)).day].append((record.ref, one))
    for day, runs in by_day.items():
        for start in range(0, len(runs), AT_ONCE):
            await _add(f"crew_usage_{day:%Y%m%d}_", dict(runs[start : start + AT_ONCE]))


async def _add(prefix: str, runs: dict[str, DayTotal]) -> None:
    for _ in range(MOST_TRIES):
        parts, free, replaced = _parts_in(await read_named(prefix))
        for ref in replaced:
            await is_there(ref, delete=True)
        counted = {ref for part in parts.values() for ref in part.refs}
        if not (new := [ref for ref in runs if ref not in counted]):
            return
        before = parts[max(parts)] if parts else _Part(since=free)
        # Looked for after the totals were read: one that stands has not been counted and left out of `refs` since.
        asked = {"id": {"any_": [*before.refs, *new]}}
        there = {one.id async for page in read_pages(asked) for one in page}
        if not (new := [ref for ref in new if ref in there]):
            return
        # Whether what is created counts, the next round sees: this process may have slept since it has read.
        added = _Part(since=free, totals=_summed([runs[ref] for ref in new]), refs=new)
        whole = _Part(
            since=before.since,
            totals=_summed([*before.totals, *added.totals]),
            refs=[*(ref for ref in before.refs if ref in there), *new],
        )
        fits = next((one for one in (whole, added) if len(to_json(_value(one))) <= VALUE_LIMIT), None)
        if fits is None:
            for half in (new[::2], new[1::2]):
                await _add(prefix, {ref: runs[ref] for ref in half})
            return
        await create_variable({"name": f"{prefix}{free}", "value": _value(fits), "tags": [TAG]})
    raise CrewError(
        f"What pruned runs used could not be added to the Variables {prefix}…: others changed them {MOST_TRIES} times. "
        "The records of these runs stay. Prune again later."
    )


def _value(part: _Part) -> dict[str, object]:
    return part.model_dump(mode="json", exclude_defaults=True)


async def totals_of_removed() -> list[DayTotal]:
    """Return what the runs used whose records were pruned, by day, crew, flow and tags, the oldest day first.

    Raises:
        httpx.HTTPError: The Prefect API is away or refuses.
    """
    return (await read_totals())[0]


async def read_totals() -> tuple[list[DayTotal], set[str]]:
    """Return these totals, and the `ref` of each record that is counted in them and may still stand.

    Raises:
        httpx.HTTPError: The Prefect API is away or refuses.
    """
    by_day = defaultdict[str, list[Variable]](list)
    async for page in read_pages({"tags": {"all_": [TAG]}}):
        for variable in page:
            by_day[variable.name.rpartition("_")[0]].append(variable)
    parts = [part for variables in by_day.values() for part in _parts_in(variables)[0].values()]
    return _summed([total for part in parts for total in part.totals]), {ref for part in parts for ref in part.refs}
