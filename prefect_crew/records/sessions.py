"""The turns of a session: the order of its runs, and the state from which the next run starts.

A session belongs to one crew. `crew_turn_SESSION_NUMBER` is a Variable that gives one claim the turn of this number:
of two callers that create it, one succeeds. It names the claim, and the state of the last turn before that completed:
the kickoff id of that turn. A turn is over once its claim has ended, or surely started nothing. Only then a
caller creates the next turn. So two turns of a session are never in flight.

Nobody changes a turn, but for the turn of a row: its claim is in the ledger of a batch, which other callers cannot
read. Its batch notes in the turn, as `outcome`, that the turn is over.

The last turn is found by exact names. A first request asks for 1 to 49, for each fiftieth turn, and so on; one request
more for each power of 50 that the number has reached. Pruning deletes only `passed_turns`, by which nobody looks for
the last turn any more, and keeps the record of the last turn.

Everything here raises one of PREFECT_ERRORS if the Prefect API cannot be reached or refuses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefect_crew._internal.prefect_api import BUSY_FOR
from prefect_crew.exceptions import SessionBlockedError, UnreadableRecordError
from prefect_crew.records.model import RECORD_VERSION, RecordPhase, RecordStore, RunRecord, digest
from prefect_crew.records.store import PrefectRecords
from prefect_crew.records.variables import PAGE, Variable, create_variable, patch_variable, read_exact
from prefect_crew.states import CrewState

BASE = 50
STEPS = tuple(BASE**level for level in range(4))
"""The first request asks for 49 multiples of each step: 196 names. A session has at most 50 ** 4 - 1 turns."""
TURN_TAG = "prefect-crew-turn"
_NAME = re.compile(r"crew_turn_([0-9a-f]{32})_(\d+)")


class Turn(BaseModel):
    """One turn: the value of its Variable.

    `claim` is the id of the claim, an attempt at `idempotency_key`. `restored` is the kickoff id of the run whose state
    its run takes up, None for an empty one. `outcome` is the state in which the run of a row ended, or its phase, and
    `kickoff_id` that run's id; both are None while the turn is not over.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    version: int = RECORD_VERSION
    session: str
    number: int
    crew: str
    crew_url: str
    idempotency_key: str
    claim: str
    kickoff_id: str | None = None
    restored: str | None = None
    is_row: bool = False
    outcome: str | None = None
    ref: str | None = Field(default=None, exclude=True)
    """The id of its Variable, which the Variable does not contain."""

    @property
    def variable(self) -> str:
        """The name of its Variable."""
        return _name(self.crew_url, self.session, self.number)

    def completed_state(self, record: RunRecord | None) -> str | None:
        """Return the kickoff id of the last completed turn, None if no turn has completed.

        This turn is over. `record` is its claim; without it, the turn's own `outcome` decides.
        """
        state, kickoff_id = self.outcome, self.kickoff_id
        if record is not None:
            state, kickoff_id = record.state, record.kickoff_id
        return kickoff_id if state == CrewState.COMPLETED else self.restored


def is_over(turn: Turn, record: RunRecord | None) -> bool:
    """Return whether the claim of a turn has ended or surely started nothing.

    `record` is the claim. None: it was given back, or pruned; of a row, it may be in another ledger.
    """
    if record is None:
        return turn.outcome is not None or not turn.is_row
    return record.phase in (RecordPhase.ENDED, RecordPhase.NOT_STARTED)


def _name(crew_url: str, session: str, number: int) -> str:
    return f"crew_turn_{digest(f'{crew_url} {session}')}_{number}"


def _step(number: int) -> int:
    """Return the largest step of which a number is a multiple."""
    return next(step for step in reversed(STEPS) if number % step == 0)


def _turn_in(variable: Variable) -> Turn:
    try:
        turn = Turn.model_validate(variable.value)
    except ValidationError:
        turn = None
    if turn is None or turn.version > RECORD_VERSION:
        raise UnreadableRecordError(
            f"The Variable {variable.name} should hold a turn of a session, and this version cannot read it. Nothing "
            "was started. Upgrade prefect-crew if a later version wrote it. Else begin another session; or, once no "
            "run of this session is in flight, delete the Variable: the session then goes on from an earlier turn."
        )
    return turn.model_copy(update={"ref": variable.id})


async def _read_turns(crew_url: str, session: str, numbers: Iterable[int]) -> list[Turn]:
    """Return the turns of these numbers that are on record, the first turn first."""
    variables = await read_exact([_name(crew_url, session, number) for number in numbers])
    return sorted(map(_turn_in, variables), key=lambda turn: turn.number)


async def last_turn(crew_url: str, session: str) -> Turn | None:
    """Return the last turn of a session, None if it has none. Raises UnreadableRecordError."""
    last, at, steps = None, 0, STEPS
    while steps:
        turns = await _read_turns(crew_url, session, [at + step * n for step in steps for n in range(1, BASE)])
        last = turns[-1] if turns else last
        at = at if last is None else last.number
        steps = () if not turns else tuple(step for step in steps if step < _step(at))
    return last


