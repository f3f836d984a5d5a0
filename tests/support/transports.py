"""Clients that reach a host, or one answer, without a network."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import httpx

from prefect_crew.client._client import CrewClient


@contextlib.contextmanager
def carried_by(host: str, transport: httpx.AsyncBaseTransport) -> Iterator[None]:
    """Have every CrewClient that is made within for an https URL of this host send its requests over `transport`."""
    make = CrewClient.__init__

    def make_with_transport(client: CrewClient, url: str, *args: Any, **options: Any) -> None:
        if urlsplit(url).hostname == host:
            options["transport"] = transport
        make(client, url, *args, **options)

    with mock.patch.object(CrewClient, "__init__", make_with_transport):
        yield


async def ask(
    call: str, body: bytes, status_code: int = 200, headers: Mapping[str, str] | None = None, run: str = "run-1"
) -> Any:
    """Return what the client makes of an answer to one of its calls."""
    transport = httpx.MockTransport(lambda _: httpx.Response(status_code, content=body, headers=headers))
    async with CrewClient("https://crew.test", "the-token-of-the-crew", transport=transport) as client:
        if call == "inputs":
            return await client.inputs()
        if call == "kickoff":
            return await client.kickoff({})
        if call == "resume":
            return await client.resume(run, "task", "", True)
        return await (client.stop(run) if call == "stop" else client.status(run))
