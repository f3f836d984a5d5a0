"""The tests' own helpers: that what they start is real, and that what they stop is gone."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from support import processes
from support.chromium import Chromium
from support.environment import isolated
from support.prefect_server import PrefectServer, connected
from support.processes import MARK, Process, ProcessError, alive, survivors
from support.workers import Worker

STUBBORN_PARENT = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
print("ready", flush=True)
time.sleep(300)
"""


def test_stop_ends_a_process_that_ignores_sigterm_and_its_child_in_another_session(tmp_path: Path):
    with Process([sys.executable, "-c", STUBBORN_PARENT], log=tmp_path / "log") as process:
        process.wait_for("ready")
        family = process.family()
        assert len(family) == 2
        assert process.stop(grace=0.2) == -signal.SIGKILL
        assert not any(map(alive, family))


def test_stop_finds_children_of_a_parent_that_is_already_gone(tmp_path: Path):
    with Process([sys.executable, "-c", STUBBORN_PARENT], log=tmp_path / "log") as process:
        process.wait_for("ready")
        (child,) = set(process.family()) - {process.pid}
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
        assert process.family() == [child]
        process.stop()
        assert not alive(child)


def test_a_process_that_is_just_being_loaded_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "4711").mkdir()
    (tmp_path / "4711" / "exe").symlink_to(sys.executable)
    environ = tmp_path / "4711" / "environ"
    environ.write_bytes(b"")
    (tmp_path / "4711" / "cmdline").write_bytes(b"sleep\x00300\x00")
    monkeypatch.setattr(processes, "PROC", tmp_path)
    monkeypatch.setattr(processes.time, "sleep", lambda _: environ.write_bytes(f"{MARK}=abc\0".encode()))
    assert survivors("abc") == {4711: "sleep 300"}


def test_wait_for_shows_the_log_of_a_process_that_ended(tmp_path: Path):
    with (
        Process([sys.executable, "-c", "print('last words'); raise SystemExit(3)"], log=tmp_path / "log") as process,
        pytest.raises(ProcessError, match=r"ended with 3(.|\n)*last words"),
    ):
        process.wait_for("ready")


RUN_OF_ITS_OWN = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from support.processes import Process

def test_terminated(tmp_path):
    process = Process([sys.executable, "-c", "import time; time.sleep(300)"], log=tmp_path / "log")
    print("child", process.pid, file=sys.stderr, flush=True)
    os.kill(os.getpid(), {signal})

def test_left_behind(tmp_path):
    Process([sys.executable, "-c", "import time; time.sleep(300)"], log=tmp_path / "log")
