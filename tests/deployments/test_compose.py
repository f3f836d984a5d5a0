"""The Compose file that `prefect-crew init` writes, and its Dockerfile, checked without Docker.

What the containers would run is run here, without a container: see test_compose_commands.py.
"""

from __future__ import annotations

import re

import prefect.settings
import pytest
from prefect.settings.legacy import _get_settings_fields

from prefect_crew.settings import CrewSettings
from prefect_crew.worker import HAND_OVER_WITHIN
from support import compose

SERVICES = compose.services()
DOCKERFILE = [line.split() for line in (compose.FOLDER / "Dockerfile").read_text().splitlines() if line]


def test_the_crew_worker_has_a_name_of_its_own_and_time_to_give_its_flow_runs_back():
    service = SERVICES["worker"]
    assert "--name" in service["command"]
    assert "deploy" not in service, "two workers of one name would take each other's flow runs"
    assert int(service["stop_grace_period"].removesuffix("s")) > HAND_OVER_WITHIN


@pytest.mark.parametrize("name", SERVICES)
def test_each_container_has_no_more_rights_than_it_needs_and_a_health_check(name: str):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"] > 0
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
    assert compose.read()["networks"]["database"]["internal"] is True


def test_secrets_are_demanded_stand_in_the_example_and_are_kept_out_of_git_and_the_image():
    for service in SERVICES.values():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|AUTH|ENCRYPTION_KEY|SECRET", variable):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), variable
    asked = set(re.findall(r"\$\{(\w+)", compose.PATH.read_text()))
    example = (compose.FOLDER / ".env.example").read_text()
    assert asked == set(re.findall(r"^(\w+)=$", example, flags=re.MULTILINE))
    assert re.findall(r"^(\w+)=.", example, flags=re.MULTILINE) == ["PREFECT_API_URL"]
    for ignoring in (".gitignore", ".dockerignore"):
        assert ".env" in (compose.FOLDER / ignoring).read_text().splitlines()


@pytest.mark.parametrize("name", sorted(set(SERVICES) - {"postgres"}))
def test_prefect_knows_each_setting(name: str):
    known = set(_get_settings_fields(prefect.settings.Settings))
    known |= {f"PREFECT_INTEGRATIONS_CREW_{field.upper()}" for field in CrewSettings.model_fields}
    no_settings = {"PREFECT_SERVER_ENCRYPTION_KEY"}  # read from the environment by the server itself
    assert set(SERVICES[name]["environment"]) - known - no_settings == set()
