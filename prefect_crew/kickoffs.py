"""Opening a run under Prefect: its key, the check of its inputs, the purchase, and what people see of it."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect_crew.advice import all_used
from prefect_crew.api.errors import (
    AuthenticationError,
    ConfigurationError,
    CrewError,
    InvalidInputsError,
    KickoffUncertainError,
)
from prefect_crew.api.inputs import STATE_ID, encode_inputs, inputs_digest, is_uuid, missing_inputs, unknown_inputs
from prefect_crew.api.models import CrewInput, CrewState
from prefect_crew.api.redaction import holds_secret, withholding
from prefect_crew.choices import check_choices
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.interrupts import watch_ctrl_c
from prefect_crew.limits import take_slots
from prefect_crew.logs import run_logger
from prefect_crew.open_runs import OpenRun, remember
from prefect_crew.owners import crash_dead_owner
from prefect_crew.posting import Purchase
from prefect_crew.purchases import Purchased, purchase_run
from prefect_crew.record_store import PrefectRecords
from prefect_crew.records import Decision, RecordPhase, RecordStore, latest_purchase
from prefect_crew.run_keys import identify
from prefect_crew.settings import CrewSettings
from prefect_crew.stopping import known_cancelled
from prefect_crew.wakeups import subscribe
from prefect_crew.watching import tell

if TYPE_CHECKING:
    from prefect_crew.api.webhooks import Webhooks

__all__ = ["check_inputs", "knowing_inputs", "open_run"]


async def open_run(
    crew: Crew,
    inputs: Mapping[str, Any],
    *,
    run_key: str | None = None,
    name: str | None = None,
    force_new: bool = False,
    meta: Mapping[str, Any] | None = None,
    webhooks: Webhooks | None = None,
    restore_from: str | UUID | None = None,
    inside_own_task: bool = False,
) -> OpenRun:
    """Find the run of a key, or buy it. What it returns has a kickoff id.

    Raises:
        ConfigurationError: The inputs cannot be sent, or the run key cannot be used; nothing was started.
        InvalidInputsError: Inputs are missing or unknown; nothing was started.
        RunKeyConflictError: The key belongs to another crew or other inputs; nothing was started.
        KickoffUncertainError: A kickoff was sent and nobody knows whether it started a run.
        CrewConnectionError, RateLimitedError, ServerError: The kickoff surely did not start a run; it may be retried.
        CrewAPIError: The server refused it; nothing was started.
    """
    check_choices(run_key=run_key, name=name, meta=meta, webhooks=webhooks, restore_from=restore_from)
    try:
        encoded = encode_inputs(inputs, as_json=crew.inputs_as_json)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{error} Nothing was started.") from None
    # Who gives one of pydantic's secrets has said that it is one.
    crew = crew.hiding(name for name, value in inputs.items() if holds_secret(value))
    state = None if restore_from is None else str(UUID(str(restore_from)))
    digest = inputs_digest(encoded, restore_from=state)
    identity = await identify(crew.label, digest, run_key=run_key, name=name, inside_own_task=inside_own_task)
    known = _known.get()
    settings = CrewSettings() if known is None else known.settings
    purchase = Purchase(crew, identity, encoded, digest, name, meta, webhooks, force_new, state, settings=settings)
    inputs = crew.sealed(inputs)
    del encoded, meta, webhooks
    records = PrefectRecords()
    slots = await take_slots(crew) if await _may_start(purchase, records) else None
    if slots is not None:
        purchase = replace(purchase, slot=str(slots.lease))
    try:
        async with nullcontext() if slots is None else slots.kept():
            run, opened = await _opened(purchase, records)
    except KickoffUncertainError:
        raise  # it may be in flight, and counts until its slot's lease ends
    except CrewError:
        if slots is not None:
            await slots.release()
        raise
    if slots is not None and not opened.bought:
        await slots.release()
    if not opened.bought:
        await crash_dead_owner(opened.record)
    if opened.bought:
        trouble = await run.shown_by().create(run.view(None))
        if trouble:
            run_logger().warning("Run %s has no artifact: %s", run.kickoff_id, trouble)
    remember(run)
    tell(run, None)
    return run


async def _may_start(purchase: Purchase, records: RecordStore) -> bool:
    """Return whether a call may start a run, and so needs a slot: what is in flight or completed needs none."""
    if purchase.crew.concurrency_limit is None:
        return False
    latest = latest_purchase(await records.attempts(purchase.identity.run_key))
    if latest is None or purchase.force_new:
        return True
    return latest.phase is RecordPhase.ENDED and latest.state is not CrewState.COMPLETED


async def _opened(purchase: Purchase, records: RecordStore) -> tuple[OpenRun, Purchased]:
    crew, identity = purchase.crew, purchase.identity
    if known_cancelled(purchase.identity.caller.flow_run_id):
        # A flow that catches the end of one wait must not go on buying.
        raise CrewError(f"Flow run {purchase.identity.caller.flow_run_id} was cancelled: it kicks off nothing more.")
    if purchase.settings.webhook_url:
        subscribe()
    async with CrewSession(crew) as session:
        # Open as long as the POST may be in flight, so that a Ctrl-C meanwhile stops what it started.
        with watch_ctrl_c(), withholding(crew.redactor(purchase.inputs)):
            try:
                opened = await purchase_run(
                    purchase,
                    records,
                    session,
                    check=lambda: check_inputs(session, purchase),
                )
            except CrewError as error:
                error.about(identity.run_key, crew.label)
                raise
        record = opened.record
        run = OpenRun(
            session.crew,
            str(record.kickoff_id),
            record,
            purchase.inputs,
            owned=opened.bought,
            meta=purchase.meta,
            webhooks=purchase.webhooks,
        )
    refused_again = record.ended_at is not None and record.ended_at <= purchase.asked_at
    if opened.decision is Decision.RETURN and record.state is not CrewState.COMPLETED and refused_again:
        run.advice = all_used(crew.label, crew.max_kickoffs)
    return run, opened


@dataclass(frozen=True)
class _Known:
    """What whoever makes many purchases has asked once for all of them."""

    inputs: Mapping[str, Sequence[CrewInput]]
    settings: CrewSettings


_known: ContextVar[_Known | None] = ContextVar("prefect_crew_known", default=None)


@contextmanager
def knowing_inputs(expected: Mapping[str, Sequence[CrewInput]]) -> Generator[None]:
    """Take the inputs that crews name, by their URLs, as told, and the settings as they are now, meanwhile.

    Whoever has just asked the crews need not ask again; and reading the settings takes 3 ms.
    """
    token = _known.set(_Known(expected, CrewSettings()))
    try:
        yield
    finally:
        _known.reset(token)


async def check_inputs(session: CrewSession, purchase: Purchase) -> None:
    """Check inputs against `GET /inputs`. A crew that does not say what it needs is no obstacle.

    Raises:
        InvalidInputsError: Some are missing, or the crew does not name them and extra ones are not allowed.
        AuthenticationError: The token is refused, also after a reload of a stored block.
    """
    expected = await _expected_inputs(session)
    missing = missing_inputs(expected, purchase.inputs)
    unknown = [] if purchase.crew.allow_extra_inputs else unknown_inputs(expected, purchase.inputs)
    if missing or unknown:
        raise InvalidInputsError(
            missing_inputs=missing,
            unknown_inputs=unknown,
            known_inputs=[item.name for item in expected],
            before_kickoff=True,
            method="GET",
            path="/inputs",
        )
    if (state_id := purchase.inputs.get(STATE_ID)) is not None and not is_uuid(state_id):
        # Not refused: a crew that is no Flow may well have an input of that name.
        run_logger().warning(
            "The input %s is no UUID. A Flow takes it for the id of its state and refuses the run; a crew takes it as "
            "any other input.",
            STATE_ID,
        )


async def _expected_inputs(session: CrewSession) -> Sequence[CrewInput]:
    known = _known.get()
    told = None if known is None else known.inputs.get(session.crew.url)
    if told is not None:
        return told
    try:
        return await session.asked(lambda client: client.inputs())
    except AuthenticationError:
        raise
    except CrewError as error:
        run_logger().warning("The crew's inputs could not be checked before the kickoff: %s", error)
        return []
