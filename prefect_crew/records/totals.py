"""What removed runs used: a total for each day, so that costs outlive the records. Each run counts exactly once.

`crew_usage_DAY_SLOT` is a Variable that is created and never changed. Its value has a number, and the slot is this
number modulo `SLOTS`: one request for exact names reads a day. A new one takes in the one before it, or follows it
where both together are too large. So creating a number compares with what was read: of two processes that add to a
day at the same time, one gets the number, and the other reads again. A process that sleeps in between may create a
number whose slot is free again. The Variables with higher numbers stand for that number as well, so it does not count.
`refs` names the records that were counted and still stood at that moment: a process may be killed after it has counted,
and before it deletes them.
Everything here raises one of PREFECT_ERRORS where the Prefect API is away or refuses.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from datetime import date, timedelta
from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field, ValidationError
from pydantic_core import to_json

from prefect_crew.exceptions import CrewError
from prefect_crew.prices import Spending
from prefect_crew.records.model import RunRecord, utcnow
from prefect_crew.records.store import (
    PAGE,
    VALUE_LIMIT,
    Variable,
    create_variable,
    delete_variable,
    read_exact,
    read_pages,
    without_claim,
)

TAG = "prefect-crew-usage"
MOST_TRIES = 20
"""Each that fails is one of another process that does not."""
LONGEST, MOST_TAGS = 60, 10
"""Characters of a name in a total, and tags: one run has to fit into a Variable."""
SLOTS = PAGE
"""Variables that a day may have: one request reads them all."""
DAYS = 62
"""Days that are read by their names. A longer time is a person's question: all Variables are looked through."""
_NAME = re.compile(r"crew_usage_\d{8}_(\d+)")


_Short = Annotated[str, AfterValidator(lambda name: name[:LONGEST])]


class DayTotal(BaseModel):
    """What runs of one crew used and cost that ended on one day (UTC), of one flow and batch, with equal tags."""

    day: date
    crew: _Short
    spending: Spending
    flow: _Short | None = None
    tags: Annotated[list[_Short], AfterValidator(lambda tags: sorted(tags)[:MOST_TAGS])] = Field(
        default_factory=list[str]
    )
    """Those of the flow runs."""
    batch: str | None = None
    flow_run_id: str | None = None
    """To look up flow and tags by."""


class _Part(BaseModel):
    """What one of a day's Variables holds. It stands for those with the numbers from `since` on."""

    number: int
    since: int
    totals: list[DayTotal] = Field(default_factory=list[DayTotal])
    refs: list[str] = Field(default_factory=list[str])


def _parts_in(variables: Sequence[Variable]) -> tuple[dict[int, _Part], int | None, list[str]]:
    """Return what counts of a day's Variables by their numbers, the next free number, and the ids of those that do not
    count. The number is None where there is no free slot."""
    found, ids, taken = dict[int, _Part](), dict[int, str](), set[int]()
    for variable in variables:
        if (name := _NAME.fullmatch(variable.name)) is not None:
            slot = int(name[1])
            try:
                part = _Part.model_validate(variable.value)
            except ValidationError:  # somebody else uses our names
                taken.add(slot)
            else:
                found[part.number], ids[part.number] = part, variable.id
    first = since = max(found, default=0) + 1
    parts = dict[int, _Part]()
    for number in sorted(found, reverse=True):
        if number < since:
            parts[number] = found[number]
            since = found[number].since
    taken |= {number % SLOTS for number in parts}
    free = next((number for number in range(first, first + SLOTS) if number % SLOTS not in taken), None)
    return parts, free, [ids[number] for number in found if number not in parts]


def _names(day: date) -> list[str]:
    return [f"crew_usage_{day:%Y%m%d}_{slot}" for slot in range(SLOTS)]


def spending_of(record: RunRecord) -> Spending:
    """Return what one run that has ended used and cost."""
    usage = record.usage or (record.result and record.result.usage)
    is_reported = usage is not None and usage.total_tokens is not None
    return Spending(1, int(is_reported), int(record.cost is not None), usage, record.cost)


def total_of(record: RunRecord, flow: str | None = None, tags: Sequence[str] = ()) -> DayTotal:
    """Return the total of one run that has ended."""
    day = (record.ended_at or record.claimed_at).date()
    return DayTotal(day=day, crew=record.crew, flow=flow, tags=list(tags), spending=spending_of(record))


def _summed(totals: Sequence[DayTotal]) -> list[DayTotal]:
    """Return one total for each day, crew, flow and tags."""
    groups = defaultdict[tuple[object, ...], list[DayTotal]](list)
    for total in totals:
        groups[total.day, total.crew, total.flow or "", *total.tags].append(total)
    return [
        group[0].model_copy(update={"spending": Spending.sum(one.spending for one in group)})
        for _, group in sorted(groups.items(), key=lambda item: str(item[0]))
    ]


async def add_to_totals(record: RunRecord, total: DayTotal) -> None:
    """Add a run whose record is about to be deleted to the totals of its day, unless it was added before.

    Raises:
        CrewError: Others add to the same day without a pause.
    """
    names, ref = _names(total.day), str(record.ref)
    for _ in range(MOST_TRIES):
        parts, free, replaced = _parts_in(await read_exact(names))
        for one in replaced:
            await delete_variable(one)
        if any(ref in part.refs for part in parts.values()):
            return
        if free is None:
            raise CrewError(
                f"What a pruned run used could not be added to the totals of {total.day}: all {SLOTS} Variables "
                f"{names[0][:-1]}… are full. Its record stays. Fewer different tags on flow runs take less room."
            )
        before = parts[max(parts)] if parts else _Part(number=free, since=free)
        # Looked for after the totals were read: one that stands has not been counted and left out of `refs` since.
        gone = {*await without_claim({one: one for one in (*before.refs, ref)})}
        if ref in gone:
            return
        # Whether what is created counts, the next round sees: this process may have slept since it has read.
        added = _Part(number=free, since=free, totals=[total], refs=[ref])
        still = [one for one in before.refs if one not in gone]
        summed = _summed([*before.totals, total])
        whole = _Part(number=free, since=before.since, totals=summed, refs=[*still, ref])
        fits = whole if len(to_json(_value(whole))) <= VALUE_LIMIT else added
        await create_variable({"name": names[free % SLOTS], "value": _value(fits), "tags": [TAG]})
    raise CrewError(
        f"What a pruned run used could not be added to the Variables {names[0][:-1]}…: others changed them "
        f"{MOST_TRIES} times. Its record stays. Prune again later."
    )


def _value(part: _Part) -> dict[str, object]:
    return part.model_dump(mode="json", exclude_defaults=True)


async def read_totals(*, since: date | None = None, until: date | None = None) -> tuple[list[DayTotal], set[str]]:
    """Return what the runs used whose records were pruned, by day, crew, flow and tags, the oldest day first; and the
    `ref` of each record that is counted in them and may still stand.

    Of the days from `since` to `until`, both included; left out, of all days.
    """
    by_day = defaultdict[str, list[Variable]](list)
    last = until or utcnow().date() + timedelta(days=1)
    if since is not None and (last - since).days < DAYS:
        for number in range((last - since).days + 1):
            day = since + timedelta(days=number)
            by_day[str(day)] = await read_exact(_names(day))
    else:
        async for page in read_pages({"tags": {"all_": [TAG]}}):
            for variable in page:
                by_day[variable.name.rpartition("_")[0]].append(variable)
    parts = [part for variables in by_day.values() for part in _parts_in(variables)[0].values()]
    return _summed([total for part in parts for total in part.totals]), {ref for part in parts for ref in part.refs}
