"""Connections that clients share."""

from __future__ import annotations

import asyncio

import pytest

from prefect_crew.client._client import CrewClient
from prefect_crew.client._transport import shared_connections
from prefect_crew.exceptions import AuthenticationError


class Counting:
    """A server on loopback that counts its connections, and answers every request with {"inputs": []}."""

    def __init__(self, token: str) -> None:
        self.connections = 0
        self.token = token

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while head := await reader.readuntil(b"\r\n\r\n"):
            known = f"Bearer {self.token}".encode() in head
            body = b'{"inputs": []}'
            line = b"HTTP/1.1 200 OK" if known else b"HTTP/1.1 401 Unauthorized"
            writer.write(line + b"\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


async def ask(url: str, token: str) -> None:
    async with CrewClient(url, token) as client:
        await client.inputs()


@pytest.mark.parametrize("shared", [True, False])
async def test_clients_share_connections_while_that_is_open(shared: bool):
    counting = Counting("a-token-of-enough-letters")
    server = await asyncio.start_server(counting.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        if shared:
            async with shared_connections():
                for _ in range(5):
                    await ask(url, counting.token)
                with pytest.raises(AuthenticationError):
                    await ask(url, "another-token-of-letters")
        else:
            for _ in range(5):
                await ask(url, counting.token)
        assert counting.connections == (1 if shared else 5)
        await ask(url, counting.token)
        assert counting.connections == (2 if shared else 6), "closed with the sharing"
