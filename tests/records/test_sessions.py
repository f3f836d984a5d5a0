"""The turns of a session on a real Prefect server: the last one is found by its name, and each number is taken once."""

import uuid
from datetime import timedelta
from typing import Any

import pytest

from prefect_crew.exceptions import SessionBlockedError, UnreadableRecordError
from prefect_crew.records import prune as prune_module
from prefect_crew.records import sessions
from prefect_crew.records.model import RecordPhase, RunRecord
from prefect_crew.records.prune import prune
from prefect_crew.records.sessions import Turn, has_last_turn, last_turn, passed_turns, take_turn
from prefect_crew.records.store import PrefectRecords
from prefect_crew.records.variables import Variable, create_variable, read_exact
from prefect_crew.states import CrewState
from support.records import CLAIMED, STARTED, UNCERTAIN, new_record, put

pytestmark = pytest.mark.usefixtures("prefect_api")
RECORDS, URL = PrefectRecords(), "https://travel.test"


def name_of(session: str, number: int) -> str:
    return sessions._name(URL, session, number)


async def write(session: str, *numbers: int) -> None:
    """Write turns whose claims are gone."""
    for number in numbers:
        turn = Turn(
            session=session,
            number=number,
            crew="travel",
            crew_url=URL,
            idempotency_key=f"{session}/{number}",
            claim=str(uuid.uuid4()),
            restored=f"state before {number}",
        )
        assert await create_variable({"name": name_of(session, number), "value": turn.model_dump(mode="json")})


async def claimed(session: str, **facts: Any) -> RunRecord:
    return await put(new_record(session=session, **facts))


async def take(record: RunRecord) -> Turn | None:
    """Take a turn as a start does. Return None, or the turn that has to be over before."""
    turn = await take_turn(record, RECORDS)
    assert turn is not None
    if turn.claim != record.ref:
        return turn
    record.turn, record.restored = turn.number, turn.restored
    return None


async def taken(session: str, **facts: Any) -> RunRecord:
    """Return a claim that has taken the next turn."""
    record = await claimed(session, **facts)
    assert await take(record) is None
    return record


@pytest.fixture
def session() -> str:
    return f"session {uuid.uuid4()}"


@pytest.mark.parametrize(
    ("numbers", "requests"),
    [
        ([], 1),
        ([1], 1),
        ([1, 49], 1),
        ([1, 49, 50], 2),
        ([1, 50, 51], 2),
        ([1, 50, 99], 2),
        ([1, 50, 100], 2),
        ([50, 2450, 2500], 2),
        ([2500, 2550, 2600, 2617], 3),
        ([125_000, 127_500, 127_550, 127_551], 4),
    ],
    ids=str,
)
async def test_the_last_turn_is_found_by_names(
    session: str, numbers: list[int], requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[int]()

    async def counted(names: list[str]) -> list[Variable]:
        asked.append(len(names))
        return await read_exact(names)

    await write(session, *numbers)
    monkeypatch.setattr(sessions, "read_exact", counted)
    last = await last_turn(URL, session)
    assert (last and last.number) == (numbers[-1] if numbers else None)
    assert len(asked) == requests
    assert max(asked) <= 200


async def test_a_turn_starts_from_the_last_completed_one(session: str) -> None:
    restored = list[str | None]()
    for state in (CrewState.COMPLETED, CrewState.FAILED, CrewState.STOPPED, CrewState.UNKNOWN, CrewState.COMPLETED):
        record = await taken(session)
        restored.append(record.restored)
        assert await RECORDS.permit(record, 10.0)
        assert (await RECORDS.attempts(record.idempotency_key))[0].turn == record.turn == len(restored)
        assert await RECORDS.end(record, state=state, kickoff_id=f"run {len(restored)}")
    assert restored == [None, *["run 1"] * 4]
    assert (await taken(session)).restored == "run 5"


@pytest.mark.parametrize("phase", [CLAIMED, UNCERTAIN, STARTED])
async def test_a_turn_that_is_not_over_is_in_the_way(session: str, phase: RecordPhase) -> None:
    kickoff_id = f"run {session}" if phase is STARTED else None
    first, second = await taken(session, phase=phase, kickoff_id=kickoff_id), await claimed(session)
    earlier = await take(second)
    assert earlier is not None
    assert earlier.number == 1
    assert earlier.idempotency_key == first.idempotency_key
    assert second.turn is None
    assert (await last_turn(URL, session)) == earlier


async def test_a_claim_that_was_given_back_is_over(session: str) -> None:
    first, second = await taken(session), await claimed(session)
    await RECORDS.withdraw(first)
    assert await take(second) is None
    assert second.turn == 2
    assert second.restored is None


async def nothing(*_: Any) -> None:
    return None


async def test_a_repeated_request_takes_the_same_turn(session: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = await taken(session)
    # The answer was lost: Prefect's client asks again, and gets a conflict with the Variable of its own.
    repeated = record.model_copy()
    monkeypatch.setattr(sessions, "last_turn", nothing)
    assert await take(repeated) is None
    assert repeated.turn == 1


async def test_sessions_of_two_crews_are_apart(session: str) -> None:
    for url in (URL, "https://other.test"):
        assert (await taken(session, crew_url=url)).turn == 1


async def test_a_session_has_an_end(session: str) -> None:
    most = sessions.BASE**4 - 1
    await write(session, *[most // step * step for step in reversed(sessions.STEPS)])
    with pytest.raises(SessionBlockedError, match="after turn 6249999: it has no number left") as caught:
        await take(await claimed(session))
    assert caught.value.run == f"{session}/{most}"


@pytest.mark.parametrize("value", ["a text", {"session": 3}, {"version": 99}], ids=["text", "other", "later"])
async def test_a_turn_that_cannot_be_read_starts_nothing(session: str, value: Any) -> None:
    assert await create_variable({"name": name_of(session, 1), "value": value})
    with pytest.raises(UnreadableRecordError, match=f"{name_of(session, 1)} should hold a turn of a session"):
        await take(await claimed(session))


async def test_pruning_keeps_the_way_to_the_last_turn(session: str) -> None:
    await write(session, 1, 2, 49, 50, 51, 99, 100, 101, 102)
    variables = await read_exact([name_of(session, number) for number in range(1, 103)])
    claims = {variable.fields["number"]: variable.fields["claim"] for variable in variables}
    passed = sorted(int(one.name.rpartition("_")[2]) for one in await passed_turns(variables))
    assert passed == [49, 50, 99, 101], "2, 51: the turn after them is gone, so they may lead somewhere"
    facts = {"session": session, "crew_url": URL}
    records = [new_record(turn=number, ref=claims[number], **facts) for number in (101, 102)]
    assert [await has_last_turn([record]) for record in records] == [False, True]
    assert not await has_last_turn([new_record(session=session), new_record()])


async def test_pruning_keeps_only_the_last_record(session: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = list[str]()
    for _ in range(5):
        record = await taken(session)
        assert await RECORDS.permit(record, 10.0)
        assert await RECORDS.end(record, state=CrewState.COMPLETED)
        keys.append(record.idempotency_key)
    monkeypatch.setattr(prune_module, "YOUNGEST", timedelta(0))
    for _ in range(2):
        await prune(RECORDS, older_than=timedelta(0), share=1.0)
    assert [bool(await RECORDS.attempts(key)) for key in keys] == [False, False, False, False, True]
    assert [turn.number for turn in await sessions._read_turns(URL, session, range(1, 6))] == [1, 5]


async def test_a_name_that_is_refused_and_not_shown_is_no_turn(session: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "create_variable", nothing)
    assert await take_turn(await claimed(session), RECORDS) is None
