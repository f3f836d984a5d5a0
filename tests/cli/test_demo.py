"""The newcomer's first minute: on a terminal, on Prefect's embedded server, and interrupted."""

import shutil
from pathlib import Path

import pytest

from support.environment import isolated, program
from support.prefect_server import PrefectServer
from support.terminals import Terminal


@pytest.fixture
def demo(tmp_path: Path, prefect_server: PrefectServer, prefect_template: Path | None) -> Terminal:
    """Start the demo on a terminal, with a migrated database as a second demo would find it."""
    home = tmp_path / "home"
    home.mkdir()
    if prefect_template is not None and prefect_template.exists():
        shutil.copyfile(prefect_template, home / "prefect.db")
    env = isolated(home, {"PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true"})
    return Terminal([program("prefect-crew"), "demo"], env=env)


def test_the_demo_shows_what_it_does_and_where_to_go(demo: Terminal):
    with demo:
        demo.wait_for("Prefect runs it")  # at once, before Prefect is imported
        demo.wait_for("Starting Prefect's embedded server")
        demo.wait_for("research_destination")
        assert demo.wait() == 0, demo.output
        assert demo.family() == {}
    for shown in ("(2 of 3 tasks done)", "Kyoto, Japan: 7 days", "Good to know"):
        assert shown in demo.output
    for way in ("prefect server start", "/runs/flow-run/", "prefect-crew serve travel", "prefect-crew init"):
        assert way in demo.output
    # A record has no room for this result, and the crew that could tell it again has ended.
    assert "prefect-crew result" not in demo.output
    for noise in ("INFO", "WARNING", "Traceback", "Bearer", "anonymous usage data", "temporary server"):
        assert noise not in demo.output


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("Prefect runs it", id="at-the-first-moment"),
        pytest.param("Starting Prefect's embedded server", id="while-the-server-starts"),
        pytest.param("(1 of 3 tasks done)", id="while-the-crew-runs", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_leaves_no_process_behind(demo: Terminal, moment: str):
    with demo:
        demo.wait_for(moment)
        demo.press("\x03")
        assert demo.wait() == 130, demo.output
        assert demo.family() == {}
    assert "Traceback" not in demo.output
    if "tasks" in moment:
        assert "The demo's crew has ended with the demo." in demo.output


def test_a_prefect_server_that_is_set_is_used(here, prefect_api: PrefectServer, instant_polling: None):
    done = here("demo")
    assert done.code == 0
    assert "Kyoto, Japan: 7 days" in done.out
    assert f"{prefect_api.ui_url}/runs/flow-run/" in done.err
    assert "embedded" not in done.err
