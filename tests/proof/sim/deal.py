"""Worlds that are dealt, not drawn: each value of each dimension comes as often as its weight says, in an order that a
seed shuffles, and every fault of a kickoff meets every fate of a process.

Drawing leaves gaps: two hundred worlds that Hypothesis drew met 5 of the 46 pairs of a fault and its phase, and two
thousand met 36.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from proof.sim.prefect_api import PREFECT_FAULTS
from proof.sim.scenario import Call, CrewRun, Prune, Root, Scenario

__all__ = ["FATES", "KICKOFF_FAULTS", "PERMITS", "ROUND", "dealt"]

PERMITS = True
"""Whether a start takes a permit. Then clocks may differ, records be pruned at any time, people resolve as soon as they
may, writes land late, and the Prefect server take the living for dead."""

_CODES = ("400", "401", "403", "404", "405", "408", "422", "429", "429-bare", "500", "502", "503", "503-bare", "504")
_BROKEN = ("drop", "timeout", "redirect", "html", "garbage", "empty", "crash")
KICKOFF_FAULTS = tuple(f"{name}-{phase}-accept" for name in _CODES + _BROKEN for phase in ("before", "after"))
"""What can go wrong with a kickoff, before a run is started and after."""
_OTHERS = (
    "latency=0.5",
    "latency=4",
    "latency=20",
    "no-id-after-accept",
    "stuck",
    "early-404=3",
    "early-404-seconds=20",
    "",
    "",
    "",
)
"""What else can be the matter with it; nothing at all among that."""
FATES = ("none", "killed", "asleep", "cancelled")
ROUND = len(KICKOFF_FAULTS) + 4
"""Worlds in which every fault of a kickoff comes once; as many rounds as there are fates make all pairs."""
LONG = Root(((0.0, 400.0),))
DELETED = Root(((0.0, 5.0),), deleted_at=8.0)
_SECONDS = (0.0, 0.2, 1.0, 3.0, 15.0, 50.0)
_ENDS = (
    *((), (), (), (CrewRun(seconds=3),), (CrewRun(seconds=15),), (CrewRun(seconds=50),)),
    *((CrewRun("fails"),), (CrewRun("fails", 3), CrewRun(seconds=15)), (CrewRun("fails"), CrewRun("fails", 15))),
    *((CrewRun("stuck"),), (CrewRun("asks"),), (CrewRun("asks", 15), CrewRun("fails", 1))),
)
_STEPS = {
    "nothing": (1, 2, 3, 3, 4),
    "claimed": (5, 5, 6, 7, 8, 9, 10, 11, 11, 12, 12, 13, 13, 15, 16, 17),
    "posting": (14,),
    "started": range(18, 28),
    "any": (*range(1, 45), 50, 80, 150),
}
"""The steps of an undisturbed call by how far its run has got, as `campaign.FATES` names it. A step that stands twice
is drawn twice as often."""
_AGAIN = ((0.2,), (1.0, 3.0), (15.0, 50.0), (3.0,), (50.0, 50.0, 50.0))


class _Decks:
    """A deck of cards for each dimension, shuffled anew when it is used up."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._decks: dict[str, list[Any]] = {}

    def __call__(self, dimension: str, *cards: Any) -> Any:
        deck = self._decks.setdefault(dimension, [])
        if not deck:
            deck += self._rng.sample(cards, len(cards))
        return deck.pop()


