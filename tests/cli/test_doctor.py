"""`doctor`: what it finds at real crew servers and a real Prefect server, and how it says it."""

import asyncio
import re
import socket
from collections import Counter

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_crew.cli import _prefect
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import PrefectAwayError
from support.commands import TOKEN, Command, Finished
from support.prefect_server import PrefectServer
from support.raw import answer, answering, raw_server


def problems(done: Finished) -> dict[str, str]:
    lines = [line[2:].split(": ", 1) for line in done.out.splitlines() if line.startswith("✗")]
    assert done.code == (1 if lines else 0)
    assert done.out.endswith(f"Problems: {len(lines)}.\n")
    return dict(lines)


def test_what_is_right_is_said(here: Command, crews: CrewServer, prefect_api: PrefectServer):
    before = crews.kickoffs
    done = here("doctor", f"{crews.url}/greet")
    assert problems(done) == {}
    assert re.search(r"^✓ crew database: .+, id [0-9a-f-]{36}, on this machine only", done.out, re.MULTILINE)
    assert re.search(rf"^✓ crew: {crews.url}/greet takes ", done.out, re.MULTILINE)
    assert "✓ Prefect server: version " in done.out
    assert crews.kickoffs == before


@pytest.mark.parametrize(
    ("faults", "scheme", "path", "advice"),
    [
        ([], "http", "/none", "Check the crew's URL"),
        ([], "https", "", "https"),
        (["inputs:500"], "http", "", "500"),
        (["inputs:401"], "http", "", "User Bearer Token"),
    ],
)
def test_a_crew_that_cannot_be_asked_is_a_problem(
    here: Command, prefect_api: PrefectServer, faults: list[str], scheme: str, path: str, advice: str
):
    with CrewServer("echo", token=TOKEN, faults=faults) as server:
        found = problems(here("doctor", server.url.replace("http:", f"{scheme}:") + path))
    assert list(found) == ["crew"]
    assert advice in found["crew"]
    assert TOKEN not in found["crew"]


PAGE = answer("<html>", headers="Content-Type: text/html\r\n")
NO_API = "check PREFECT_API_URL, which has to end in /api"


def refusal(code: int) -> bytes:
    return answer("{}", f"{code} Refused", "Content-Type: application/json\r\n")


@pytest.mark.parametrize(
    ("health", "others", "fact"),
    [
        pytest.param(PAGE, refusal(401), NO_API, id="page"),
        pytest.param(refusal(401), refusal(401), "Check PREFECT_API_KEY", id="key"),
        pytest.param(refusal(503), refusal(401), "does not answer (HTTP 503). Start that server", id="broken"),
        pytest.param(answer("true"), refusal(401), "Check PREFECT_API_KEY", id="key-of-the-rest"),
        pytest.param(answer("true"), PAGE, "JSONDecodeError", id="page-of-the-rest"),
    ],
)
async def test_a_prefect_api_that_is_none_is_a_problem(
    here: Command, crews: CrewServer, health: bytes, others: bytes, fact: str
):
    asked: list[str] = []

    def reply(head: str) -> bytes:
        asked.append(head)
        return health if "/health HTTP" in head else others

    async with raw_server(answering(reply)) as url:
        with temporary_settings({PREFECT_API_URL: url}):
            done = await asyncio.to_thread(here, "doctor", f"{crews.url}/greet")
            by_name = await asyncio.to_thread(here, "doctor", "never-stored")
    assert max(Counter(asked).values()) <= 2, "each of the two asks once"
    first, *_ = found = problems(done)
    assert first in ("Prefect API", "Prefect server")
    assert url in found[first] or fact in found[first]
    assert fact in done.out
    assert "run: prefect-crew doctor" not in done.out.replace("Run", "run"), "that is this command"
    assert "✓ crew: " in done.out
    assert by_name.code == 1


def test_a_prefect_api_that_hangs_is_asked_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_prefect, "ANSWER_WITHIN", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/api"
        with temporary_settings({PREFECT_API_URL: url}), pytest.raises(PrefectAwayError, match="does not answer"):
            _prefect._check()
        server.settimeout(0)
        server.accept()[0].close()
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_crew_of_no_such_name_and_a_url_that_is_none(
    here: Command, alone: Command, prefect_api: object, crews: CrewServer
):
    assert "No crew is stored under the name 'never-stored'" in problems(here("doctor", "never-stored"))["crew"]
    done = alone("doctor", f"{crews.url}/greet", env={"PREFECT_API_URL": "nonsense"})
    assert "The Prefect API nonsense does not answer" in problems(done)["Prefect API"]
    assert ".." not in done.out
    assert "✓ crew: " in done.out
    assert "Traceback" not in done.err
