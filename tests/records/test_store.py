"""Records in Variables of a real Prefect server."""

import asyncio
import uuid
from typing import Any
from unittest import mock

import httpx
import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.flows import Flow
from prefect.states import Cancelled, Cancelling, Completed, Running

from prefect_crew._internal.prefect_api import Urgency, request_soon
from prefect_crew.client.models import Review, TaskResult
from prefect_crew.exceptions import CrewError, TooManyAttemptsError
from prefect_crew.records import results, store, variables
from prefect_crew.records.model import RECORD_VERSION, Lease, RecordPhase, RunRecord, StoredResult, utcnow
from prefect_crew.records.store import PrefectRecords, record_name
from prefect_crew.records.variables import create_variable, delete_variable
from prefect_crew.states import CrewState
from support.proxy import Proxy
from support.records import CLAIMED, ENDED, NOT_STARTED, STARTED, new_record, put
from support.waiting import until

pytestmark = pytest.mark.usefixtures("prefect_api")

RECORDS = PrefectRecords()


async def flow_run(state: Any = None) -> str:
    """Make a flow run on the server, in some state."""
    async with get_client() as client:
        made = await client.create_flow_run(Flow(fn=flow_run, name="somebody"), state=state or Running())
    return str(made.id)


async def is_among(record: RunRecord, phase: RecordPhase | None = None) -> bool:
    """Return whether a record is among all of a phase."""
    return record.ref in [found.ref async for found in RECORDS.all(*([] if phase is None else [phase]))]


# Claims


async def test_each_write_has_its_urgency(monkeypatch: pytest.MonkeyPatch):
    """An id goes before the claims of others, who lose time then, and a name and an end after them."""
    urgencies: list[Urgency] = []

    async def noted(*args: Any, urgency: Urgency, **options: Any) -> httpx.Response:
        urgencies.append(urgency)
        return await request_soon(*args, urgency=urgency, **options)

    monkeypatch.setattr(variables, "request_soon", noted)
    record = await started(f"r {uuid.uuid4()}")
    assert await RECORDS.end(record, state=CrewState.COMPLETED)
    claim, permit_and_id, name_and_end = Urgency.BEGIN, Urgency.CONTINUE, Urgency.FINISH
    assert urgencies == [claim, *[permit_and_id] * 2, *[name_and_end] * 2]


async def test_a_key_has_64_attempts_at_most():
    key = f"again {uuid.uuid4()}"
    for start in range(1, 65, 8):
        claims = [RECORDS.claim(new_record(key, attempt=attempt)) for attempt in range(start, start + 8)]
        assert all(await asyncio.gather(*claims))
    assert {record.attempt for record in await RECORDS.attempts(key)} == {*range(1, 65)}
    with pytest.raises(TooManyAttemptsError, match=r"64 attempts on record.* Nothing was started.* runs prune"):
        await RECORDS.claim(new_record(key, attempt=65))


async def test_all_permits_of_a_claim_are_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "PAGE", 3)
    monkeypatch.setattr(variables, "PAGE", 3)
    monkeypatch.setattr(store, "LEAST", 1)
    monkeypatch.setattr(store, "MOST", 2)
    record, other = new_record(), new_record()
    for one in (record, other):
        assert await RECORDS.claim(one)
    for number in range(1, 13):
        assert await RECORDS.permit(record, 30)
        (read,) = await RECORDS.attempts(record.idempotency_key)
        assert read.entries == number
    permits = {one.ref: one.entries async for one in RECORDS.all(CLAIMED)}
    assert permits[record.ref] == 12
    assert permits[other.ref] == 0


async def test_a_late_withdrawal_spares_the_next_claim():
    first = await put(new_record())
    first.phase = NOT_STARTED
    await RECORDS.withdraw(first)
    second = new_record(first.idempotency_key, owner=first.owner)
    assert await RECORDS.claim(second)
    await RECORDS.withdraw(first)
    (record,) = await RECORDS.attempts(first.idempotency_key)
    assert record.ref == second.ref
    assert record.phase == CLAIMED


