"""Clients that reach a host without a network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