async def turn_again(turn: Turn) -> Turn | None:
    """Read a turn again. Return None if it is gone."""
    return next(iter(await _read_turns(turn.crew_url, turn.session, [turn.number])), None)


async def record_of(turn: Turn, records: RecordStore) -> RunRecord | None:
    """Return the claim of a turn. Return None if it is gone, or if `records` is not the ledger that has it."""
    store = records if turn.is_row else PrefectRecords()
    attempts = await store.attempts(turn.idempotency_key)
    return next((attempt for attempt in attempts if turn.claim == claim_id(attempt)), None)


def claim_id(record: RunRecord) -> str:
    """Return the id by which a turn names its claim. A ledger has no ids of its own, and an owner may claim again."""
    return record.ref or f"{record.owner}/{record.attempt}"


async def settle_last_turn(crew_url: str, session: str, records: RecordStore) -> tuple[Turn | None, RunRecord | None]:
    """Return the last turn of a session and its claim. If it is the turn of a row and over, note that in the turn."""
    last = await last_turn(crew_url, session)
    record = None if last is None else await record_of(last, records)
    if last is not None and last.is_row and record is not None:
        await _note_over(last, record)
    return last, record


async def note_over(records: Iterable[RunRecord]) -> None:
    """Note in the turns of rows that they are over. `records` are the rows' attempts. One request for 200 of them."""
    claims = {_name(record.crew_url, f"{record.session}", record.turn): record for record in records if record.turn}
    names = [*claims]
    for start in range(0, len(names), PAGE):
        for variable in await read_exact(names[start : start + PAGE]):
            turn, record = _turn_in(variable), claims[variable.name]
            if turn.claim == claim_id(record):
                await _note_over(turn, record)


async def note_given_up(records: Iterable[RunRecord], store: RecordStore) -> None:
    """Note in the turns of starts that were given up that they are over: `records` do not have the numbers of these
    turns, which are the last of their sessions. About three requests for each session."""
    given_up = [record for record in records if record.session and record.phase is RecordPhase.NOT_STARTED]
    for crew_url, session in sorted({(record.crew_url, f"{record.session}") for record in given_up}):
        await settle_last_turn(crew_url, session, store)


async def _note_over(turn: Turn, record: RunRecord) -> None:
    if turn.outcome is None and is_over(turn, record):
        outcome = {"outcome": str(record.state or record.phase), "kickoff_id": record.kickoff_id}
        value = {**turn.model_dump(mode="json"), **outcome}
        await patch_variable(str(turn.ref), {"value": value}, give_up_after=BUSY_FOR)


async def turn_in_the_way(crew_url: str, session: str, records: RecordStore) -> Turn | None:
    """Return the last turn of a session if it is not over, else None."""
    last, record = await settle_last_turn(crew_url, session, records)
    return None if last is None or is_over(last, record) else last


async def take_turn(record: RunRecord, records: RecordStore) -> Turn | None:
    """Create the next turn of a claim's session. Return it, or the turn of another claim that has to be over before.

    Return None if the Prefect API refused the name of the turn and does not show its Variable.

    Raises:
        SessionBlockedError: The session has no number left.
    """
    session = str(record.session)
    last, before = await settle_last_turn(record.crew_url, session, records)
    if last is not None and not is_over(last, before):
        return last
    number = 1 if last is None else last.number + 1
    if last is not None and number >= BASE ** len(STEPS):
        key, advice = last.idempotency_key, "Begin another session."
        raise SessionBlockedError(
            session=session, turn=last.number, run=key, reason="it has no number left", advice=advice
        )
    turn = Turn(
        session=session,
        number=number,
        crew=record.crew,
        crew_url=record.crew_url,
        idempotency_key=record.idempotency_key,
        claim=claim_id(record),
        is_row=record.ref is None,
        restored=None if last is None else last.completed_state(before),
    )
    name = _name(record.crew_url, session, number)
    if await create_variable({"name": name, "value": turn.model_dump(mode="json"), "tags": [TURN_TAG]}) is not None:
        return turn
    # It is another caller's, or our own: Prefect's client repeats a request whose answer was lost.
    return await turn_again(turn)


# Pruning


async def has_last_turn(records: Iterable[RunRecord]) -> bool:
    """Return whether one of some records has the last turn of its session: it says how the session goes on."""
    for record in records:
        if record.session is not None and record.turn is not None:
            last = await last_turn(record.crew_url, record.session)
            if last is not None and last.claim == claim_id(record):
                return True
    return False


async def passed_turns(variables: Sequence[Variable]) -> list[Variable]:
    """Return the Variables of turns that no search for the last turn needs any more.

    A search goes on from a later turn of the same step (`_step`). The first turn stays.
    """
    next_names = dict[str, str]()
    for variable in variables:
        if (name := _NAME.fullmatch(variable.name)) is not None and (number := int(name[2])) > 1:
            next_names[variable.id] = f"crew_turn_{name[1]}_{number + _step(number)}"
    names = sorted({*next_names.values()})
    stored_names = set[str]()
    for start in range(0, len(names), PAGE):
        stored_names |= {variable.name for variable in await read_exact(names[start : start + PAGE])}
    return [variable for variable in variables if next_names.get(variable.id) in stored_names]
