"""The program as a person runs it: in a process of its own, or in this one where nothing depends on that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefect_crew.devserver import CrewServer
from support.commands import TOKEN, Command, Finished, outside
from support.scripts import JOURNAL

SCRIPTS = {
    "greet": """
name: greet
inputs: [who]
tasks:
  - {name: think, agent: Host, seconds: 0.1, output: "thinking of {{ who }}"}
  - {name: speak, agent: Host, seconds: 0.1, output: "Hello {{ who }}"}
output: "**Hello** {{ who }}"
usage: {total_tokens: 1234}
""",
    "broken": """
name: broken
inputs: [who]
tasks:
  - {name: think, seconds: 0.05, fail: "no idea who {{ who }} is"}
""",
    "reviewed": """
name: reviewed
inputs: [who]
tasks:
  - {name: draft, seconds: 0.05, output: "draft {{ round }} for {{ who }}", human: true}
  - {name: send, seconds: 0.05, output: "sent to {{ who }}"}
""",
    "journal": JOURNAL,
    "slow": """
name: slow
inputs: [who]
tasks:
  - {name: wait, seconds: 60, output: "late"}
""",
}


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """`here("inputs", url)`: the command in this process. `CREW_TOKEN` is set."""
    from prefect_crew import cli
    from prefect_crew.cli import _output

    monkeypatch.setenv("CREW_TOKEN", TOKEN)

    def run(*arguments: str) -> Finished:
        capsys.readouterr()
        code = cli.main(arguments)
        out, err = capsys.readouterr()
        return Finished(code, out, err)

    yield run
    _output.begin()


@pytest.fixture
def alone(tmp_path: Path) -> Command:
    """`alone("inputs", url)`: the command in a process of its own, without any Prefect server. Marks `programs`."""

    def run(*arguments: str, **options: Any) -> Finished:
        return outside(tmp_path / "home", *arguments, **options)

    return run


@pytest.fixture(scope="session")
def crews() -> Iterator[CrewServer]:
    """Several crews on one port: `f"{crews.url}/greet"`, and broken, reviewed, slow."""
    with CrewServer(SCRIPTS, token=TOKEN) as server:
        yield server
