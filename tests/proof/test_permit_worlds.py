"""The promises hold in the worlds of `permit_worlds.py`, without excuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from proof.permit_worlds import WORLDS
from proof.sim.oracle import broken_promises
from proof.sim.world import World


@pytest.mark.parametrize("name", WORLDS)
def test_the_promises_hold_without_excuses_when(name: str) -> None:
    world = World(WORLDS[name]).play()
    assert not (broken := broken_promises(world, strict=True)), "\n".join([*broken, *world.trace])


def test_the_page_says_how_many_worlds_there_are() -> None:
    page = Path(__file__).parents[2] / "docs" / "explanation" / "at-most-once.md"
    assert f"| {len(WORLDS)} simulated worlds " in page.read_text("utf-8")
