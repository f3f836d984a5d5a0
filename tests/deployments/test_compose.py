"""The Compose file that `prefect-crew init` writes, and its Dockerfile, checked without Docker; and what the containers
would run, run here without any: real PostgreSQL, server, worker, health checks."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import prefect.settings
import pytest
import yaml
from cryptography.fernet import Fernet
from prefect.settings.legacy import _get_settings_fields

from prefect_crew.settings import CrewSettings
from prefect_crew.worker import HAND_OVER_WITHIN
from support.deployed import ROOT, command, wait_until
from support.environment import isolated, program
from support.postgres import SUPERUSER, Postgres
from support.prefect_server import free_port
from support.processes import Process

FOLDER = ROOT / "deployments"
TEXT = (FOLDER / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = [line.split() for line in (FOLDER / "Dockerfile").read_text().splitlines() if line]


def test_the_crew_worker_has_a_name_of_its_own_and_time_to_give_its_flow_runs_back():
    service = SERVICES["worker"]
    assert "--name" in service["command"]
    assert "deploy" not in service, "two workers of one name would take each other's flow runs"
    assert int(service["stop_grace_period"].removesuffix("s")) > HAND_OVER_WITHIN


@pytest.mark.parametrize("name", SERVICES)
def test_each_container_has_no_more_rights_than_it_needs_and_a_health_check(name: str):
    service = SERVICES[name]
    assert (service["read_only"], service["cap_drop"], "cap_add" in service) == (True, ["ALL"], False)
    assert (service["security_opt"], service["pids_limit"] > 0) == (["no-new-privileges:true"], True)
    assert not service.get("privileged", False)
    assert service.get("user") == ("postgres" if name == "postgres" else None)
    assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))
    assert name == "deploy" or service["healthcheck"]["test"][0] == "CMD"


def test_images_have_exact_tags_and_ours_does_not_run_as_root():
    named = [SERVICES["postgres"]["image"], *(line[1] for line in DOCKERFILE if line[0] == "FROM")]
    assert all(re.fullmatch(r"\w+:\d+\.\d+(\.\d+)?-[\w-]+(@sha256:[0-9a-f]{64})?", image) for image in named)
    assert [line[1] for line in DOCKERFILE if line[0] == "USER"] == ["crew"]


def test_the_server_alone_reaches_the_database():
    reaching = {name for name, service in SERVICES.items() if "database" in service.get("networks", [])}
    assert reaching == {"postgres", "server"}
    assert SERVICES["postgres"]["networks"] == ["database"]
    assert COMPOSE["networks"]["database"]["internal"] is True


def test_secrets_are_demanded_stand_in_the_example_and_are_kept_out_of_git_and_the_image():
    for service in SERVICES.values():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|AUTH|ENCRYPTION_KEY|SECRET", variable):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), variable
    asked = set(re.findall(r"\$\{(\w+)", TEXT))
    example = (FOLDER / ".env.example").read_text()
    assert asked == set(re.findall(r"^(\w+)=$", example, flags=re.MULTILINE))
    assert re.findall(r"^(\w+)=.", example, flags=re.MULTILINE) == ["PREFECT_API_URL"]
    for ignoring in (".gitignore", ".dockerignore"):
        assert ".env" in (FOLDER / ignoring).read_text().splitlines()


@pytest.mark.parametrize("name", sorted(set(SERVICES) - {"postgres"}))
def test_prefect_knows_each_setting(name: str):
    known = set(_get_settings_fields(prefect.settings.Settings))
    known |= {f"PREFECT_INTEGRATIONS_CREW_{field.upper()}" for field in CrewSettings.model_fields}
    no_settings = {"PREFECT_SERVER_ENCRYPTION_KEY"}  # read from the environment by the server itself
    assert set(SERVICES[name]["environment"]) - known - no_settings == set()


AUTH = "crew:only-for-this-test"
VALUES = {
    "POSTGRES_PASSWORD": "unused",
    "PREFECT_API_AUTH_STRING": AUTH,
    "PREFECT_SERVER_ENCRYPTION_KEY": Fernet.generate_key().decode(),
    "PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET": "s" * 40,
    "PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL": "",
}


def environment(service: str, folder: Path, **here: str) -> dict[str, str]:
    """Return a service's environment, with `${NAME:?…}` replaced by values, and with what is other on this machine."""
    declared: dict[str, str] = SERVICES[service].get("environment", {})
    variable = re.compile(r"\$\{(\w+)(:[?-][^}]*)?\}")
    filled = {name: variable.sub(lambda found: VALUES[found[1]], str(value)) for name, value in declared.items()}
    assert here.keys() <= {*declared, "PREFECT_API_URL", "PREFECT_WORKER_WEBSERVER_PORT"}
    return isolated(folder, {**filled, **here})