def dealt(count: int, seed: int) -> Iterator[Scenario]:
    """Yield so many worlds."""
    rng = random.Random(seed)
    decks, others = _Decks(rng), _Decks(random.Random(f"{seed} pruned"))
    # For each fault an order of the fates of its own.
    fates = {fault: rng.sample(FATES, len(FATES)) for fault in KICKOFF_FAULTS}
    order: list[str] = []
    for number in range(count):
        if not order:
            order = rng.sample([*KICKOFF_FAULTS, *[""] * (ROUND - len(KICKOFF_FAULTS))], ROUND)
        fault = order.pop()
        fate = fates[fault][number // ROUND % len(FATES)] if fault else decks("fate", *FATES)
        yield _pruned(others, _world(decks, fault, fate, rng))


def _world(deal: _Decks, fault: str, fate: str, rng: random.Random) -> Scenario:
    faults: list[str] = []
    if fault:
        value = deal("retry after", "", "", "=15") if fault[:3] in ("429", "503") and "bare" not in fault else ""
        faults.append(f"kickoff:{fault}{value}{deal('when', '@1', '@1', '@1', '@1-2', '@2')}")
    elif other := deal("other", *_OTHERS):
        faults.append(f"{'status' if other.startswith('early') else 'kickoff'}:{other}@1")
    faults += _elsewhere(deal)
    victim = _victim(deal, fate)
    calls = (victim, *_others(deal), *_forced(deal))
    resolving: dict[str, Any] = {"resolve_after": deal("resolve", None, 0.0, 0.0, 100.0)}
    if PERMITS:
        resolving |= {"resolve_every": deal("resolver", None, None, 0.5, 2.0), "prunes": _prunes(deal)}
    return Scenario(
        calls=calls,
        runs=deal("ends", *_ENDS),
        faults=tuple(faults),
        prefect_faults=_prefect_faults(deal),
        outages=deal("outage", *[()] * 11, ((0.0, 1.0),), ((0.2, 60.0),), ((1.0, 900.0),), ((15.0, 60.0),)),
        down_for=deal("down", 0.5, 5.0, 60.0),
        rotate_at=deal("rotate", *[None] * 8, 0.1, 5.0),
        rotate_late=deal("rotate late", 0.0, 3.0),
        max_attempts=deal("max", 1, 3, 3),
        stop_on_timeout=deal("on timeout", False, False, True),
        seed=rng.randrange(1000),
        order=deal("order", 0, rng.randrange(1, 1000), rng.randrange(1, 1000), rng.randrange(1, 1000)),
        **resolving,
    )


def _victim(deal: _Decks, fate: str) -> Call:
    """Return the call that something befalls."""
    moment = deal(f"moment of {fate}", "nothing", "claimed", "claimed", "posting", "started", "started", "any")
    step = deal(f"step {moment}", *_STEPS[moment])
    befalls: dict[str, Any] = {
        "none": {},
        "killed": {"kill_at": step, "crashed_after": deal("crashed after", None, 0.5, 70.0)},
        "asleep": {"freeze_at": step, "freeze_for": deal("sleeps", 1.0, 30.0, 400.0)},
        "cancelled": {
            "cancel_at": step,
            "asked": deal("asked", True, False),
            "timed_out": deal("timed out", True, False, False),
        },
    }[fate]
    if PERMITS:
        befalls |= {"crashed_at": deal("taken for dead", None, None, 1.0, 5.0)}
        befalls |= deal("clock", {}, {}, {}, {"skew": -300.0}, {"skew": 300.0}, {"skew": -600.0, "skew_at": 11})
        if "freeze_at" in befalls:
            befalls.pop("skew_at", None)  # set back while it sleeps, no clock of a machine tells that it slept
    return Call(
        flow=deal("flow", True, True, False),
        again=deal("again", *_AGAIN),
        same_flow_run=deal("same flow run", True, False),
        at_once=deal("at once", 1, 1, 1, 1, 2),
        misconfigured=deal("misconfigured", *[False] * 15, True),
        **befalls,
    )


def _others(deal: _Decks) -> Sequence[Call]:
    """Return the further callers: half of the worlds have none."""
    ats = deal("others", (), (), (), (), *((at,) for at in _SECONDS), (0.0, 3.0), (0.2, 15.0))
    return [
        Call(
            at=at,
            key=deal("key", *[0] * 6, 1),
            other_inputs=deal("other inputs", *[False] * 9, True),
            flow=deal("other's flow", True, False),
            again=deal("other's again", *_AGAIN),
            kill_at=deal("other's death", *[None] * 6, 4, 8),
            skew=deal("other's clock", 0.0, 0.0, 0.0, 120.0, -120.0) if PERMITS else 0.0,
        )
        for at in ats
    ]


def _forced(deal: _Decks) -> Sequence[Call]:
    at = deal("forced", *[None] * 8, 0.2, 3.0)
    return [] if at is None else [Call(at=at, force_new=True, again=deal("forced again", (), (1.0,), (15.0,)))]


def _elsewhere(deal: _Decks) -> Sequence[str]:
    """Return a fault of another request than the kickoff, in a quarter of the worlds."""
    if not deal("elsewhere", True, False, False, False):
        return []
    where = deal("where", "status", "status", "inputs", "stop")
    what = deal("what", *_CODES, *_BROKEN, "latency=2", "forgotten")
    if what == "forgotten":
        return ["status:forgotten@4"]
    return [f"{where}:{what}{deal('when elsewhere', '@1', '@2', '@1-2', '@2-4')}"]


def _prefect_faults(deal: _Decks) -> tuple[tuple[int | str, str], ...]:
    """Return what goes wrong with a request to the Prefect API, in a third of the worlds."""
    if not deal("prefect", True, False, False):
        return ()
    kinds = PREFECT_FAULTS[:-1] if PERMITS else PREFECT_FAULTS[:-3]
    place = deal("request", *range(1, 13), *(f"write@{number}" for number in range(1, 6)), 20, 30)
    return ((place, deal("prefect fault", *kinds)),)


def _prunes(deal: _Decks) -> tuple[Prune, ...]:
    at = deal("prune", *[None] * 5, 10.0, 57.0, 70.0, 130.0)
    if at is None:
        return ()
    sleeps = deal("prune sleeps", 0.0, 3.0, 30.0)
    return (Prune(at=at, freeze_at=deal("prune step", *range(3, 13)), freeze_for=sleeps),)


def _pruned(deal: _Decks, world: Scenario) -> Scenario:
    """Return a world with more of what matters where records are pruned: roots that are retried, and who dies of it."""
    if not world.prunes:
        return world
    (prune,) = world.prunes
    later = (Prune(at=prune.at + after) for after in deal("later", (), (0.0,), (1.0, 90.0), (40.0, 300.0), (150.0,)))
    prunes = (replace(prune, kill_at=deal("prune dies", *[None] * 3, 15, 19, 23, 27)), *later)
    roots = deal("root", (), (), (), (Root(((0.0, 5.0),)),), (Root(((0.0, 5.0), (50.0, 300.0))),), (LONG,), (DELETED,))
    if not roots:
        return replace(world, prunes=prunes)
    victim, *others = world.calls
    calls = (replace(victim, root=0), *(replace(one, root=deal("other's root", 0, None)) for one in others))
    return replace(world, calls=calls, prunes=prunes, roots=roots)
