"""The Compose file and its Dockerfile, checked without Docker, which the machines of these tests need not have.

What the containers would run is run here, without a container: see test_compose_commands.py.
"""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest

from prefect_crew.settings import CrewSettings
from prefect_crew.worker import HAND_OVER_WITHIN
from support import compose
from support.deployed import ROOT

SERVICES = compose.services()
CREW_WORKERS = ["crew-worker-one", "crew-worker-two"]
OURS = ["server", "deploy", "worker", *CREW_WORKERS, "receiver"]
VOLUMES = set(compose.read()["volumes"])


def dockerfile() -> list[list[str]]:
    lines = (ROOT / "deployments" / "Dockerfile").read_text().splitlines()
    return [line.split() for line in lines if line and not line.startswith("#")]


def test_the_services_are_those_of_the_docs():
    assert set(SERVICES) == {"postgres", *OURS}
    assert SERVICES["worker"]["deploy"]["replicas"] == 2


def test_crew_workers_have_names_of_their_own_and_time_to_give_their_flow_runs_back():
    named = [SERVICES[name]["command"][SERVICES[name]["command"].index("--name") + 1] for name in CREW_WORKERS]
    assert len(set(named)) == len(CREW_WORKERS)
    for name in CREW_WORKERS:
        service = SERVICES[name]
        assert service["deploy"]["replicas"] == 1
        assert int(service["stop_grace_period"].removesuffix("s")) > HAND_OVER_WITHIN
        assert service["environment"]["PREFECT_WORKER_HEARTBEAT_SECONDS"] == "10"
        assert {**SERVICES["worker"]["environment"], "PREFECT_WORKER_HEARTBEAT_SECONDS": "10"} == service["environment"]


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_published_is_published_on_loopback_only(name: str):
    assert all(str(port).startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))


@pytest.mark.parametrize("name", sorted(set(SERVICES) - {"deploy"}))
def test_each_has_a_health_check(name: str):
    check = SERVICES[name]["healthcheck"]
    assert check["test"][0] == "CMD"
    assert {"interval", "timeout", "retries"} <= set(check)


@pytest.mark.parametrize("name", SERVICES)
def test_secrets_come_from_the_environment_and_are_demanded(name: str):
    for variable, value in SERVICES[name].get("environment", {}).items():
        if re.search("PASSWORD|AUTH|ENCRYPTION_KEY|SECRET", variable):
            assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), variable


def test_every_value_that_is_asked_for_stands_in_the_example():
    asked = set(re.findall(r"\$\{(\w+)", compose.PATH.read_text()))
    example = (ROOT / "deployments" / "env.example").read_text()
    assert asked == set(re.findall(r"^(\w+)=$", example, flags=re.MULTILINE))


def test_git_ignores_the_filled_in_example():
    assert subprocess.run(["git", "check-ignore", "-q", "deployments/.env"], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", OURS)
def test_prefect_knows_each_setting(name: str):
    import prefect.settings
    from prefect.settings.legacy import _get_settings_fields

    known = set(_get_settings_fields(prefect.settings.Settings))
    known |= {f"PREFECT_INTEGRATIONS_CREW_{field.upper()}" for field in CrewSettings.model_fields}
    no_settings = {"PREFECT_SERVER_ENCRYPTION_KEY"}  # read from the environment by the server itself
    assert set(SERVICES[name]["environment"]) - known - no_settings == set()


@pytest.mark.parametrize("name", SERVICES)
def test_who_is_waited_for_exists_and_can_become_healthy(name: str):
    waited: dict[str, Any] = SERVICES[name].get("depends_on", {})
    for other, condition in waited.items():
        assert condition == {"condition": "service_healthy"}
        assert "healthcheck" in SERVICES[other]


@pytest.mark.parametrize("name", SERVICES)
def test_volumes_are_declared(name: str):
    assert {volume.split(":")[0] for volume in SERVICES[name].get("volumes", [])} <= VOLUMES


def test_what_the_image_copies_exists_and_is_let_through():
    ignored = (ROOT / "deployments" / "Dockerfile.dockerignore").read_text().splitlines()
    copied = {source for word, *parts in dockerfile() if word == "COPY" for source in parts[:-1]}
    assert copied
    assert {source for source in copied if not (ROOT / source).exists()} == set()
    assert {source for source in copied if f"!{source}" not in ignored} == set()


def test_the_image_does_not_run_as_root():
    assert ["USER", "crew"] in dockerfile()


def test_the_line_that_deploys_is_the_one_of_the_docs():
    (line,) = (part for part in SERVICES["deploy"]["command"] if "deploy --all" in part)
    flat = " ".join(line.split())
    docs = " ".join((ROOT / "docs" / "deployments.md").read_text().replace("\\\n", " ").split())
    assert flat in docs
