"""The commands `sessions`: list the sessions of Flows, and show the turns of one."""

from __future__ import annotations

import asyncio
import shlex
from typing import Annotated, Any

from cyclopts import App, Parameter

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.cli import _output
from prefect_crew.cli._options import Output
from prefect_crew.cli.runs import ago, look_at, todo
from prefect_crew.exceptions import ConfigurationError, UnreadableRecordError
from prefect_crew.records.keys import normalize_key
from prefect_crew.records.sessions import Turn, last_turn, latest_turns, record_of, sessions
from prefect_crew.records.store import PrefectRecords

app = App(name="sessions")
SHOWN = 20
"""The number of turns that `inspect` shows."""


async def _looked_at(turn: Turn) -> dict[str, Any]:
    """Return the facts about a turn, with the state of its run."""
    records = PrefectRecords()
    record = await record_of(turn, records)
    facts = {**turn.model_dump(mode="json", exclude={"version"}), "run_state": "no record", "todo": ""}
    if turn.is_row:  # its claim is in the ledger of a batch
        facts |= {"run_state": turn.outcome or "row of a batch", "completed_state": turn.completed_state(None)}
    if record is not None:
        line = await look_at(record, records)
        since, next_step = line.since.isoformat(), todo(record, line.condition)
        facts |= {"run_state": line.word, "since": since, "ago": ago(line.since), "todo": next_step}
        facts |= {"kickoff_id": record.kickoff_id, "completed_state": turn.completed_state(record)}
    return facts


async def _last(first: Turn) -> dict[str, Any] | None:
    """Return the facts about the last turn of a session; warn, and return None, if this version cannot read it."""
    try:
        return await _looked_at(await last_turn(first.crew_url, first.session) or first)
    except UnreadableRecordError as problem:
        run_logger().warning("Session %r is left out of this list: %s", first.session, problem)
        return None


@app.command
async def ls(*, output: Output = None) -> None:
    """List the sessions, each with its last turn."""
    firsts = sorted([turn async for turn in sessions()], key=lambda turn: (turn.session, turn.crew))
    # At the same time: reads by name that wait for one another share a request.
    turns = [turn for turn in await asyncio.gather(*map(_last, firsts)) if turn is not None]
    columns = ("session", "crew", "number", "run_state", "ago")
    rows = [[str(turn.get(column, "")) for column in columns] for turn in turns]
    titles = ("Session", "Crew", "Turns", "The last one", "Since")
    _output.put_rows(titles, rows, empty="No session is on record.", json=output and turns)


@app.command
async def inspect(
    session: Annotated[str, Parameter(name="SESSION", help="The name of the session.")], /, *, output: Output = None
) -> None:
    """Show the last turns of a session: their runs, their states, and the next step of a person."""
    session = normalize_key(session)
    firsts = [turn async for turn in sessions() if turn.session == session]
    if not firsts:
        raise ConfigurationError(f"There is no session {session!r}. To list them: prefect-crew sessions ls.")
    of_crews: list[dict[str, Any]] = []
    for first in firsts:
        last = await last_turn(first.crew_url, session) or first
        turns = await asyncio.gather(*map(_looked_at, await latest_turns(last, SHOWN)))
        of_crews.append({"session": session, "crew": first.crew, "crew_url": first.crew_url, "turns": turns})
    if output:
        _output.put_json(of_crews)
        return
    for facts in of_crews:
        _put(facts)


def _put(session: dict[str, Any]) -> None:
    last = session["turns"][-1]
    _output.put(
        f"{session['session']}: {last['number']} {'turn' if last['number'] == 1 else 'turns'} of crew {session['crew']}"
    )
    state = last.get("completed_state", last["restored"])
    _output.put(f"  The last completed state: {state or 'none yet'}")
    rows = [
        (str(turn["number"]), turn["run_state"], turn["idempotency_key"], turn["state_id"]) for turn in session["turns"]
    ]
    _output.put_rows(("Turn", "State", "Run", "State id"), rows, empty="")
    if last["todo"]:  # the turns before are over
        _output.put(f"Turn {last['number']}, run {shlex.quote(last['idempotency_key'])}: {last['todo']}")
