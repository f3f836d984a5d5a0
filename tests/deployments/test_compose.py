"""The Compose file that `prefect-crew init` writes, and its Dockerfile, checked without Docker; and what the containers
would run, run here without any: real PostgreSQL, server, worker, health checks."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


def test_no_container_has_more_rights_than_it_needs():
    for name, service in SERVICES.items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert "cap_add" not in service
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["pids_limit"] > 0
        assert not service.get("privileged", False)
        assert service.get("user") == ("postgres" if name == "postgres" else None)
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))
        assert name == "deploy" or service["healthcheck"]["test"][0] == "CMD"
        # Nothing else is in the network of the database.
        assert service["networks"] == (["database"] if name == "postgres" else ["database", "default"])
    assert COMPOSE["networks"]["database"]["internal"] is True
    assert [line[1] for line in DOCKERFILE if line[0] == "USER"] == ["crew"]


def test_the_worker_is_one_and_has_time_to_give_its_flow_runs_back():
    service = SERVICES["worker"]
    assert "--name" in service["command"]
    assert "deploy" not in service, "two workers of one name would take each other's flow runs"
    assert int(service["stop_grace_period"].removesuffix("s")) > HAND_OVER_WITHIN


def test_images_have_exact_tags():
    for image in (SERVICES["postgres"]["image"], *(line[1] for line in DOCKERFILE if line[0] == "FROM")):
        assert re.fullmatch(r"\w+:\d+\.\d+(\.\d+)?-[\w-]+(@sha256:[0-9a-f]{64})?", image)


def test_secrets_are_demanded_and_kept_out_of_git_and_the_image():
    for service in SERVICES.values():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|AUTH|ENCRYPTION_KEY|SECRET", variable):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), variable
    example = (FOLDER / ".env.example").read_text()
    assert {*re.findall(r"\$\{(\w+)", TEXT)} == {*re.findall(r"^(\w+)=$", example, flags=re.MULTILINE)}
    assert re.findall(r"^(\w+)=.", example, flags=re.MULTILINE) == ["PREFECT_API_URL"]
    for ignoring in (".gitignore", ".dockerignore"):
        assert ".env" in (FOLDER / ignoring).read_text().splitlines()


def test_prefect_knows_each_setting():
    known = {*_get_settings_fields(prefect.settings.Settings), "PREFECT_SERVER_ENCRYPTION_KEY"}  # the server reads it
    known |= {f"PREFECT_INTEGRATIONS_CREW_{field.upper()}" for field in CrewSettings.model_fields}
    for name in {*SERVICES} - {"postgres"}:
        assert {*SERVICES[name]["environment"]} <= known


VALUES = {
    "POSTGRES_PASSWORD": "unused",
    "PREFECT_API_AUTH_STRING": "crew:only-for-this-test",
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


PORTS = {"server": "4200", "receiver": "8001", "worker": "8080"}


@contextmanager
def running(service: str, folder: Path, port: str, **here: str) -> Iterator[None]:
    """Run what a container runs, on a port of this machine, healthy by its own check."""
    there = PORTS[service]
    changed = {"0.0.0.0": "127.0.0.1", there: port}
    line = [str(changed.get(part, part)) for part in SERVICES[service]["command"]]
    *shell, code = SERVICES[service]["healthcheck"]["test"]
    assert shell == ["CMD", "python", "-c"]
    assert f":{there}/" in code
    check = [sys.executable, "-c", code.replace(f":{there}/", f":{port}/")]
    env = environment(service, folder, **here)
    with Process([program(line[0]), *line[1:]], log=folder / f"{service}.log", env=env) as process:
        wait_until(
            lambda: subprocess.run(check, capture_output=True).returncode == 0 or not process.running,
            what=f"a healthy {service}",
        )
        assert process.running, process.tail()
        yield


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_everything_is_deployed_twice_over_and_healthy(postgres: Postgres, tmp_path: Path):
    port, other_port, folder = str(free_port()), str(free_port()), tmp_path / "server"
    folder.mkdir()
    postgres.create_database(name := f"compose_{port}")
    database = {"HOST": "127.0.0.1", "PORT": str(postgres.port), "USER": SUPERUSER, "NAME": name}
    with running(
        "server",
        folder,
        port,
        **{f"PREFECT_SERVER_DATABASE_{name}": value for name, value in database.items()},
        PREFECT_SERVER_UI_API_URL=f"http://127.0.0.1:{port}/api",
        PREFECT_SERVER_UI_STATIC_DIRECTORY=str(folder / "ui"),
    ):
        api = {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
        env = environment("deploy", tmp_path, **api)
        for _ in range(2):
            subprocess.run(SERVICES["deploy"]["command"], env=env, cwd=FOLDER, check=True, timeout=180)
        deployed = command("prefect", "deployment", "ls", env=env)
        assert "deployed-pipeline/report" in deployed
        assert "recover/crashed" in deployed
        with pytest.raises(AssertionError, match="401"):
            command("prefect", "deployment", "ls", env={**env, "PREFECT_API_AUTH_STRING": "crew:wrong"})
        with (
            running("worker", tmp_path, other_port, PREFECT_WORKER_WEBSERVER_PORT=other_port, **api),
            running("receiver", tmp_path, str(free_port()), **api),
        ):
            pass
