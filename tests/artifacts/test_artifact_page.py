"""The artifact of a run on a real page of a real Prefect server, in both interfaces that Prefect ships."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from prefect_crew import DeployedCrew, run_crew
from prefect_crew.artifacts.run import artifact_key
from prefect_crew.devserver import CrewServer
from support.seen import Seen

pytestmark = pytest.mark.slow


@pytest.fixture
def artifact_id(seen: Seen, instant_polling: None) -> str:
    with CrewServer(str(Path(__file__).with_name("ugly.yaml"))) as server:
        fields = {"secret_inputs": ["password"], "page_url": "https://crews.example/travel?tab=(1)|2"}
        crew = DeployedCrew(url=server.url, token=server.token, **fields)
        run_crew(crew, {"topic": "<i>Lisbon</i> | tiles", "password": "correct horse battery"})
    (artifact,) = seen.artifacts(artifact_key(crew.label))
    return artifact["id"]


@pytest.mark.parametrize(
    ("ui", "dark"),
    [("v1", False), ("v2", False), ("v2", True)],
    ids=["older-interface", "newer-interface", "newer-interface-dark"],
)
def test_a_run_renders_as_meant(
    prefect_server: Any, chromium: Any, artifact_id: str, tmp_path: Path, ui: str, dark: bool
) -> None:
    with chromium.page(height=1600, dark=dark) as page:
        page.open(prefect_server.artifact_url(artifact_id, ui=ui))
        page.wait_for_text("Execution time")
        page.wait_for_text("still inside")
        page.wait_for_text("░ ")  # a bar of a task's share of the time, drawn a moment later
        page.screenshot(tmp_path / "run.png")
        text = page.text().replace("\u2060", "")  # a word joiner makes a tag text

        for shown in (
            *("completed", "<i>Lisbon</i> | tiles", "********", "research | the <b>topic</b>", "A`gent"),
            *("<script>window.pwned = 1</script>", '1 <img src=x onerror="window.pwned = 1">', "עברית"),
            *("العربية: مرحبا بالعالم", 'if a < b: print("<b>")', "strength"),
        ):
            assert shown in text, shown
        # Ours are tables, the crew's formatting is formatting, and its markup is text.
        for hidden in ("correct horse", "**strength**", "*emphasis*", "`code with", "| place", "&lt;"):
            assert hidden not in text, hidden
        assert re.search("█░+ [67][0-9]%", text), "0.9 of 1.2 s, as long as the machine took for it"
        assert page.count("table") >= 4
        assert page.count("img[src='x']") == 0
        assert page.count("a[href^='javascript']") == 0
        assert page.evaluate("window.pwned ?? null") is None
        assert not [url for url in page.requests if "tracker" in url], "opening the page loads nothing from elsewhere"
        assert page.count("a[href='https://crews.example/travel?tab=%281%29%7C2']") == 1, "the crew's page"
        key = re.split(r"[\t\n]+", text.partition("Idempotency key")[2].strip())[0]
        assert f"prefect-crew result {shlex.quote(key)} --crew http://127.0.0.1" in text, "on one line"
        # The older interface opens links in another tab; where this one leads counts.
        page.open(page.evaluate("document.querySelector(\"a[href*='../../runs/flow-run/']\").href"))
        page.wait_for_text("· <i>Lisbon</i> | tiles")
        assert f"{'/v2' if ui == 'v2' else ''}/runs/flow-run/" in page.url
        page.screenshot(tmp_path / "flow-run.png")
