"""The built wheel, alone in a fresh environment: what someone gets who has no clone of the repository.

The demonstration, and a project that `prefect-crew init` wrote: its README from top to bottom, with its own tests, its
deployments on a crew worker, and the automations. WHEEL_PYTHON=3.12 chooses another Python than that of the tests,
WHEEL=dist/… a wheel that is built already.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from support.deployed import ROOT, command
from support.docs import read_page
from support.environment import isolated, online, program
from support.prefect_server import PrefectServer
from support.processes import Process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Installed:
    """The environment that the wheel is installed into, as a shell in an empty folder uses it."""

    def __init__(self, folder: Path, server: PrefectServer) -> None:
        self.folder = folder
        self.empty = folder / "empty"
        self.empty.mkdir()
        path = os.pathsep.join((str(folder / "venv" / "bin"), os.defpath))
        env = isolated(folder / "home", {"PREFECT_API_URL": server.api_url, "PATH": path})
        self.env = {name: value for name, value in env.items() if name != "PYTHONPATH"}

    def run(self, line: str, *, cwd: Path | None = None) -> str:
        """Run lines of a shell, and return what they say; fail unless each succeeds."""
        return command("/bin/bash", "-e", "-c", line, env=self.env, cwd=cwd or self.empty)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, prefect_template: Path | None) -> Iterator[PrefectServer]:
    """A Prefect server of its own: the project's deployments have plain names."""
    with PrefectServer(tmp_path_factory.mktemp("server"), template=prefect_template) as server:
        yield server


@pytest.fixture(scope="module")
def installed(server: PrefectServer, tmp_path_factory: pytest.TempPathFactory, notes: list[str]) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    venv = folder / "venv"

    def uv(*arguments: str | Path) -> None:
        command("uv", *arguments, env=online(), timeout=300)

    if not (wheel := os.environ.get("WHEEL")):
        uv("build", "--quiet", "--wheel", "--out-dir", folder / "dist")
        (wheel,) = (folder / "dist").glob("*.whl")
    uv("venv", "--quiet", "--python", os.environ.get("WHEEL_PYTHON") or program("python"), venv)
    uv("pip", "install", "--quiet", "--python", venv / "bin" / "python", "-c", "constraints.txt", wheel, "pytest")
    installed = Installed(folder, server)
    notes.append(f"wheel: installed alone on {installed.run('python --version').strip()}")
    return installed


def test_what_is_tested_is_the_wheel(installed: Installed):
    place = installed.run("python -c 'import prefect_crew; print(prefect_crew.__file__)'")
    assert place.startswith(str(installed.folder))


def test_the_demonstration_runs(installed: Installed):
    said = installed.run("prefect-crew demo")
    assert "Where to go from here" in said
    assert list(installed.empty.iterdir()) == []


def test_the_documentation_comes_with_it(installed: Installed):
    listed = installed.run("prefect-crew docs")
    pages = {page.stem for page in (ROOT / "docs").rglob("*.md")} - {"internals"}
    assert pages <= set(listed.replace("/", " ").split())
    assert "PREFECT_INTEGRATIONS_CREW_URL" in installed.run("prefect-crew docs reference/settings")
    assert "## 0.1.0" in installed.run("prefect-crew docs changelog")
    assert "prefect-crew docs" in installed.run("prefect-crew --help")


def test_the_readme_of_a_project_is_true(installed: Installed, server: PrefectServer):
    """From its own tests to the automations: all that it says, but for what installs, the server, and Docker."""
    project, readme = installed.folder / "project", ROOT / "deployments" / "README.md"
    installed.run(f"prefect-crew init {project}")
    # How to run a block is told by comments, which the repository's README has and the project's has not.
    blocks = [block for block in read_page(readme.parent, readme).blocks if block.language == "bash"]
    assert len(blocks) > 8
    left_out = {"pip install -r requirements.txt\npytest\n": "pytest\n", "prefect server start\n": ""}
    said = (project / "README.md").read_text(encoding="utf-8")
    assert "<!--" not in said
    with ExitStack() as running:
        for number, block in enumerate(blocks):
            assert block.code in said
            code = left_out.get(block.code, block.code)
            if block.run.get("background"):
                log = installed.folder / f"block-{number}.log"
                process = Process(["bash", "-e", "-c", code], log=log, env=installed.env, cwd=project)
                running.callback(process.stop, grace=5.0)
                process.wait_for(block.run["background"])
            elif "docker" not in code:
                installed.run(code, cwd=project)
        with httpx.Client(base_url=server.api_url, timeout=60, trust_env=False) as api:
            flow_runs = [run for run in api.post("/flow_runs/filter", json={}).json() if run["deployment_id"]]
            automations = api.post("/automations/filter", json={}).json()
    ran = [(run["state_type"], run["infrastructure_pid"].partition(" ")[0]) for run in flow_runs]
    assert ran == [("COMPLETED", "CrewWorker")] * 3
    assert len((project / "results" / "topics.jsonl").read_text().splitlines()) == 3
    assert sorted(one["name"] for one in automations) == ["prefect-crew: no heartbeat", "prefect-crew: recover"]
