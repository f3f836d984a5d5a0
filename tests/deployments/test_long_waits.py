"""The recipe of docs/guides/suspend.md where no webhook comes, and where the crew is stopped during the wait.

That a webhook resumes the flow run is tested by running the page itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefect_crew.devserver import CrewScript, CrewServer
from support.deployed import ROOT, command, wait_for_state, wait_until
from support.docs import read_page
from support.prefect_server import PrefectServer, connected
from support.processes import Process
from support.seen import Seen

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


def spec(seconds: float) -> CrewScript:
    work = {"name": "report", "seconds": seconds, "output": "All about {{ topic }}"}
    return CrewScript.model_validate({"name": "long", "inputs": ["topic"], "tasks": [work]})


class Recipe:
    """The files of the page on a Prefect server of their own, with 30 s in place of the hour."""

    def __init__(self, server: PrefectServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.seen, self.env = Seen(server), server.env(home=folder / "home", PREFECT_RUNNER_POLL_FREQUENCY="1")
        page = read_page(ROOT, ROOT / "docs" / "guides" / "suspend.md")
        files = {block.file: block.code for block in page.blocks if block.file is not None}
        for name, text in files.items():
            (folder / name).write_text(text.replace("within: 3600", "within: 30"))
        command("prefect", "automation", "create", "--from-file", "long_waits.yaml", env=self.env, cwd=folder)

    def save(self, crew: CrewServer) -> None:
        block: Any = crew.crew(max_kickoffs=1, wait={"initial": 0.3, "max_interval": 1})
        with connected(self.server, self.folder / "home"):
            block.save("long", overwrite=True, _sync=True)

    def suspended(self) -> str:
        """Start a flow run, and return its id once it is suspended."""
        (deployment,) = self.seen.post("/deployments/filter", {})
        body = {"parameters": {"topic": "tea"}}
        run_id = self.seen.post(f"/deployments/{deployment['id']}/create_flow_run", body)["id"]
        wait_until(
            lambda: self.seen.flow_run(run_id)["state_name"] == "Suspended", seconds=90, what="a suspended flow run"
        )
        return run_id


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, prefect_template: Path | None) -> Iterator[Recipe]:
    folder = tmp_path_factory.mktemp("recipe")
    with PrefectServer(folder / "server", template=prefect_template) as server:
        recipe = Recipe(server, folder)
        served = Process([sys.executable, "long_report.py"], log=folder / "served.log", env=recipe.env, cwd=folder)
        with served:
            served.wait_for("long-report/it", 60)
            yield recipe
        recipe.seen.close()


def test_without_any_webhook_it_is_resumed_after_a_while(recipe: Recipe):
    with CrewServer(spec(5)) as crew:
        recipe.save(crew)
        run_id = recipe.suspended()
        assert wait_for_state(recipe.seen, run_id, seconds=150)["state_name"] == "Completed"
        assert crew.kickoffs == 1


def test_a_crew_that_was_stopped_during_the_wait_is_not_started_again(recipe: Recipe):
    with CrewServer(spec(600)) as crew:
        recipe.save(crew)
        run_id = recipe.suspended()
        command("prefect-crew", "runs", "cancel", crew.runs[0].id, env=recipe.env)
        run = wait_for_state(recipe.seen, run_id, seconds=150)
        assert run["state_name"] == "Failed"
        assert "CrewStoppedError" in run["state"]["message"]
        assert crew.kickoffs == 1