async def test_a_withdrawal_outlasts_a_busy_server(proxy: Proxy):
    record = await put(new_record())
    record.phase = NOT_STARTED
    proxy.answer, proxy.refuse = "503", "DELETE /api/variables/"
    withdrawal = asyncio.create_task(RECORDS.withdraw(record))
    await until(lambda: proxy.count("DELETE"))
    proxy.refuse = None
    await withdrawal
    assert await RECORDS.attempts(record.idempotency_key) == []


async def test_a_refused_withdrawal_leaves_an_unstarted_claim(proxy: Proxy):
    record = await put(new_record())
    record.phase = NOT_STARTED
    proxy.refuse = "DELETE /api/variables/"
    await RECORDS.withdraw(record)
    (claim,) = await RECORDS.attempts(record.idempotency_key)
    assert claim.phase is NOT_STARTED


async def test_an_earlier_claim_of_a_caller_is_not_its_own():
    # The request that deletes the earlier one may arrive at any time.
    first = await put(new_record())
    assert not await RECORDS.claim(new_record(first.idempotency_key, owner=first.owner))


async def test_a_claim_is_confirmed_by_ids():
    first = await put(new_record())
    second = new_record(first.idempotency_key, attempt=2)
    known = await RECORDS.attempts(first.idempotency_key)
    assert await RECORDS.claim(second)
    assert await RECORDS.confirm(second, known)
    await RECORDS.withdraw(first)
    assert not await RECORDS.confirm(second, known)
    anew = new_record(first.idempotency_key, owner=first.owner)
    assert await RECORDS.claim(anew)
    assert not await RECORDS.confirm(second, known), "the number was taken again, by the same caller"


async def test_a_foreign_variable_in_its_place_is_named():
    record = new_record()
    name = record_name(record.idempotency_key, 1)
    await create_variable({"name": name, "value": {"somebody": "else"}, "tags": ["prefect-crew"]})
    with pytest.raises(CrewError, match=f"Variable {name} should hold the record .* Nothing was started. Upgrade"):
        await RECORDS.claim(record)


async def test_a_record_is_listed_by_its_phase():
    record = await put(new_record(phase=STARTED, kickoff_id=f"r {uuid.uuid4()}"))
    theirs = {"name": f"ours_{uuid.uuid4().hex}", "value": "of somebody who likes our tag", "tags": ["prefect-crew"]}
    await create_variable(theirs)
    assert await is_among(record)
    assert await is_among(record, STARTED)
    assert not await is_among(record, CLAIMED)
    assert await RECORDS.end(record, state=CrewState.COMPLETED)
    assert await is_among(record, ENDED)
    assert not await is_among(record, STARTED)


# Finding


async def started(kickoff_id: str) -> RunRecord:
    return await put(new_record(phase=STARTED, kickoff_id=kickoff_id))


async def test_the_id_of_a_deleted_record_is_free():
    kickoff_id = f"r {uuid.uuid4()}"
    await RECORDS.delete(await started(kickoff_id))
    assert await RECORDS.of_kickoff(kickoff_id) is None
    record = await started(kickoff_id)
    await delete_variable(str(record.ref))
    assert await RECORDS.of_kickoff(kickoff_id) is None
    await started(kickoff_id)
    assert await RECORDS.of_kickoff(kickoff_id) is not None


