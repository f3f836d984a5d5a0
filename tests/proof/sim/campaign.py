"""A campaign: many worlds, one after the other. Each keeps the promises, and what could happen in one has happened in
some."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from proof.sim.deal import KICKOFF_FAULTS, PERMITS
from proof.sim.oracle import broken_promises
from proof.sim.scenario import Scenario
from proof.sim.shrink import shrunk
from proof.sim.world import World

__all__ = ["DECISIONS", "FATES", "Reach", "failure", "run_campaign"]

DECISIONS = frozenset(
    {
        ("start", "nothing"),
        ("start", "claimed"),  # forced
        ("start", "started"),
        ("start", "uncertain"),
        ("start", "ended"),
        ("reattach", "started"),
        ("return", "ended"),
        ("start again", "ended"),
        ("uncertain", "claimed"),
        ("uncertain", "uncertain"),
        ("claimed elsewhere", "claimed"),
        ("void", "claimed"),
    }
)
"""What is decided, and in which phase the record is that it is decided about."""
FATES = frozenset(
    (fate, moment)
    for fate in ("killed", "asleep", "cancelled", "shut down")
    for moment in ("nothing", "claimed", "posting", "started")
)
"""What befalls a process, and how far its run has got at that moment: the phase of the record, or that the kickoff is
being sent."""


@dataclass
class Reach:
    """What has happened in the worlds of a campaign.

    Attributes:
        faults: Faults of kickoffs that came, as they are named in scenarios.
        answered: Those after which another call was made with the same key.
        decisions: As DECISIONS.
        followed: Those after which another call was made with the same key.
        fates: As FATES.
    """

    faults: set[str] = field(default_factory=set[str])
    answered: set[str] = field(default_factory=set[str])
    decisions: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])
    followed: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])
    fates: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])

    def add(self, world: World) -> None:
        """Take in what has happened in a world before its aftermath, in which everybody asks again."""
        last: dict[str, float] = {ask.key: ask.at for ask in world.asks if not ask.over}
        for at, key, fired in world.site.kickoff_faults:
            fault = fired.fault
            phase = f"-{'after' if fault.is_after else 'before'}-accept" if fault.kind.has_phases else ""
            name = f"{fault.base_name}{phase}"
            self.faults.add(name)
            if at < last.get(key, 0.0):
                self.answered.add(name)
        for at, key, phase, decision in world.decisions:
            self.decisions.add((decision, phase))
            if at < last.get(key, 0.0):
                self.followed.add((decision, phase))
        self.fates |= {process.facts["fate"] for process in world.processes if "fate" in process.facts}

    def missing(self) -> list[str]:
        """Return, in words, what never happened."""
        wanted: list[tuple[str, Iterable[Any], set[Any]]] = [
            ("fault of a kickoff", KICKOFF_FAULTS, self.faults),
            ("fault of a kickoff followed by another call", KICKOFF_FAULTS, self.answered),
            ("decision", DECISIONS, self.decisions),
            ("decision followed by another call", DECISIONS, self.followed),
            ("fate", FATES, self.fates),
        ]
        return [f"{what}: {one}" for what, all_, met in wanted for one in sorted(set(all_) - met)]


def run_campaign(worlds: Iterable[Scenario]) -> Reach:
    """Play worlds, and return what has happened in them.

    Raises:
        AssertionError: One breaks a promise. It is shrunk first.
    """
    reach = Reach()
    for scenario in worlds:
        world, broken = played(scenario)
        if broken:
            raise AssertionError(failure(scenario))
        reach.add(world)
    return reach


def played(scenario: Scenario) -> tuple[World, list[str]]:
    """Play a world and return it, with the promises that it broke."""
    world = World(scenario)
    try:
        world.play()
    except Exception as error:
        return world, [f"it ended with {type(error).__name__}: {error}"]
    return world, broken_promises(world, strict=PERMITS)


def failure(scenario: Scenario) -> str:
    """Return what there is to know of a world that breaks a promise, made as small as it goes."""
    small = scenario if os.environ.get("PROOF_UNSHRUNK") else shrunk(scenario, lambda one: bool(played(one)[1]))
    world, broken = played(small)
    report = [*broken, repr(small), *world.trace, *map(str, world.site.faults.fired), *world.prefect.fired]
    return "\n".join([*report, f"dealt as {scenario!r}"])
