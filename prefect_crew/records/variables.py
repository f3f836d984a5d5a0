"""Variables of the Prefect server, read by its indexes: exact names, ids, and the time of the last change.

Every function raises one of PREFECT_ERRORS if the Prefect API cannot be reached or refuses.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal, NamedTuple, cast

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.exceptions import PrefectHTTPStatusError

from prefect_crew._internal.prefect_api import Urgency, is_busy, named_reads, read_in_turn, request_soon
from prefect_crew._internal.prefect_errors import TRANSPORT_ERRORS
from prefect_crew.records.model import Lease, utcnow

PAGE = 200
"""Variables in one answer, at most, and so names in one request. One answer is a snapshot; two answers are not."""
BUSY_FOR = 10.0
"""Seconds for which this module repeats a creation while the Prefect API is busy."""
RETRIED_BY_CLIENT = (408, 429, 502, 503)
"""Answers after which Prefect's client sends a request again by itself."""
OVERLAP = 5
"""Variables at the end of a page by change that the next page repeats: so a gap between two pages is noticed."""
SAVE_FOR = 300.0
"""Seconds for which a change is repeated while the Prefect API does not answer."""


class Variable(NamedTuple):
    """A Variable as the server returned it.

    `age`: seconds since its creation. `idle`: seconds since its last change. Both by the server's clock.
    """

    id: str
    name: str
    value: Any
    age: float
    idle: float
    updated: datetime

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of its value; empty if other software uses our names for something else."""
        value: Any = self.value
        return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def server_time(response: httpx.Response) -> datetime:
    """Return the time of an answer, by the clock of the server that sent it (the header `Date`)."""
    date = response.headers.get("Date")
    # A proxy may remove the header. Then our own clock counts: without any, a claim of a dead owner never grows old.
    return utcnow() if date is None else parsedate_to_datetime(date)


def variables_in(response: httpx.Response) -> list[Variable]:
    """Return the Variables in an answer, with their ages by the clock of the server that sent it."""
    now = server_time(response)
    variables: list[Variable] = []
    for stored in response.json():
        created, updated = datetime.fromisoformat(stored["created"]), datetime.fromisoformat(stored["updated"])
        age, idle = (max(0.0, (now - moment).total_seconds()) for moment in (created, updated))
        variables.append(Variable(stored["id"], stored["name"], stored["value"], age, idle, updated))
    return variables


async def create_variable(
    variable: Mapping[str, Any],
    *,
    urgency: Urgency = Urgency.CONTINUE,
    lease: Lease | None = None,
    is_patient: bool = False,
) -> str | None:
    """Create a Variable and return its id. Return None if the name is taken, perhaps by our own lost request.

    A busy server has done nothing, so this function repeats the request soon. After other errors Prefect's client does.
    With `is_patient`, this function repeats the request for five minutes while the Prefect API does not answer.
    """
    path = "/variables/"
    async with get_client() as client:
        try:
            try:
                new: dict[str, Any] = {"json": variable, "urgency": urgency, "alone": False}
                new |= {"give_up_after": SAVE_FOR} if is_patient else {"give_up_after": BUSY_FOR, "again": is_busy}
                new["before_sending"] = None if lease is None else lease.begin
                answer = await request_soon(client, "POST", path, **new)
            except (*TRANSPORT_ERRORS, PrefectHTTPStatusError) as error:
                is_status = isinstance(error, PrefectHTTPStatusError)
                if is_patient or (is_status and error.response.status_code not in RETRIED_BY_CLIENT):
                    raise
                answer = await client.request("POST", path, json=variable)
        except PrefectHTTPStatusError as error:
            if error.response.status_code != 409:
                raise
            return None
    return str(answer.json()["id"])


async def patch_variable(
    ref: str, body: Mapping[str, Any], *, urgency: Urgency = Urgency.CONTINUE, give_up_after: float | None = None
) -> None:
    """Change the Variable with this id. Repeat the request for five minutes while the Prefect API does not answer."""
    async with get_client() as client:
        change: dict[str, Any] = {"json": body, "give_up_after": give_up_after or SAVE_FOR, "urgency": urgency}
        await request_soon(client, "PATCH", f"/variables/{ref}", **change)


async def delete_variable(ref: str) -> None:
    """Delete the Variable with this id, if it exists."""
    async with get_client() as client:
        try:
            await client.request("DELETE", "/variables/{id}", path_params={"id": ref})
        except PrefectHTTPStatusError as error:
            if error.response.status_code != 404:
                raise


async def read_pages(
    variables: Mapping[str, Any], *, sort: Literal["NAME_ASC", "CREATED_DESC"] = "NAME_ASC"
) -> AsyncIterator[list[Variable]]:
    """Yield the Variables that match a filter, page by page.

    If few Variables match and no index finds them, sort by creation: to sort by name, a server follows the index of
    names and looks each Variable up by itself. If many match, sort by name: sorted by creation, each page is a scan.
    """
    offset = 0
    while True:
        json = {"variables": variables, "limit": PAGE, "offset": offset, "sort": sort}
        async with get_client() as client:
            page = variables_in(await read_in_turn(client, "/variables/filter", json=json))
        yield page
        if len(page) < PAGE:
            return
        offset += PAGE


async def read_exact(names: Sequence[str]) -> list[Variable]:
    """Return the Variables that have one of these names, as one snapshot. The caller gives at most `PAGE` names."""
    variables = await named_reads().read([*names], _ask_by_name, PAGE)
    return [variable for variable in variables if variable.name in names]


async def _ask_by_name(names: list[str]) -> list[Variable]:
    json = {"variables": {"name": {"any_": names}}, "limit": PAGE, "offset": 0}
    async with get_client() as client:
        return variables_in(await read_in_turn(client, "/variables/filter", json=json))


async def read_by_change(offset: int) -> list[Variable]:
    """Return a page of all Variables of the server, the latest change first. The server has an index for this order."""
    async with get_client() as client:
        return variables_in(await _ask_by_change(client, offset))


async def _ask_by_change(client: PrefectClient, offset: int) -> httpx.Response:
    return await read_in_turn(
        client, "/variables/filter", json={"limit": PAGE, "offset": offset, "sort": "UPDATED_DESC"}
    )


async def pages_by_change(since: datetime) -> AsyncGenerator[list[Variable]]:
    """Yield the Variables that were changed since a moment, page by page, the latest change first.

    The next page is requested before the caller gets this one. Some Variables come twice.
    """
    offset, before = 0, set[str]()
    async with get_client() as client:
        next_page = asyncio.create_task(_ask_by_change(client, offset))
        try:
            while True:
                page = variables_in(await next_page)
                ids = {variable.id for variable in page}
                # If two pages do not overlap, others have deleted Variables, and the following ones have moved up.
                meets = not offset or not before.isdisjoint(ids)
                is_last = meets and (len(page) < PAGE or page[-1].updated < since)
                offset = offset + PAGE - OVERLAP if meets else max(0, offset - PAGE // 2)
                if not is_last:
                    next_page = asyncio.create_task(_ask_by_change(client, offset))
                if meets:
                    before = ids
                    yield page
                if is_last:
                    return
        finally:
            next_page.cancel()


async def count_variables() -> int:
    """Return the number of Variables on the server."""
    async with get_client() as client:
        return int((await read_in_turn(client, "/variables/count", json={})).json())


async def without_claim(claim_by_id: Mapping[str, str]) -> list[str]:
    """Return the Variable ids whose claims are gone. The mapping has claim ids by Variable ids, `PAGE` at most."""
    if not claim_by_id:
        return []
    of_claims = {"id": {"any_": [*{*claim_by_id.values()}]}}
    there = {claim.id async for page in read_pages(of_claims) for claim in page}
    return [ref for ref, claim in claim_by_id.items() if claim not in there]
