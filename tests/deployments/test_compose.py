"""The Compose file that `prefect-crew init` writes, and its Dockerfile, checked without Docker.

What the containers would run is run here, without a container: see test_compose_commands.py.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from prefect_crew.settings import CrewSettings
from prefect_crew.worker import HAND_OVER_WITHIN
from support import compose

SERVICES = compose.services()
OURS = ["server", "deploy", "worker", "receiver"]
VOLUMES = set(compose.read()["volumes"])


def dockerfile() -> list[list[str]]:
    lines = (compose.FOLDER / "Dockerfile").read_text().splitlines()
    return [line.split() for line in lines if line and not line.startswith("#")]


def test_the_services_are_those_of_the_docs():
    assert set(SERVICES) == {"postgres", *OURS}


def test_the_crew_worker_has_a_name_of_its_own_and_time_to_give_its_flow_runs_back():
    service = SERVICES["worker"]
    assert "--name" in service["command"]
    assert "deploy" not in service, "two workers of one name would take each other's flow runs"
    assert int(service["stop_grace_period"].removesuffix("s")) > HAND_OVER_WITHIN


@pytest.mark.parametrize("name", SERVICES)
def test_no_container_writes_to_its_image_or_gains_rights(name: str):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"] > 0
    assert not service.get("privileged", False)


def test_images_have_exact_tags():
    named = [SERVICES["postgres"]["image"], *(line[1] for line in dockerfile() if line[0] == "FROM")]
    assert all(re.fullmatch(r"\w+:\d+\.\d+(\.\d+)?-[\w-]+(@sha256:[0-9a-f]{64})?", image) for image in named)


def test_the_server_alone_reaches_the_database():
    reaching = {name for name, service in SERVICES.items() if "database" in service.get("networks", [])}
    assert reaching == {"postgres", "server"}
    assert SERVICES["postgres"]["networks"] == ["database"]
    assert compose.read()["networks"]["database"]["internal"] is True


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
    example = (compose.FOLDER / ".env.example").read_text()
    assert asked == set(re.findall(r"^(\w+)=$", example, flags=re.MULTILINE))
    assert re.findall(r"^(\w+)=.", example, flags=re.MULTILINE) == ["PREFECT_API_URL"]


def test_git_and_the_image_ignore_the_filled_in_example():
    assert ".env" in (compose.FOLDER / ".gitignore").read_text().splitlines()
    assert ".env" in (compose.FOLDER / ".dockerignore").read_text().splitlines()


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


def test_no_container_runs_as_root():
    assert [line[1] for line in dockerfile() if line[0] == "USER"] == ["crew"]
    assert SERVICES["postgres"]["user"] == "postgres"
    assert [name for name in OURS if "user" in SERVICES[name]] == []