def started(service: str, folder: Path, port: str, env: dict[str, str]) -> AbstractContextManager[Process]:
    """Start what a container runs, on a port of this machine, and wait until its own health check says that it is."""
    ports = {"server": "4200", "receiver": "8001", "worker": "8080"}
    line = [{"0.0.0.0": "127.0.0.1", ports[service]: port}.get(part, part) for part in SERVICES[service]["command"]]
    kind, python, flag, code = SERVICES[service]["healthcheck"]["test"]
    assert (kind, python, flag) == ("CMD", "python", "-c")
    assert f":{ports[service]}/" in code
    check = [sys.executable, "-c", code.replace(f":{ports[service]}/", f":{port}/")]
    process = Process([program(line[0]), *line[1:]], log=folder / f"{service}.log", env=env)
    try:
        wait_until(
            lambda: subprocess.run(check, capture_output=True).returncode == 0 or not process.running,
            seconds=120,
            what=f"a healthy {service}",
        )
        assert process.running, process.tail()
    except BaseException:
        process.kill()
        raise
    return process


@pytest.fixture(scope="module")
def api(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server as the file has it, on ports of this machine. Gives its API's address."""
    folder, port = tmp_path_factory.mktemp("compose-server"), str(free_port())
    postgres.create_database(name := f"compose_{port}")  # pytest-xdist may make this fixture twice in a process
    database = {"HOST": "127.0.0.1", "PORT": str(postgres.port), "USER": SUPERUSER, "NAME": name}
    env = environment(
        "server",
        folder,
        **{f"PREFECT_SERVER_DATABASE_{name}": value for name, value in database.items()},
        PREFECT_SERVER_UI_API_URL=f"http://127.0.0.1:{port}/api",
        PREFECT_SERVER_UI_STATIC_DIRECTORY=str(folder / "ui"),
    )
    with started("server", folder, port, env):
        yield f"http://127.0.0.1:{port}/api"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_server_asks_everybody_for_the_password(api: str, tmp_path: Path):
    env = environment("deploy", tmp_path, PREFECT_API_URL=api)
    assert "Secret" in command("prefect", "block", "type", "ls", env=env)
    with pytest.raises(AssertionError, match="401"):
        command("prefect", "block", "type", "ls", env={**env, "PREFECT_API_AUTH_STRING": "crew:wrong"})


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_one_line_deploys_everything_twice_over_and_worker_and_receiver_are_healthy(api: str, tmp_path: Path):
    env = environment("deploy", tmp_path, PREFECT_API_URL=api)
    for _ in range(2):
        subprocess.run(SERVICES["deploy"]["command"], env=env, cwd=FOLDER, check=True, timeout=180)
    deployed = command("prefect", "deployment", "ls", env=env)
    assert all(name in deployed for name in ("deployed-pipeline/report", "recover/crashed"))
    port = str(free_port())
    env = environment("worker", tmp_path, PREFECT_API_URL=api, PREFECT_WORKER_WEBSERVER_PORT=port)
    with started("worker", tmp_path, port, env):
        port = str(free_port())
        with started("receiver", tmp_path, port, environment("receiver", tmp_path, PREFECT_API_URL=api)):
            pass
