"""What a scenario is made of: plain values, so that a failing one can be shrunk, printed and written into a test."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

__all__ = ["Call", "CrewRun", "End", "Prune", "Root", "Scenario"]

End = Literal["completes", "fails", "stuck", "asks"]


class _Short:
    """Shows only what is not as usual, so that a printed scenario is what one has to read, and can be pasted."""

    def __repr__(self) -> str:
        unusual: list[str] = []
        for one in fields(self):  # pyright: ignore[reportArgumentType]
            value: Any = getattr(self, one.name)
            if value != one.default:
                unusual.append(f"{one.name}={value!r}")
        return f"{type(self).__name__}({', '.join(unusual)})"


@dataclass(frozen=True, repr=False)
class CrewRun(_Short):
    """What the n-th accepted kickoff does: after `seconds` it ends; "asks" waits for a person for `seconds` more."""

    end: End = "completes"
    seconds: float = 0.0


@dataclass(frozen=True, repr=False)
class Call(_Short):
    """One process that runs a crew, and what befalls it.

    Attributes:
        at: When it starts, in seconds.
        key: Which idempotency key; calls with the same one are about the same run.
        other_inputs: Give other inputs than the key's first call should have.
        at_once: Calls made side by side in this process.
        rows: How many rows it has: then it is a call of a batch, whose number is `key`, and its rows are turns.
        leaves: How many rows, from the first, are not in the data set any more at the calls after the first.
        max_in_flight: As `run_batch`'s.
        force_new: As `run_crew`'s.
        incomplete: Leave out an input, so that the start is refused before it asks for a permit; repaired for the
            attempts after that.
        misconfigured: Give a `meta` that is not JSON, so that nothing can be sent; repaired for the attempts after
            that.
        flow: Whether it is a flow run on the Prefect server.
        root: The number of the root flow run that its flow run is a subflow of; None: it is a root itself.
        kill_at, freeze_at, cancel_at: The step of the process before which that happens.
        freeze_for: Seconds.
        asked: Whether the cancellation was asked for (the flow run is Cancelling) or is a worker's shutdown.
        timed_out: Whether it is a timeout of Prefect, which cancels at every await until the flow is left.
        crashed_after: Seconds from its death until the Prefect server knows of it; None: it never does.
        crashed_at: Seconds after its start at which the Prefect server says so although it may be alive; the next
            attempt counts from then on.
        skew, skew_at: By how many seconds its wall clock is wrong, and from which of its steps on; None: always.
        again: Seconds after the end of each attempt after which the next one begins, if there was no result.
        same_flow_run: Whether those are retries of the flow run, or new ones.
    """

    at: float = 0.0
    key: int = 0
    other_inputs: bool = False
    at_once: int = 1
    rows: int = 0
    leaves: int = 0
    max_in_flight: int = 100
    force_new: bool = False
    incomplete: bool = False
    misconfigured: bool = False
    flow: bool = True
    root: int | None = None
    kill_at: int | None = None
    freeze_at: int | None = None
    freeze_for: float = 0.0
    cancel_at: int | None = None
    asked: bool = False
    timed_out: bool = False
    crashed_after: float | None = None
    crashed_at: float | None = None
    skew: float = 0.0
    skew_at: int | None = None
    again: tuple[float, ...] = ()
    same_flow_run: bool = True


@dataclass(frozen=True, repr=False)
class Prune(_Short):
    """A clean-up that begins `at` seconds; the rest is as in `Call`. `older_than` are seconds."""

    at: float = 0.0
    older_than: float = 0.0
    kill_at: int | None = None
    freeze_at: int | None = None
    freeze_for: float = 0.0
    skew: float = 0.0


@dataclass(frozen=True, repr=False)
class Root(_Short):
    """A flow run that other flow runs are subflows of.

    Attributes:
        runs: Start and end, in seconds, of each time that it runs: after the first one it is retried, having completed.
        deleted_at: When it is deleted.
    """

    runs: tuple[tuple[float, float], ...] = ((0.0, 0.0),)
    deleted_at: float | None = None


@dataclass(frozen=True, repr=False)
class Scenario(_Short):
    """A world.

    Attributes:
        calls: The processes.
        runs: What the accepted kickoffs do, in order; later ones complete at once.
        faults: Of the crew's server, in its own text form.
        prefect_faults: Number of the request, or `write@3` for the third change of a Variable, `delete@1` for the
            first deletion, `read@2` for the second reading, and kind.
        session: Whether all calls, of all keys, are turns of one session.
        same_id_for: Seconds for which a proxy answers each further kickoff as the first one, and starts nothing.
        outages: Start and length, in seconds, of the Prefect API being away.
        down_for: Seconds until a crew server that has crashed is back.
        rotate_at: When the crew's token changes; the stored block has the new one `rotate_late` seconds later.
        stop_on_timeout: As in WaitPolicy.
        prunes: The clean-ups.
        roots: The flow runs that are named by `Call.root`.
        resolve_every: Seconds between the looks of a person who resolves each key as soon as that is allowed, by what
            the crew's page shows at that moment; None: there is nobody like that.
        order: As SimLoop's.
        budget: How many kickoffs a budget of the crew allows; None: it has none.
        resolve_after: Seconds after which a person resolves what is uncertain; None: only when all is over.
    """

    calls: tuple[Call, ...]
    runs: tuple[CrewRun, ...] = ()
    faults: tuple[str, ...] = ()
    prefect_faults: tuple[tuple[int | str, str], ...] = ()
    outages: tuple[tuple[float, float], ...] = ()
    down_for: float = 5.0
    rotate_at: float | None = None
    rotate_late: float = 0.0
    max_attempts: int = 3
    timeout: float = 120.0
    stop_on_timeout: bool = False
    resolve_after: float | None = None
    resolve_every: float | None = None
    prunes: tuple[Prune, ...] = ()
    roots: tuple[Root, ...] = ()
    seed: int = 0
    order: int = 0
    budget: int | None = None
    same_id_for: float = 0.0
    session: bool = False
