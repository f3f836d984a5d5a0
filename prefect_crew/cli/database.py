"""The command `database`: where runs are recorded, and which store the Prefect server knows."""

from __future__ import annotations

from cyclopts import App

from prefect_crew.cli import _output
from prefect_crew.cli._options import Yes
from prefect_crew.runs.database import find_store, read_registration, use_this_store
from prefect_crew.store import prune
from prefect_crew.store.database import Registration

app = App(name="database")


def place(registration: Registration) -> str:
    """Return where a store is, and of a file on which machine."""
    return f"{registration.where}{'' if registration.host is None else f' of host {registration.host}'}"


@app.default
async def show() -> None:
    """Show where runs are recorded, how large that is, and which store the Prefect server knows."""
    store = find_store()
    own, other = await store.registration(), await read_registration()
    counts, size = await store.run(prune.counts), await store.run(prune.size)
    known = "none yet" if other is None else "this one" if own.is_same(other) else f"another one, {place(other)}"
    _output.put(f"Runs are recorded in {place(own)}.")
    _output.put_facts(
        {"id": own.id, "the Prefect server knows": known, "size": f"{size / 1_000_000:,.1f} MB", **counts}
    )
    if other is not None and not own.is_same(other):
        _output.note(
            "Set PREFECT_INTEGRATIONS_CREW_DATABASE_URL to a database that all machines share. If the other one is "
            "gone, run: prefect-crew database use",
            "yellow",
        )


@app.command
async def use(*, yes: Yes = False) -> None:
    """Let the Prefect server know this store in place of any other."""
    own, other = await find_store().registration(), await read_registration()
    if other is not None and not own.is_same(other):
        _output.confirm(
            f"The crews of this Prefect server are recorded in {place(other)}. From now on {place(own)} counts: keys "
            "that only the other one knows start new runs. Go on?",
            yes=yes,
        )
    await use_this_store()
    _output.put(f"The crews of this Prefect server are recorded in {place(own)}.")
