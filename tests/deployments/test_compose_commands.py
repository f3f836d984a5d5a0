"""What the containers of the Compose file run, run here without any: real PostgreSQL, server, worker, health checks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from support import compose
from support.deployed import command, wait_until
from support.environment import isolated, program
from support.postgres import SUPERUSER, Postgres
from support.prefect_server import free_port
from support.processes import Process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
AUTH = "crew:only-for-this-test"


def health(service: str, **ports: str) -> bool:
    """Run a service's own health check, with its port replaced."""
    check = compose.services()[service]["healthcheck"]["test"]
    assert check[:2] == ["CMD", "python"]
    code = check[3]
    for inside, here in ports.items():
        assert f":{inside.removeprefix('p')}/" in code
        code = code.replace(f":{inside.removeprefix('p')}/", f":{here}/")
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def api(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server as the file has it, on ports of this machine. Gives its port."""
    folder = tmp_path_factory.mktemp("compose-server")
    postgres.create_database("compose")
    port = str(free_port())
    declared = compose.environment(
        "server",
        POSTGRES_PASSWORD="unused",
        PREFECT_API_AUTH_STRING=AUTH,
        PREFECT_SERVER_ENCRYPTION_KEY=Fernet.generate_key().decode(),
    )
    here = {
        "PREFECT_SERVER_DATABASE_HOST": "127.0.0.1",
        "PREFECT_SERVER_DATABASE_PORT": str(postgres.port),
        "PREFECT_SERVER_DATABASE_USER": SUPERUSER,
        "PREFECT_SERVER_DATABASE_NAME": "compose",
        "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(folder / "ui"),
    }
    assert set(here) <= set(declared)
    started = [
        {"0.0.0.0": "127.0.0.1", "4200": port}.get(part, part) for part in compose.services()["server"]["command"]
    ]
    env = isolated(folder, {**declared, **here})
    with Process([program(started[0]), *started[1:]], log=folder / "log", env=env) as process:
        wait_until(
            lambda: health("server", p4200=port) or (process.running and None),
            seconds=120,
            what=f"a healthy server: {process.tail(500)}",
        )
        yield port


def client_env(folder: Path, port: str, service: str) -> dict[str, str]:
    declared = compose.environment(
        service,
        PREFECT_API_AUTH_STRING=AUTH,
        PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET="s" * 40,
        PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL="",
    )
    return isolated(folder, {**declared, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"})


def test_the_server_asks_everybody_for_the_password(api: str, tmp_path: Path):
    env = client_env(tmp_path, api, "deploy")
    assert "Secret" in command("prefect", "block", "type", "ls", env=env)
    done = subprocess.run(
        [program("prefect"), "block", "type", "ls"],
        env={**env, "PREFECT_API_AUTH_STRING": "crew:wrong"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "401" in done.stdout + done.stderr


def test_the_one_line_deploys_everything_twice_over_and_its_worker_is_healthy(api: str, tmp_path: Path):
    env = client_env(tmp_path, api, "deploy")
    shell, flag, line = compose.services()["deploy"]["command"]
    for _ in range(2):
        done = subprocess.run(
            [shell, flag, line], env=env, cwd=compose.FOLDER, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    deployed = command("prefect", "deployment", "ls", env=env)
    assert all(name in deployed for name in ("deployed-pipeline/report", "recover/crashed"))

    port = str(free_port())
    env = {**client_env(tmp_path, api, "worker"), "PREFECT_WORKER_WEBSERVER_PORT": port}
    started = compose.services()["worker"]["command"]
    with Process([program(started[0]), *started[1:]], log=tmp_path / "worker.log", env=env) as process:
        wait_until(lambda: health("worker", p8080=port), seconds=60, what=f"a healthy worker: {process.tail(500)}")


def test_the_receiver_is_healthy_and_knows_its_secret(api: str, tmp_path: Path):
    port = str(free_port())
    env = client_env(tmp_path, api, "receiver")
    started = [
        {"0.0.0.0": "127.0.0.1", "8001": port}.get(part, part) for part in compose.services()["receiver"]["command"]
    ]
    with Process([program(started[0]), *started[1:]], log=tmp_path / "receiver.log", env=env) as process:
        wait_until(lambda: health("receiver", p8001=port), seconds=60, what=f"a healthy receiver: {process.tail(500)}")