"""


@pytest.mark.parametrize(
    ("signal_number", "exit_code"),
    [
        pytest.param(signal.SIGTERM, pytest.ExitCode.INTERRUPTED, id="terminated"),
        pytest.param(0, pytest.ExitCode.TESTS_FAILED, id="forgotten-by-a-test"),
    ],
)
def test_a_run_leaves_no_process_behind(tmp_path: Path, signal_number: int, exit_code: int):
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(RUN_OF_ITS_OWN.format(tests=str(Path(__file__).parent), signal=signal_number))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    options = ["-s", "-p", "no:cacheprovider", "--rootdir", tmp_path, "-c", os.devnull]
    command = [sys.executable, "-m", "pytest", *options, tmp_path]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == exit_code, run.stdout + run.stderr
    assert "PROCESSES LEFT BEHIND" in run.stdout
    assert not alive(int(run.stderr.partition("child ")[2].split()[0]))


def test_isolated_keeps_nothing_of_prefect_or_a_crew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_API_KEY", "pnu_mine")
    monkeypatch.setenv("CREW_TOKEN", "mine")
    environment = isolated(tmp_path)
    assert "PREFECT_API_KEY" not in environment
    assert "CREW_TOKEN" not in environment
    assert environment["PREFECT_HOME"] == str(tmp_path)


def test_prefect_api_is_seen_by_threads_and_subprocesses(prefect_api: PrefectServer):
    import threading

    from prefect.settings import get_current_settings

    seen: list[str | None] = []
    thread = threading.Thread(target=lambda: seen.append(get_current_settings().api.url))
    thread.start()
    thread.join()
    assert seen == [prefect_api.api_url]
    script = "import os; print(os.environ['PREFECT_API_URL'])"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == prefect_api.api_url


async def test_a_flow_runs_on_the_server_of_the_tests(prefect_api: PrefectServer):
    from prefect import flow, get_client, get_run_logger
    from prefect.runtime import flow_run

    @flow
    async def greet() -> str:
        get_run_logger().info("hello from a real run")
        return str(flow_run.id)

    run_id = await greet()
    async with get_client() as client:
        assert str(client.api_url).rstrip("/") == prefect_api.api_url
        run = await client.read_flow_run(run_id)  # type: ignore[arg-type]
    assert run.state is not None
    assert run.state.is_completed()
    assert prefect_api.database is not None
    with sqlite3.connect(f"file:{prefect_api.database}?mode=ro", uri=True) as database:
        assert database.execute("select count(*) from flow_run where id = ?", (run_id,)).fetchone() == (1,)


@pytest.mark.slow
def test_a_server_keeps_its_address_and_its_data_over_a_restart(tmp_path: Path, prefect_template: Path | None):
    with PrefectServer(tmp_path, template=prefect_template) as server:
        address = server.api_url
        httpx.post(f"{address}/variables/", json={"name": "kept", "value": "yes"}).raise_for_status()
        server.kill()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")
        server.start()
        assert server.api_url == address
        assert httpx.get(f"{address}/variables/name/kept").json()["value"] == "yes"
    assert not server.running


@pytest.mark.slow
def test_a_worker_runs_a_deployment_and_leaves_nothing(prefect_api: PrefectServer, tmp_path: Path):
    (tmp_path / "flows.py").write_text(
        "import os, time\n"
        "from prefect import flow\n"
        "@flow\n"
        "def endless():\n"
        "    print(f'flow process {os.getpid()} is at work', flush=True)\n"
        "    time.sleep(300)\n"
    )
    with Worker(prefect_api, "support-pool", folder=tmp_path) as worker:
        environment = prefect_api.env(home=tmp_path / "worker-home")
        deploy = ["prefect", "--no-prompt", "deploy", "flows.py:endless", "--name", "d", "--pool", "support-pool"]
        subprocess.run(deploy, cwd=tmp_path, env=environment, check=True, capture_output=True)
        start = ["prefect", "deployment", "run", "endless/d"]
        subprocess.run(start, cwd=tmp_path, env=environment, check=True, capture_output=True)
        output = worker.process.wait_for(" is at work", 90)
        pid = int(output.split("flow process")[1].split()[0])
        assert pid in worker.process.family()
        family = worker.process.family()
    deadline = time.monotonic() + 10
    while any(map(alive, family)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, family))


@pytest.mark.slow
def test_a_flow_runs_on_postgres(prefect_server_on_postgres: PrefectServer, tmp_path: Path):
    from prefect import flow

    @flow
    def answer() -> int:
        return 42

    with connected(prefect_server_on_postgres, tmp_path / "home"):
        assert answer() == 42
    assert prefect_server_on_postgres.database is None


def test_chromium_draws_a_page_and_reports_its_errors(chromium: Chromium, tmp_path: Path):
    (tmp_path / "page.html").write_text(
        "<h1>Ciao</h1><input id=name><button onclick=\"document.title = document.querySelector('#name').value\">Go"
        "</button><script>throw new Error('broken on purpose')</script>"
    )
    with chromium.page() as page:
        page.open((tmp_path / "page.html").as_uri())
        page.wait_for_text("ciao")
        page.type("#name", "Lisbon")
        page.click("role=button[name=Go]")
        assert page.evaluate("document.title") == "Lisbon"
        assert page.errors == ["broken on purpose"]
        assert page.screenshot(tmp_path / "page.png").stat().st_size > 1000


async def test_chromium_works_in_an_asynchronous_test(chromium: Chromium):
    with chromium.page() as page:
        page.open("about:blank")
        assert page.url == "about:blank"
