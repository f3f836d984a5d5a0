"""Crew servers whose crews are stored as blocks, which is how the flows know them."""

from collections.abc import Callable
from typing import Any

import pytest

from prefect_crew.devserver import CrewServer
from prefect_crew.testing import CrewServerFactory
from support.deployed import ROOT
from support.prefect_server import PrefectServer
from support.scripts import script

SaveCrew = Callable[..., CrewServer]
ECHO = script({"seconds": 0.2, "output": "on {{ topic }}"}, inputs=["topic"])


@pytest.fixture
def save_crew(prefect_api: PrefectServer, crew_server: CrewServerFactory, instant_polling: None) -> SaveCrew:
    """Give `save_crew(block, spec, *, faults=(), **fields)`: a running crew, stored under that name."""

    def save(block: str, spec: Any = "echo", *, faults: Any = (), **fields: Any) -> CrewServer:
        server = crew_server(spec, faults=faults, speed=10)
        server.crew(**fields).save(block, overwrite=True, _sync=True)  # whatever kind of test calls it
        return server

    return save


@pytest.fixture
def echo(save_crew: SaveCrew) -> CrewServer:
    return save_crew("batch-echo", ECHO)


@pytest.fixture
def report_crews(save_crew: SaveCrew) -> dict[str, CrewServer]:
    """The three crews of the report, ten times as fast, stored as blocks."""
    names = ("research", "write", "review")
    return {name: save_crew(name, str(ROOT / "flows" / "crews" / f"{name}.yaml")) for name in names}
