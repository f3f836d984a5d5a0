"""The proxy of docs/explanation/security.md before a real Prefect server: people can look, and no secret passes."""

import contextlib
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefect_crew import DeployedCrew, run_crew
from prefect_crew.devserver import CrewServer
from support.deployed import wait_until
from support.nginx import start_nginx
from support.prefect_server import PrefectServer, free_port

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("instant_polling")]


def test_people_look_and_no_secret_or_change_passes(prefect_server: PrefectServer, prefect_api: object, tmp_path: Path):
    token, name = f"token-{uuid.uuid4()}", f"secret-{uuid.uuid4().hex}"
    with CrewServer("echo", token=token) as crew:
        DeployedCrew(url=crew.url, token=token).save(name)
        result = run_crew(name, {"text": "hello"}, idempotency_key=f"key/{name}")
    port = free_port()
    without_tls = {
        "listen 443 ssl": f"listen 127.0.0.1:{port}",
        "prefect.example.com;": "localhost;",
        "ssl_certificate     /etc/ssl/prefect.example.com.pem;": "",
        "ssl_certificate_key /etc/ssl/prefect.example.com.key;": "",
        'auth_basic "Prefect, to look at";': "",
        "auth_basic_user_file /etc/nginx/viewers;": "",
        "http://127.0.0.1:4200": f"http://127.0.0.1:{prefect_server.port}",
    }
    with (
        start_nginx(tmp_path, "../explanation/security.md", without_tls),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client,
    ):

        def ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return client.get("/api/health").status_code == 200
            return False

        wait_until(ready, what="nginx")
        # What people look at.
        (flow_run,) = client.post("/api/flow_runs/filter", json={"limit": 1, "sort": "START_TIME_DESC"}).json()
        assert client.get(f"/api/flow_runs/{flow_run['id']}").json()["name"] == f"{name} · key/{name}"
        assert client.post("/api/flow_runs/count", json={}).json() >= 1
        found = client.post("/api/artifacts/filter", json={"sort": "CREATED_DESC", "limit": 1}).json()
        assert result.kickoff_id in found[0]["data"]
        # What they cannot reach.
        slug, run = "/api/block_types/slug/deployed-crew/block_documents", f"/api/flow_runs/{flow_run['id']}"
        with_secrets = {"include_secrets": True}
        refused: list[tuple[str, str, Any]] = [
            ("POST", "/api/block_documents/filter", with_secrets),
            ("POST", "/api//block_documents/filter", with_secrets),
            ("POST", "/api/block%5Fdocuments/filter", with_secrets),
            ("GET", f"{slug}/name/{name}?include_secrets=true", None),
            ("GET", f"{slug}?include_secrets=true", None),
            ("POST", "/api/variables/filter", {}),
            ("GET", "/api/variables/name/x", None),
            ("POST", f"{run}/input/filter", {"prefix": ""}),
            ("GET", "/api/admin/settings", None),
            ("POST", f"{run}/set_state", {"state": {"type": "CANCELLED"}, "force": True}),
            ("DELETE", run, None),
            ("PATCH", run, {"name": "changed"}),
            ("DELETE", "/api/flow_runs/filter", None),
            ("POST", "/api/events", []),
        ]
        for method, path, body in refused:
            answer = client.request(method, path, json=body)
            assert answer.status_code == 403, (method, path, answer.status_code, answer.text)
            assert token not in answer.text
        # The very first one does give the token away, asked of the server itself.
        asked = {"include_secrets": True, "block_documents": {"name": {"any_": [name]}}}
        open_door = httpx.post(f"{prefect_server.api_url}/block_documents/filter", json=asked, trust_env=False)
        assert token in open_door.text
