"""Worlds that once broke a promise, or lie on its edge. What they found is repaired; they are kept here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prefect_crew.client.models import CrewResult
from prefect_crew.exceptions import CrewLostError, KickoffUncertainError
from proof.sim.oracle import broken_promises
from proof.sim.scenario import Call, CrewRun, Prune, Scenario
from proof.sim.world import World, key_of

WORLDS = {
    "nothing happens": Scenario(calls=(Call(),)),
    "a run that was lost is still lost, not late, an hour afterwards": Scenario(
        calls=(Call(),), runs=(CrewRun(seconds=15),), faults=("status:forgotten@4",)
    ),
    "a machine falls asleep over its claim and another starts the run": Scenario(
        calls=(Call(freeze_at=5, freeze_for=400), Call(at=0.2, again=(15.0, 50.0, 50.0))), resolve_after=0.0
    ),
    "a machine falls asleep over its kickoff and wakes up to a bad answer": Scenario(
        calls=(Call(freeze_at=8, freeze_for=400), Call(at=0.2, again=(15.0, 50.0, 50.0))),
        faults=("kickoff:no-id-after-accept@1",),
        resolve_after=0.0,
    ),
    "one call waits for a second try of its kickoff, and two others for that call": Scenario(
        calls=(Call(), Call(), Call(at=3.0)),
        runs=(CrewRun(end="asks"),),
        faults=("kickoff:429-bare-before-accept@1",),
    ),
    "whoever is cancelled over the write that keeps a claim gives it back after that": Scenario(
        calls=(Call(flow=False, cancel_at=10),), faults=("kickoff:429-before-accept@1",), seed=17
    ),
    "two stop one run at the same moment": Scenario(
        calls=(Call(at_once=2),), runs=(CrewRun(end="stuck"),), stop_on_timeout=True
    ),
    "who stops a run tells automations of its end": Scenario(
        calls=(Call(),), runs=(CrewRun(end="stuck"),), max_attempts=1, stop_on_timeout=True
    ),
    "an uncertain kickoff stays one behind a forced one that never started": Scenario(
        calls=(Call(kill_at=7), Call(at=3.0, force_new=True)), faults=("kickoff:400-before-accept@2",), max_attempts=1
    ),
    "the id cannot be written down until the Prefect API is back": Scenario(
        calls=(Call(),), runs=(CrewRun(seconds=3),), outages=((0.1, 200.0),)
    ),
    "the Prefect API is away for a quarter of an hour": Scenario(calls=(Call(again=(50.0,)),), outages=((0.1, 900.0),)),
    "a claim is made twice by Prefect's own client": Scenario(
        calls=(Call(),), prefect_faults=((1, "lost"), (2, "lost"))
    ),
    "the crew's server crashes while it takes its time over a kickoff": Scenario(
        calls=(Call(flow=False), Call(key=1, flow=False)),
        faults=("kickoff:latency=4@1", "status:crash@1"),
        down_for=0.5,
        max_attempts=1,
    ),
    "a process dies with a turn at a busy Prefect API": Scenario(
        calls=(Call(at_once=2, kill_at=23, again=(50.0,)),), prefect_faults=((3, "503"),)
    ),
    "the token is rotated while the crew runs": Scenario(
        calls=(Call(again=(1.0, 3.0)),), runs=(CrewRun(seconds=15),), rotate_at=5.0, rotate_late=3.0
    ),
    "a machine falls asleep over its permit, and wakes up when its claim was voided and removed": Scenario(
        calls=(Call(freeze_at=13, freeze_for=400.0, crashed_at=5.0, again=(0.2,)),), prunes=(Prune(at=130.0),), budget=2
    ),
    "the estimate of a sleeping machine's claim is taken off its budget once": Scenario(
        calls=(Call(freeze_at=10, freeze_for=400.0, crashed_at=5.0, again=(3.0,)),), budget=100
    ),
}


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("name", WORLDS)
def test_the_promises_hold_when(name: str, order: int) -> None:
    world = World(replace(WORLDS[name], order=order)).play()
    assert not broken_promises(world), "\n".join(world.trace)


@pytest.mark.parametrize("step", range(1, 34))
def test_a_process_that_is_killed_before_each_of_its_steps_is_found_again(step: int) -> None:
    scenario = Scenario(
        calls=(Call(kill_at=step, crashed_after=0.5, again=(1.0,)),), runs=(CrewRun(seconds=3),), resolve_after=None
    )
    world = World(scenario).play()
    assert not broken_promises(world), "\n".join(world.trace)
    assert world.site.counters.kickoffs == 1
    assert isinstance(world.final[key_of(0)][-1], CrewResult)


@pytest.mark.parametrize("fault", ["latency=4", "429=15"])
@pytest.mark.parametrize("step", range(1, 34))
def test_a_flow_that_times_out_before_each_of_its_steps_leaves_nothing_uncertain(step: int, fault: str) -> None:
    scenario = Scenario(
        calls=(Call(cancel_at=step, timed_out=True, again=(1.0,)),),
        runs=(CrewRun(seconds=3),),
        faults=(f"kickoff:{fault}@1",),
    )
    world = World(scenario).play()
    assert not broken_promises(world, strict=True), "\n".join(world.trace)
    assert world.site.counters.kickoffs == 1
    assert not [end for end in world.endings if isinstance(end.value, KickoffUncertainError)], "\n".join(world.trace)
    assert isinstance(world.final[key_of(0)][-1], CrewResult)


@pytest.mark.parametrize("timed_out", [False, True])
@pytest.mark.parametrize("step", [18, 21, 23])
def test_a_flow_that_is_cancelled_stops_its_crew_once_also_where_it_times_out_then(step: int, timed_out: bool) -> None:
    calls = (Call(cancel_at=step, asked=True, timed_out=timed_out),)
    world = World(Scenario(calls=calls, runs=(CrewRun(seconds=50),))).play()
    assert not broken_promises(world, strict=True), "\n".join(world.trace)
    assert world.site.counters.requests["stop"] == 1


@pytest.mark.parametrize("fault", ["503-before-accept", "no-id-after-accept", "429"])
@pytest.mark.parametrize("step", range(1, 34))
def test_a_machine_that_falls_asleep_before_each_of_its_steps_starts_nothing_twice(step: int, fault: str) -> None:
    sleeper, other = Call(flow=False, freeze_at=step, freeze_for=400.0), Call(flow=False, again=(15.0, 50.0, 50.0))
    world = World(Scenario(calls=(sleeper, other), faults=(f"kickoff:{fault}@1",), resolve_after=0.0)).play()
    assert not broken_promises(world), "\n".join(world.trace)


def test_only_between_claim_and_record_does_a_kill_leave_doubt() -> None:
    doubts = []
    for step in range(1, 34):
        world = World(Scenario(calls=(Call(kill_at=step, crashed_after=0.5, again=(1.0,)),))).play()
        doubts.append(any(isinstance(end.value, KickoffUncertainError) for end in world.endings))
    first, last = doubts.index(True), len(doubts) - 1 - doubts[::-1].index(True)
    assert all(doubts[first : last + 1]), "one stretch of steps, with nothing else in it"
    assert last - first < 10


def test_a_lost_run_is_reported_as_lost() -> None:
    world = World(WORLDS["a run that was lost is still lost, not late, an hour afterwards"]).play()
    assert [type(end.value) for end in world.endings] == [CrewLostError, CrewLostError]
