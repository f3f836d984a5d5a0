"""Which crew database a process uses: a second one is never silent."""

import asyncio
import shutil
from pathlib import Path

import pytest
from prefect.settings import PREFECT_HOME, PREFECT_SERVER_DATABASE_CONNECTION_URL, temporary_settings

from prefect_crew import StoreError, run_crew
from prefect_crew.runs.database import URL_SETTING, database_url, forget_stores, use_this_store
from prefect_crew.testing import CrewServerFactory


@pytest.mark.parametrize(
    ("prefect_url", "file"),
    [
        ("sqlite+aiosqlite:////harness/orion.db", "/harness/crew.db"),  # as `prefect_test_harness` makes one
        ("postgresql+asyncpg://user:password@host/prefect", "/home/me/crew.db"),
        ("sqlite+aiosqlite:///:memory:", "/prefect-crew-"),
    ],
)
def test_the_default_file_is_beside_that_of_prefect(monkeypatch: pytest.MonkeyPatch, prefect_url: str, file: str):
    monkeypatch.delenv(URL_SETTING, raising=False)
    with temporary_settings({PREFECT_HOME: "/home/me", PREFECT_SERVER_DATABASE_CONNECTION_URL: prefect_url}):
        url, is_set = database_url()
    assert file in url
    assert not is_set


@pytest.mark.usefixtures("prefect_api")
def test_a_second_default_file_starts_nothing_and_one_that_is_set_is_warned_of_once(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    server = crew_server("echo")

    def run(home: str) -> None:
        forget_stores()  # as another process
        with temporary_settings({PREFECT_HOME: tmp_path / home}):
            run_crew(server.crew(), {"text": "tea"}, idempotency_key="daily")

    monkeypatch.delenv(URL_SETTING)
    with temporary_settings({PREFECT_HOME: tmp_path / "a"}):
        asyncio.run(use_this_store())
    run("a")
    with pytest.raises(StoreError, match=f"recorded in {tmp_path}/a/crew.db.*{URL_SETTING}") as refused:
        run("b")
    assert refused.value.started == "no"
    run("a")
    forget_stores()
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    with pytest.raises(StoreError, match=f"recorded in {tmp_path}/a/crew.db"):
        run("copy")
    assert server.kickoffs == 1
    monkeypatch.setenv(URL_SETTING, f"sqlite:///{tmp_path}/other.db")
    for _ in range(3):
        run("b")
    assert server.kickoffs == 2, "it is taken at its word"
    assert caplog.text.count("were recorded in") == 1
