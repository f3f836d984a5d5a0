"""What the automations need to know of the deployments that they recover."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

from prefect_crew.automations import slowest_heartbeat

HEARTBEAT = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"


@pytest.mark.parametrize(
    ("job_variables", "seconds"),
    [({}, 180), ({"env": None}, 180), ({"env": {HEARTBEAT: "60"}}, 60), ({"env": {HEARTBEAT: "60.0"}}, 60)],
)
async def test_the_slowest_heartbeat_is_that_of_the_job_variables(job_variables: dict[str, Any], seconds: int):
    deployment = SimpleNamespace(job_variables=job_variables)
    client: Any = SimpleNamespace(read_deployments=AsyncMock(return_value=[deployment]))
    assert await slowest_heartbeat(client) == seconds
