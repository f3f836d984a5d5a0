"""What a scenario is made of: plain values, so that a failing one can be shrunk, printed and written into a test."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, Literal

from hypothesis import strategies as st

from proof.sim.prefect_api import PREFECT_FAULTS

__all__ = ["Call", "CrewRun", "Prune", "Scenario", "scenarios"]

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
        key: Which run key; calls with the same one are about the same purchase.
        other_inputs: Give other inputs than the key's first call should have.
        at_once: Calls made side by side in this process.
        force_new: As `run_crew`'s.
        flow: Whether it is a flow run on the Prefect server.
        kill_at, freeze_at, cancel_at: The step of the process before which that happens.
        freeze_for: Seconds.
        asked: Whether the cancellation was asked for (the flow run is Cancelling) or is a worker's shutdown.
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
    force_new: bool = False
    flow: bool = True
    kill_at: int | None = None
    freeze_at: int | None = None
    freeze_for: float = 0.0
    cancel_at: int | None = None
    asked: bool = False
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
    freeze_at: int | None = None
    freeze_for: float = 0.0
    skew: float = 0.0


@dataclass(frozen=True, repr=False)
class Scenario(_Short):
    """A world.

    Attributes:
        calls: The processes.
        runs: What the accepted kickoffs do, in order; later ones complete at once.
        faults: Of the crew's server, in its own text form.
        prefect_faults: Number of the request, or `write@3` for the third change of a Variable, and kind.
        outages: Start and length, in seconds, of the Prefect API being away.
        down_for: Seconds until a crew server that has crashed is back.
        rotate_at: When the crew's token changes; the stored block has the new one `rotate_late` seconds later.
        stop_on_timeout: As in WaitPolicy.
        prunes: The clean-ups.
        resolve_every: Seconds between the looks of a person who resolves each key as soon as that is allowed, by what
            the crew's page shows at that moment; None: there is nobody like that.
        order: As SimLoop's.
        settle_after: Seconds after which a person settles what is uncertain; None: only when all is over.
    """

    calls: tuple[Call, ...]
    runs: tuple[CrewRun, ...] = ()
    faults: tuple[str, ...] = ()
    prefect_faults: tuple[tuple[int | str, str], ...] = ()
    outages: tuple[tuple[float, float], ...] = ()
    down_for: float = 5.0
    rotate_at: float | None = None
    rotate_late: float = 0.0
    max_kickoffs: int = 3
    timeout: float = 120.0
    stop_on_timeout: bool = False
    settle_after: float | None = None
    resolve_every: float | None = None
    prunes: tuple[Prune, ...] = ()
    seed: int = 0
    order: int = 0


_CODES = ("400", "401", "403", "404", "405", "408", "422", "429", "429-bare", "500", "502", "503", "503-bare", "504")
_BROKEN = ("drop", "reset", "timeout", "redirect", "html", "garbage", "empty", "cut", "crash")
_WHEN = ("@1", "@2", "@1-2", "@3", "@2-4")

_seconds = st.sampled_from((0.0, 0.2, 1.0, 3.0, 15.0, 50.0))
_phase = st.sampled_from(("-before-accept", "-after-accept"))
_when = st.sampled_from(_WHEN)
_kickoff_fault = st.one_of(
    st.builds(
        lambda name, phase, when: f"kickoff:{name}{phase}{when}", st.sampled_from(_CODES + _BROKEN), _phase, _when
    ),
    st.builds(lambda seconds, when: f"kickoff:latency={seconds}{when}", st.sampled_from((0.5, 4, 20)), _when),
    st.sampled_from(("kickoff:no-id@1", "kickoff:stuck@1", "status:early-404=3", "status:early-404-seconds=20")),
)
_other_fault = st.builds(
    lambda where, name, when: f"{where}:{name}{when}",
    st.sampled_from(("status", "status", "inputs", "stop")),
    st.sampled_from((*_CODES, *_BROKEN, "latency=2")),
    _when,
)
_forgotten = st.just("status:forgotten@4")
_fault = st.one_of(_kickoff_fault, _kickoff_fault, _other_fault, _forgotten)
# One latency at most: who settles a kickoff while it is still on its way has looked too early.
_faults = st.lists(_fault, max_size=3, unique_by=lambda fault: re.split("[@=]", fault)[0]).map(tuple)

_maybe_step = st.one_of(st.none(), st.integers(1, 30), st.integers(1, 200))  # an undisturbed run has about 30 steps
_call = st.builds(
    Call,
    at=_seconds,
    key=st.sampled_from((0, 0, 0, 1)),
    other_inputs=st.sampled_from((False,) * 9 + (True,)),
    at_once=st.sampled_from((1, 1, 1, 2)),
    force_new=st.sampled_from((False,) * 7 + (True,)),
    flow=st.booleans(),
    kill_at=_maybe_step,
    freeze_at=st.one_of(st.none(), st.none(), _maybe_step),
    freeze_for=st.sampled_from((1.0, 30.0, 400.0)),
    cancel_at=st.one_of(st.none(), _maybe_step),
    asked=st.booleans(),
    crashed_after=st.sampled_from((None, 0.5, 70.0)),
    again=st.lists(_seconds, max_size=3).map(tuple),
    same_flow_run=st.booleans(),
)
_run = st.builds(
    CrewRun,
    end=st.sampled_from(("completes", "completes", "completes", "fails", "fails", "stuck", "asks")),
    seconds=_seconds,
)

_anything = st.builds(
    Scenario,
    calls=st.lists(_call, min_size=1, max_size=4).map(tuple),
    runs=st.lists(_run, max_size=3).map(tuple),
    faults=_faults,
    prefect_faults=st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from(PREFECT_FAULTS)), max_size=2, unique_by=lambda fault: fault[0]
    ).map(tuple),
    outages=st.lists(st.tuples(_seconds, st.sampled_from((1.0, 60.0, 900.0))), max_size=1).map(tuple),
    down_for=st.sampled_from((0.5, 5.0, 60.0)),
    rotate_at=st.sampled_from((None, None, None, 0.3, 5.0)),
    rotate_late=st.sampled_from((0.0, 3.0)),
    max_kickoffs=st.sampled_from((1, 3)),
    stop_on_timeout=st.booleans(),
    settle_after=st.sampled_from((None, 0.0, 100.0)),
    seed=st.integers(0, 3),
)
_sleepers = st.builds(
    Scenario,
    # One falls asleep somewhere around its kickoff, another asks for the same run meanwhile, and a person settles it.
    calls=st.tuples(
        st.builds(Call, freeze_at=st.integers(1, 30), freeze_for=st.sampled_from((30.0, 400.0)), flow=st.booleans()),
        st.builds(Call, at=_seconds, again=st.just((15.0, 50.0, 50.0)), flow=st.booleans()),
    ),
    runs=st.lists(_run, max_size=1).map(tuple),
    faults=_faults,
    settle_after=st.sampled_from((0.0, 20.0)),
    seed=st.integers(0, 3),
)
_retries = st.builds(
    Scenario,
    # One flow run that is killed again and again.
    calls=st.tuples(
        st.builds(
            Call,
            kill_at=st.integers(1, 30),
            crashed_after=st.sampled_from((0.5, None)),
            again=st.lists(_seconds, min_size=1, max_size=4).map(tuple),
            force_new=st.booleans(),
        )
    ),
    runs=st.lists(_run, max_size=3).map(tuple),
    faults=_faults,
    settle_after=st.sampled_from((None, 0.0)),
    seed=st.integers(0, 3),
)

scenarios = st.one_of(_anything, _anything, _sleepers, _retries)
"""Worlds at random. Hypothesis shrinks one that breaks a promise to its bones."""