async def test_a_start_reads_nothing_but_exact_names(monkeypatch: pytest.MonkeyPatch):
    filters: list[dict[str, Any]] = []
    request = PrefectClient.request

    async def noted(self: PrefectClient, method: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        if path == "/variables/filter":
            filters.append(kwargs["json"]["variables"])
        return await request(self, method, path, *args, **kwargs)

    monkeypatch.setattr(PrefectClient, "request", noted)
    kickoff_id = f"r {uuid.uuid4()}"
    record = await started(kickoff_id)
    assert await RECORDS.confirm(record, [])
    assert await RECORDS.of_kickoff(kickoff_id) is not None
    assert await RECORDS.reviews(record) == []
    assert await RECORDS.permit(record, 30, before=Lease(-1.0)) is False
    await RECORDS.delete(record)
    assert filters
    assert all([*one] == ["name"] and [*one["name"]] == ["any_"] for one in filters), filters


async def test_a_late_permit_after_a_resolution_is_refused():
    record = await put(new_record())
    (theirs,) = await RECORDS.attempts(record.idempotency_key)
    theirs.entries = 1  # one that was deleted since
    assert await RECORDS.resolve(theirs, NOT_STARTED)
    assert not await RECORDS.permit(record, 30, before=Lease(-1.0))


# What fits


def result(output: str, **fields: Any) -> StoredResult:
    return StoredResult(output=output, tasks=[TaskResult(name="t", output="…")], **fields)


async def closed(stored: StoredResult | None, **fields: Any) -> RunRecord:
    """Claim, close, and return what stands on the server."""
    record = await put(new_record())
    assert await RECORDS.end(record, state=CrewState.COMPLETED, result=stored, **fields)
    (saved,) = await RECORDS.attempts(record.idempotency_key)
    return saved


@pytest.mark.parametrize(
    ("output", "data", "is_kept"),
    [
        pytest.param("語" * 2000, None, True, id="long in bytes"),
        pytest.param("", 2**70, True, id="beyond 64 bits"),
        pytest.param("x" * 4_000_000, None, True, id="4 MB"),
        pytest.param("x" * 6_000_000, None, False, id="6 MB"),
    ],
)
async def test_a_large_result_is_an_artifact(output: str, data: Any, is_kept: bool):
    saved = await closed(result(output, data=data))
    assert saved.result is None
    assert saved.phase == ENDED
    assert saved.state == CrewState.COMPLETED
    assert await results.stored_result(saved) == (result(output, data=data) if is_kept else None)
    await RECORDS.delete(saved)
    assert await results.stored_result(saved) is None


@pytest.mark.parametrize("answer", ["403", ""], ids=["refuses it", "is away"])
async def test_an_end_is_kept_without_its_large_result(proxy: Proxy, caplog: pytest.LogCaptureFixture, answer: str):
    proxy.refuse, proxy.answer = "POST /api/artifacts/", answer
    saved = await closed(result("x" * 6000))
    assert saved.phase == ENDED
    assert saved.state == CrewState.COMPLETED
    assert saved.result_id is None
    assert "Later calls read it from the crew's server" in caplog.text


async def test_a_refused_end_is_an_error(proxy: Proxy):
    record = await put(new_record())
    proxy.refuse, proxy.answer = "POST /api/variables/", "400"
    with pytest.raises(PrefectHTTPStatusError, match="400"):
        await RECORDS.end(record, state=CrewState.FAILED, error="no key")
    assert record.phase is CLAIMED


async def test_a_second_end_leaves_no_result():
    record = await put(new_record())
    again = record.model_copy()
    assert await RECORDS.end(record, state=CrewState.COMPLETED, result=result("x" * 6000))
    made, forgotten = list[str | None](), results.forget_result

    async def forget(result_id: str | None) -> None:
        made.append(result_id)
        await forgotten(result_id)

    with mock.patch.object(store, "forget_result", forget):
        assert not await RECORDS.end(again, state=CrewState.COMPLETED, result=result("y" * 6000))
    assert again.result_id == record.result_id
    assert made not in ([None], [record.result_id])
    assert await results.stored_result(record.model_copy(update={"result": None, "result_id": made[0]})) is None


async def test_long_texts_are_cut():
    key = "\N{PARTY POPPER}" * 464 + str(uuid.uuid4())
    record = new_record(key, step="s" * 2000, crew="c" * 300, reason="\N{PARTY POPPER}" * 500)
    assert await RECORDS.claim(record)
    record.error = "\N{PARTY POPPER}" * 500
    await RECORDS.save(record)
    (saved,) = await RECORDS.attempts(key)
    assert saved.idempotency_key == key
    assert saved.owner == record.owner
    assert saved.step
    assert record.step
    assert record.step.startswith(saved.step)


# Owners


async def test_an_owner_ends_with_its_flow_run():
    assert not await RECORDS.owner_ended(new_record())
    assert not await RECORDS.owner_ended(new_record(flow_run_id=await flow_run()))
    for state in (Completed(), Cancelling(), Cancelled()):
        assert await RECORDS.owner_ended(new_record(flow_run_id=await flow_run(state)))
    assert await RECORDS.owner_ended(new_record(flow_run_id=str(uuid.uuid4())))


# A Prefect API that is away


async def test_a_save_outlasts_an_api_that_is_away(proxy: Proxy):
    record = await put(new_record())
    proxy.cut()
    record.phase, record.kickoff_id = STARTED, f"r {uuid.uuid4()}"
    saving = asyncio.ensure_future(RECORDS.save_started(record))
    done, _ = await asyncio.wait({saving}, timeout=1.0)
    assert not done
    proxy.restore()
    await asyncio.wait_for(saving, 30)
    assert await RECORDS.of_kickoff(record.kickoff_id) is not None


async def test_a_refusal_is_no_conflict(proxy: Proxy):
    proxy.refuse = "POST /api/variables/"
    with pytest.raises(httpx.HTTPStatusError):
        await RECORDS.claim(new_record())
    with pytest.raises(httpx.HTTPStatusError):
        await RECORDS.add_review(new_record(), 1, review())


def review(**fields: Any) -> Review:
    return Review(task_id="draft", round=1, approve=True, by="me", at=utcnow(), **fields)


async def test_an_answer_whose_reply_was_lost_is_ones_own(monkeypatch: pytest.MonkeyPatch):
    record, replies = await put(new_record()), 0

    async def losing(*args: Any, **options: Any) -> Any:
        nonlocal replies
        await request_soon(*args, **options)
        replies += 1
        raise httpx.ReadError("the reply was lost")

    monkeypatch.setattr(variables, "request_soon", losing)  # so Prefect's client repeats it, and is answered 409
    assert await RECORDS.add_review(record, 1, review()), "nobody else answers"
    assert not await RECORDS.add_review(record, 1, review()), "somebody else's words may be the same"
    assert replies == 1
    assert len(await RECORDS.reviews(record)) == 1


async def test_a_repeated_removal_spares_the_next_answer(monkeypatch: pytest.MonkeyPatch):
    record, send, lost = await put(new_record(kickoff_id="removed")), httpx.AsyncClient.send, list[str]()
    adas, bobs = review(nonce="Ada"), review(nonce="Bob")
    assert await RECORDS.add_review(record, 1, adas)

    async def lose_reply(self: Any, request: httpx.Request, **options: Any) -> httpx.Response:
        response = await send(self, request, **options)
        if request.method == "DELETE" and not lost:
            lost.append(str(response.status_code))
            assert await RECORDS.add_review(record, 1, bobs)
            raise httpx.ReadTimeout("the reply was lost", request=request)
        return response

    monkeypatch.setattr(httpx.AsyncClient, "send", lose_reply)  # Prefect's client sends the request again
    await RECORDS.remove_review(record, 1, adas)
    assert lost == ["204"]
    assert [answer.nonce for answer in await RECORDS.reviews(record)] == ["Bob"]
    await RECORDS.remove_review(record, 1, adas)
    assert len(await RECORDS.reviews(record)) == 1
    await RECORDS.delete(record)
    assert await RECORDS.reviews(record) == []


# Versions


@pytest.mark.parametrize("written", ["record", "record in an unknown phase", "entry"])
async def test_what_a_later_version_wrote_is_not_read(written: str, caplog: pytest.LogCaptureFixture):
    mine, theirs = await put(new_record()), new_record()
    name, tag = record_name(theirs.idempotency_key, 1), store.TAG
    if written == "entry":
        await put(theirs)
        name, tag = f"{name}_{str(theirs.ref).replace('-', '')}_1", store.ENTRY_TAG
    phase = "started" if written == "record" else "a word of the future"
    value = theirs.model_dump(mode="json", exclude_none=True) | {"version": RECORD_VERSION + 1, "phase": phase}
    await create_variable({"name": name, "value": value, "tags": [tag]})
    with pytest.raises(CrewError, match=r"later version of prefect-crew \(record version 3.*Upgrade prefect-crew"):
        await RECORDS.attempts(theirs.idempotency_key)
    with pytest.raises(CrewError, match="Nothing was started"):
        await RECORDS.claim(theirs)
    listed = [record.idempotency_key async for record in RECORDS.all()]
    assert mine.idempotency_key in listed
    assert theirs.idempotency_key not in listed
    assert f"At least one run is left out of this list. The record of run {theirs.idempotency_key!r}" in caplog.text
    await delete_variable(f"name/{name}")
