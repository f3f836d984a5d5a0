"""The program as a person runs it: in a process of its own, or in this one where nothing depends on that."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.commands import TOKEN, Command, Finished, outside
from support.prefect_server import PrefectServer
from support.scripts import JOURNAL
from support.servers import Crews

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
def crews() -> Iterator[Crews]:
    """Several crews on one port: `f"{crews.url}/greet"`, and broken, reviewed, slow."""
    with Crews(SCRIPTS, token=TOKEN) as server:
        yield server


@pytest.fixture
def store(prefect_api: object, crews: Crews) -> Callable[..., str]:
    """`store("greet", name, **fields)`: store one of the crews as a block with these fields, and return its name."""

    def save(crew: str, name: str | None = None, **fields: Any) -> str:
        name = name or f"{crew}-{uuid.uuid4().hex[:8]}"
        wait = {"initial": 0.1, "max_interval": 0.5}
        block: Any = crews.crew(url=f"{crews.url}/{crew}", **{"wait": wait, **fields})
        block.save(name, overwrite=True, _sync=True)
        return name

    return save


@pytest.fixture
def greeter(store: Callable[..., str]) -> str:
    """The name of a stored crew with the input `who`."""
    return store("greet")


@pytest.fixture
def work_pool(prefect_api: PrefectServer) -> Callable[[str], str]:
    """`work_pool("process")`: create a work pool of a type, and return its name."""

    def create(kind: str) -> str:
        pool = f"pool-{uuid.uuid4().hex[:8]}"
        body = {"name": pool, "type": kind}
        httpx.post(f"{prefect_api.api_url}/work_pools/", json=body).raise_for_status()
        return pool

    return create


PIPELINE = """
name: {name}
description: Greets twice.
inputs:
  who: {{description: Whom to greet.}}
  times: {{type: integer, default: 2}}
  tone: {{default: warm}}
steps:
  - {{name: first, crew: {name}, inputs: {{who: "{{{{ who }}}}"}}}}
  - {{name: second, crew: {name}, inputs: {{who: "{{{{ first.output }}}}, {{{{ times }}}} times, {{{{ tone }}}}"}}}}
"""


@pytest.fixture
def pipeline(greeter: str, tmp_path: Path) -> Path:
    """A file with a pipeline over that crew, which is named as the crew is."""
    path = tmp_path / "greet.yaml"
    path.write_text(PIPELINE.format(name=greeter))
    return path
