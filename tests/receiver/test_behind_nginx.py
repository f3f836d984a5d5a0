"""The receiver behind nginx, with the configuration that docs/guides/receive-webhooks.md shows."""

import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from prefect_crew import WaitPolicy, arun_crew
from prefect_crew.devserver import CrewServer
from prefect_crew.receiver.app import create_receiver
from support.deployed import wait_until
from support.nginx import start_nginx
from support.prefect_server import free_port
from support.scripts import script
from support.webhooks import SECRET, events_of, served

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_api")]


async def test_nothing_but_a_report_gets_through_nginx(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl (Debian: apt-get install openssl)")
    self_signed = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout localhost.key -out localhost.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*self_signed.split(), *subject], cwd=tmp_path, check=True)
    port = free_port()
    base = f"https://localhost:{port}"
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "localhost.pem"))
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", f"{base}/crews")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", SECRET)
    async with served(create_receiver(SECRET)) as receiver:
        changes = {
            "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
            "hooks.example.com;": "localhost;",
            "/etc/ssl/hooks.example.com": f"{tmp_path}/localhost",
            "/var/log/nginx": str(tmp_path),
            "http://127.0.0.1:8001": receiver,
        }
        crew = CrewServer(script({"seconds": 1.0, "output": "done"}))
        with start_nginx(tmp_path, "receive-webhooks.md", changes), crew:
            wait_until((tmp_path / "pid").exists, what="nginx")
            # Polling alone would see the end half a minute later.
            wait = WaitPolicy(initial=30, max_interval=30)
            result = await arun_crew(crew.crew(wait=wait), {}, idempotency_key=key)
            assert result.output == "done"
            await events_of(key, prefix="crew.webhook.crew")
            async with httpx.AsyncClient(base_url=base) as client:
                assert (await client.get("/ready")).status_code == 404
                assert (await client.post("/crews/hooks/crew/forged", json={})).status_code == 404
                assert (await client.post("/crews/hooks/crew/forged", content=b" " * 2_000_000)).status_code == 413
                answer = await client.get("/crews/answer/forged.link")
                assert answer.status_code == 404
                assert "does not answer a question" in answer.text
    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert "/ready" in logs
    assert not re.search(r"/(hooks|answer)/\w", logs), "what protects a hook and an answer stands in its URL"
