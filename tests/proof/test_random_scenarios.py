"""Worlds at random: faults of the crew's server and of the Prefect API, kills, sleeping machines, cancellations, races,
forced purchases and people who settle. In each of them every promise holds.

Two hundred run each time, always the same ones; `make prove` adds two thousand that nobody has seen before. A failing
one is shrunk and printed with all that happened in it; paste it into `test_scenarios.py` when it is mended.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, Phase, given, note, seed, settings

from proof.sim.oracle import broken_promises
from proof.sim.scenario import Scenario, scenarios
from proof.sim.world import World

HUNDREDS = settings(
    deadline=None,
    database=None,
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
    phases=(Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
)


def holds(scenario: Scenario) -> None:
    world = World(scenario)
    try:
        world.play()
        broken = broken_promises(world)
    finally:
        note("\n".join([*world.trace, *map(str, world.site.faults.fired), *world.prefect.fired]))
    assert not broken, broken


@seed(3)
@settings(HUNDREDS, max_examples=200)
@given(scenarios)
def test_two_hundred_worlds_keep_the_promises(scenario: Scenario) -> None:
    holds(scenario)


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.timeout(900)
def test_two_thousand_new_worlds_keep_the_promises(notes: list[str]) -> None:
    number = random.SystemRandom().randrange(10**6)
    notes.append(f"random scenarios: 2000 with @seed({number})")
    seed(number)(settings(HUNDREDS, max_examples=2000)(given(scenarios)(holds)))()
