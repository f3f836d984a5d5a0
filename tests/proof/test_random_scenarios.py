"""Worlds by the hundred: faults of the crew's server and of the Prefect API, kills, sleeping machines, cancellations,
races, forced runs and people who resolve. In each of them every promise holds.

Two hundred run each time, always the same ones; `make prove` adds two thousand that nobody has seen before. A failing
one is shrunk and printed with all that happened in it; paste it into `test_scenarios.py` when it is repaired. And what
can happen in them has to happen in some: a campaign that never sees it proves nothing about it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from proof.sim.campaign import run_campaign
from proof.sim.deal import dealt
from proof.sim.scenario import Call, CrewRun, Scenario


def test_two_hundred_worlds_keep_the_promises() -> None:
    # No world of this seed cancels a flow run, or shuts a process down, while its kickoff is sent.
    ended = [
        Scenario(calls=(Call(cancel_at=11, asked=asked),), runs=(CrewRun(seconds=3.0),)) for asked in (True, False)
    ]
    assert not run_campaign([*dealt(200, seed=7), *ended]).missing(), "these worlds no longer reach everything"


@pytest.mark.parametrize("budget", [2, 100])
def test_a_budget_holds_in_sixty_worlds_and_counts_what_was_started(budget: int) -> None:
    run_campaign(replace(scenario, budget=budget) for scenario in dealt(60, seed=5))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_thousand_new_worlds_keep_the_promises(notes: list[str], pytestconfig: pytest.Config) -> None:
    number = pytestconfig.getoption("seed")
    notes.append(f"random scenarios: dealt(2000, seed={number})")
    assert not run_campaign(dealt(2000, seed=number)).missing()
