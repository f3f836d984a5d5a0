"""The claim that binds a batch's name to its ledger, on the Prefect server.

Without it, a batch that is gone on with on a machine that does not have its ledger would find nothing done and buy
everything again. The same holds for an older copy of the ledger, such as a backup: so both know a generation, which
grows before rows are started, while they are, and once they have been. It is written to the ledger first: whatever dies
in between, the ledger that is in use never knows a smaller one than the Prefect server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError

from prefect_crew.api.errors import BatchChangedError, LedgerMissingError
from prefect_crew.batches.ledger import BatchEntry, Ledger, LedgerError
from prefect_crew.impatience import request_soon

__all__ = [
    "ASKS",
    "TAG",
    "BatchChangedError",
    "Bound",
    "Kept",
    "LedgerMissingError",
    "begin_generation",
    "bind",
    "binding_name",
    "check_age",
    "kept_here",
    "note_asking",
    "read_binding",
]

TAG = "prefect-crew-batch"
ASKS = "prefect-crew-batch-asks"
"""The tag of a batch of which some rows wait for people, or did when they were last looked at."""
VERSION = 1


@dataclass(frozen=True)
class Bound:
    """A batch that is bound to its ledger: the entry that stands, and the one from before this call."""

    entry: BatchEntry
    before: BatchEntry | None


@dataclass(frozen=True)
class Kept:
    """What is known of a batch before a call: the ledger's entry, and whether the Prefect server knows the batch."""

    before: BatchEntry | None
    is_bound: bool


def binding_name(batch: str) -> str:
    """Return the name of the Variable that binds a batch."""
    return f"crew_batch_{hashlib.sha256(batch.encode()).hexdigest()[:32]}"


async def kept_here(ledger: Ledger) -> Kept:
    """Return what the ledger at hand and the Prefect server know of the batch.

    Raises:
        LedgerMissingError: It is bound to another ledger.
        LedgerError: The ledger at hand is an older copy.
    """
    before = await ledger.entry()
    bound = await read_binding(ledger.batch)
    if bound is not None:
        if before is None or bound.get("ledger_id") != before.ledger_id:
            raise LedgerMissingError(name=ledger.batch, ledger=str(bound.get("ledger")))
        check_age(before, bound.get("generation"), ledger=ledger.address)
    return Kept(before, is_bound=bound is not None)


async def bind(
    ledger: Ledger,
    kept: Kept,
    *,
    crew_url: str,
    fingerprint: str,
    total: int,
    go_on: bool,
    place: str,
    call: Mapping[str, Any] | None = None,
) -> Bound:
    """Bind the batch to the ledger that keeps it.

    Args:
        ledger: The ledger at hand.
        kept: What is known of the batch.
        crew_url, fingerprint, total: What the batch is run with now.
        go_on: Whether a batch whose rows or crew have changed goes on all the same.
        place: Where the ledger is found again: its path, its URL without a password, or what stands for it.
        call: What `batch retry` needs.

    Raises:
        LedgerMissingError: Somebody binds it to another ledger at this moment.
        BatchChangedError: Its rows or its crew have changed.
    """
    before = kept.before
    if before is not None and not go_on:
        _refuse_change(before, crew_url, fingerprint, total)
    entry = await ledger.enter(crew_url=crew_url, fingerprint=fingerprint, total=total, call=call)
    if not kept.is_bound:
        await _claim(entry, place)
    return Bound(entry, before)


def check_age(entry: BatchEntry, known: Any, *, ledger: str) -> None:
    """Make sure that a ledger is not older than what is known of it elsewhere.

    Args:
        entry: What the ledger knows of the batch.
        known: The generation that is known elsewhere, None for none.
        ledger: Its address.

    Raises:
        LedgerError: It is.
    """
    generation, here = known if isinstance(known, int) else 0, entry.generation or 0
    if here < generation:
        raise LedgerError(
            f"is an older copy: it knows batch {entry.name!r} up to generation {here}, and the batch has reached "
            f"{generation}. Rows that were started since are not in it, so nothing was started.",
            ledger=ledger,
            advice=(
                "Use the newer ledger. If that is lost, and its rows may be started again: prefect variable unset "
                f"{binding_name(entry.name)}, then run the batch with this one."
            ),
        )


async def begin_generation(ledger: Ledger, place: str, *, patience: float) -> int:
    """Begin the next generation of a batch that is bound, in its ledger and then on the Prefect server; return it.

    Args:
        ledger: The ledger that keeps it.
        place: Where that is found again, as for `bind`.
        patience: Seconds for which a Prefect API that is away or busy is asked again.

    Raises:
        LedgerError: The ledger cannot be written.
        LedgerMissingError: The batch was bound to another ledger meanwhile.
        httpx.HTTPError, PrefectException: The Prefect API is away.
    """
    generation = await ledger.advance()
    entry = await ledger.entry()
    if entry is None:
        raise LedgerError("knows the batch no more.", ledger=ledger.address)
    async with get_client() as client:
        variable = await client.read_variable_by_name(binding_name(ledger.batch))
        if variable is not None:
            value = variable.value if isinstance(variable.value, dict) else {}
            if value.get("ledger_id") != entry.ledger_id:
                raise LedgerMissingError(name=ledger.batch, ledger=str(value.get("ledger")))
            body = {"value": {**value, "crew_url": entry.crew_url, "generation": generation}}
            # By its id: one that was made anew under the name is not this one.
            await request_soon(client, "PATCH", f"/variables/{variable.id}", json=body, patience=patience)
            return generation
    await _claim(entry, place)
    return generation


def _refuse_change(entry: BatchEntry, crew_url: str, fingerprint: str, total: int) -> None:
    if entry.crew_url != crew_url:
        raise BatchChangedError(name=entry.name, difference=f"crew {entry.crew_url}, not {crew_url}")
    if entry.fingerprint != fingerprint:
        these = f"{total} others" if total == entry.total else f"these {total}"
        raise BatchChangedError(name=entry.name, difference=f"{entry.total} rows, not {these}")


async def read_binding(batch: str) -> dict[str, Any] | None:
    """Return what the Prefect server knows of a batch: `ledger`, where its ledger is, and `ledger_id`; None if nothing.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away.
    """
    async with get_client() as client:
        variable = await client.read_variable_by_name(binding_name(batch))
    if variable is None:
        return None
    value: Any = variable.value
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


async def note_asking(batch: str, asks: bool) -> None:
    """Note on the Prefect server whether rows of a batch wait for people, so that not every ledger has to be opened.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away.
    """
    name = binding_name(batch)
    async with get_client() as client:
        variable = await client.read_variable_by_name(name)
        if variable is None or asks is (ASKS in variable.tags):
            return
        tags = [TAG, ASKS] if asks else [TAG]
        await client.request("PATCH", "/variables/name/{name}", path_params={"name": name}, json={"tags": tags})


async def _claim(entry: BatchEntry, place: str) -> None:
    value: dict[str, Any] = {"version": VERSION, "batch": entry.name, "ledger_id": entry.ledger_id, "ledger": place}
    value |= {"crew_url": entry.crew_url, "generation": entry.generation or 0}
    body = {"name": binding_name(entry.name), "value": value, "tags": [TAG]}
    async with get_client() as client:
        try:
            await client.request("POST", "/variables/", json=body)
        except PrefectHTTPStatusError as error:
            if error.response.status_code != 409:
                raise
    bound = await read_binding(entry.name)
    if bound is None or bound.get("ledger_id") != entry.ledger_id:
        raise LedgerMissingError(name=entry.name, ledger=str((bound or {}).get("ledger")))
