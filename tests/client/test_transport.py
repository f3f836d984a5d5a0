"""The client against real servers on loopback: what only a connection can do wrong."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import ssl
import struct
import threading
import traceback
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Protocol

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from prefect_crew.client import _parsing, _transport
from prefect_crew.client._client import CrewClient
from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.client._transport import SpreadTransport
from prefect_crew.exceptions import ConfigurationError, CrewConnectionError, ResponseFormatError, ServerError
from support.frames import locals_of
from support.raw import Handler, answer, answering, raw_server, read_request

TOKEN = "t0ken-0123456789"
STARTED = '{"kickoff_id": "k1"}'


class Connect(Protocol):
    """Opens a client."""

    def __call__(self, url: str, **options: Any) -> contextlib.AbstractAsyncContextManager[CrewClient]: ...


@pytest.fixture(params=["client", "batch"])
def connect(request: pytest.FixtureRequest) -> Connect:
    """Open clients that send by the connections which all clients share, or by those of a batch."""

    @contextlib.asynccontextmanager
    async def opened(url: str, **options: Any) -> AsyncIterator[CrewClient]:
        transport = SpreadTransport(url) if request.param == "batch" else None
        async with CrewClient(url, TOKEN, transport=transport, **options) as client:
            yield client
        if transport is not None:
            await transport.aclose()

    return opened


# What becomes of a kickoff


def then(sent: bytes = b"", seconds: float = 0.0, *, reset: bool = False) -> Handler:
    """Return what reads a request, sends something, waits, and closes or resets the connection."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(sent)
        await writer.drain()
        await asyncio.sleep(seconds)
        if reset:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    return handler


async def plain_http(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")


BROKEN = {
    "reset": then(reset=True),
    "cut-short": then(answer(STARTED)[:-5]),
    "no-answer": then(seconds=60),
    "not-http": then(b"220 mail.example.com ESMTP\r\n\r\n"),
}


@pytest.mark.parametrize(
    ("handler", "at", "sent"),
    [
        *(pytest.param(handler, "", True, id=name) for name, handler in BROKEN.items()),
        pytest.param(then(), "", True, id="dropped"),
        pytest.param(plain_http, "https://127.0.0.1:{port}", False, id="no-tls"),
        pytest.param(plain_http, "https://crew.invalid", False, id="no-such-name"),
        pytest.param(plain_http, "http://127.0.0.1:{free}", False, id="refused"),
    ],
)
async def test_whether_a_kickoff_may_have_started(connect: Connect, handler: Handler, at: str, sent: bool):
    async with raw_server(handler) as url:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            url = at.format(port=url.rpartition(":")[2], free=probe.getsockname()[1]) or url
        async with connect(url, request_timeout=1.0 if at == "" else 10.0) as client:
            with pytest.raises(CrewConnectionError) as caught:
                await client.kickoff({"topic": "Lisbon"})
    assert caught.value.sent is sent
    assert kickoff_fate(caught.value) is (KickoffFate.UNCERTAIN if sent else KickoffFate.RETRY)
    assert_quiet(caught.value)


def assert_quiet(error: BaseException) -> None:
    """Neither the traceback nor any local variable in it shows the token."""
    shown = "".join(traceback.TracebackException.from_exception(error).format())
    assert TOKEN not in shown + locals_of(error, but=__file__)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A file with a key and a certificate for 127.0.0.1 that nobody signed but itself."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "prefect-crew tests")])
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path = tmp_path / "both.pem"
    path.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
        + made.sign(key, hashes.SHA256()).public_bytes(pem)
    )
    return path


async def test_certificates_are_checked(connect: Connect, certificate: Path, monkeypatch: pytest.MonkeyPatch):
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    async with raw_server(answering(answer(STARTED)), tls) as url:
        async with connect(url) as client:
            with pytest.raises(CrewConnectionError, match=r"(?i)certificate") as caught:
                await client.kickoff({})
        assert not caught.value.sent
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        async with connect(url) as client:
            assert await client.kickoff({}) == "k1"


def refusing(heads: list[str]) -> Handler:
    """Return a proxy that connects nobody and keeps what it is asked."""

    def refuse(head: str) -> bytes:
        heads.append(head)
        return answer("", "403 Forbidden")

    return answering(refuse)


async def test_a_refusing_proxy_gets_nothing(
    monkeypatch: pytest.MonkeyPatch,
):
    heads: list[str] = []
    async with raw_server(refusing(heads)) as url:
        monkeypatch.setenv("HTTPS_PROXY", url)
        of_batch = SpreadTransport("https://crew.invalid")
        for transport in (None, of_batch):
            async with CrewClient("https://crew.invalid", TOKEN, transport=transport) as client:
                with pytest.raises(CrewConnectionError, match="403 Forbidden") as caught:
                    await client.kickoff({})
            assert not caught.value.sent
        await of_batch.aclose()
    assert [head.split()[:2] for head in heads] == [["CONNECT", "crew.invalid:443"]] * 2
    assert TOKEN not in "".join(heads)
    monkeypatch.setenv("HTTPS_PROXY", "gopher://u:s3cret@p")
    with pytest.raises(ConfigurationError, match="proxy cannot be used") as refused:
        await CrewClient("https://crew.invalid", TOKEN).__aenter__()
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_no_token_for_loopback_goes_to_a_proxy(host: str, monkeypatch: pytest.MonkeyPatch):
    heads: list[str] = []
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with raw_server(refusing(heads)) as url, raw_server(answering(answer(STARTED))) as crew:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, url)
        for allow_http in (False, True):
            async with CrewClient(crew.replace("127.0.0.1", host), TOKEN, allow_http=allow_http) as client:
                assert await client.kickoff({}) == "k1"
    assert heads == []


# Connections that stay open


class Counted:
    """A server that answers everything and notes what came on which of its connections."""

    def __init__(self) -> None:
        self.paths: list[list[str]] = []
        self.tokens: list[list[str]] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        paths, tokens = list[str](), list[str]()
        self.paths.append(paths)
        self.tokens.append(tokens)
        while head := (await read_request(reader)).decode():
            paths.append(head.split()[1])
            tokens.append(head.partition("Bearer ")[2].split()[0])
            writer.write(answer('{"inputs": [], "kickoff_id": "k1", "state": "RUNNING"}'))


@pytest.mark.parametrize("way", ["one run", "idle", "many", "failed"])
async def test_a_kickoff_takes_no_idle_connection(way: str):
    crew = Counted()
    # A client among others: they share connections.
    async with raw_server(crew) as url, CrewClient(url, TOKEN) as other, CrewClient(url, TOKEN) as client:
        if way == "one run":
            await client.inputs()
            await client.kickoff({})
            await asyncio.sleep(1.2)
        await asyncio.gather(*(other.status("k1") for _ in range(2 if way == "many" else 1)))
        if way in ("one run", "idle", "failed"):
            await asyncio.sleep(1.2)
        if way == "failed":
            with pytest.raises(ConfigurationError):
                await client.status("a" * 70_000)  # makes no URL, and so takes no connection
        await client.kickoff({})
    assert crew.paths[-1] == ["/kickoff"]
    assert way != "one run" or crew.paths == [["/inputs", "/kickoff", "/status/k1"], ["/kickoff"]]


async def test_open_clients_share_connections():
    crew = Counted()

    async def ask(token: str = TOKEN) -> None:
        async with CrewClient(url, token) as client:
            await client.inputs()

    async with raw_server(crew) as url:
        async with CrewClient(url, TOKEN):
            for token in (TOKEN, TOKEN, "another-token"):
                await ask(token)
        assert crew.tokens == [[TOKEN, TOKEN, "another-token"]], "each request has its own token"
        await ask()
        await ask()
        assert len(crew.paths) == 3, "closed with the last one"


# Answers of any size and encoding


async def test_memory_for_an_answer_is_bounded(connect: Connect):
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        code = b"500 Oops" if b"/inputs" in await read_request(reader) else b"200 OK"
        writer.write(b"HTTP/1.1 " + code + b"\r\n\r\n")
        while True:
            writer.write(b" " * 1024**2)
            await writer.drain()

    async with raw_server(endless) as url, connect(url) as client:
        tracemalloc.start()
        with pytest.raises(ResponseFormatError, match="more than 64 MiB") as caught:
            await client.status("k1")
        assert tracemalloc.get_traced_memory()[1] < 3 * _transport.MAX_BODY
        tracemalloc.stop()
        with pytest.raises(ServerError) as failed:
            await client.inputs()
    assert (caught.value.status_code, caught.value.kickoff_id) == (200, "k1")
    assert len(failed.value.body) < 600


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_a_compressed_answer_is_read(coding: str, pack: Callable[[bytes], bytes]):
    heads: list[str] = []

    def packed(head: str) -> bytes:
        heads.append(head)
        body, status = (STARTED, "200 OK") if "/kickoff" in head else ('{"detail": "too many crews"}', "500 Oops")
        return answer(pack(body.encode()), status, f"Content-Encoding: {coding}\r\n")

    async with raw_server(answering(packed)) as url, CrewClient(url, TOKEN) as client:
        assert await client.kickoff({}) == "k1"
        with pytest.raises(ServerError, match="too many crews"):
            await client.inputs()
    assert all("accept-encoding: identity" in head.lower() for head in heads)


BOMB = gzip.compress(b" " * (_transport.MAX_BODY + 1), compresslevel=1)


@pytest.mark.parametrize(
    ("body", "coding", "problem"),
    [
        pytest.param(b"plain", "gzip", "an encoding that cannot be read", id="not-gzip"),
        pytest.param(gzip.compress(STARTED.encode())[:-12], "gzip", "the id of the run", id="cut-short"),
        pytest.param(b"packed", "br", "an encoding that cannot be read", id="another"),
        pytest.param(gzip.compress(BOMB), "gzip, gzip", "an encoding that cannot be read", id="twice"),
        pytest.param(BOMB, "gzip", "more than 64 MiB", id="bomb"),
    ],
)
async def test_an_answer_that_cannot_be_unpacked(body: bytes, coding: str, problem: str):
    def odd(head: str) -> bytes:
        return answer(body, "500 Oops" if "/inputs" in head else "200 OK", f"Content-Encoding: {coding}\r\n")

    async with raw_server(answering(odd)) as url, CrewClient(url, TOKEN) as client:
        tracemalloc.start()
        with pytest.raises(ResponseFormatError, match=problem) as caught:
            await client.kickoff({})
        assert tracemalloc.get_traced_memory()[1] < 3 * _transport.MAX_BODY
        tracemalloc.stop()
        assert kickoff_fate(caught.value) is KickoffFate.UNCERTAIN
        with pytest.raises(ServerError):
            await client.inputs()
        assert not await client.health()


async def test_a_large_answer_is_parsed_in_a_thread(monkeypatch: pytest.MonkeyPatch):
    threads: list[int] = []
    decode = _parsing.decode

    def seen(body: bytes, *, expected: str) -> object:
        threads.append(threading.get_ident())
        return decode(body, expected=expected)

    monkeypatch.setattr(_parsing, "decode", seen)
    for text in ("x", "Lisbon – لشبونة " * (10 * 1024**2 // 24)):
        body = json.dumps({"state": "SUCCESS", "result": text}, ensure_ascii=False)
        async with raw_server(answering(answer(body))) as url, CrewClient(url, TOKEN) as client:
            assert (await client.status("k1")).output == text
    small, large = threads
    assert small == threading.get_ident() != large


def trickling(start: bytes, piece: bytes) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(start)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.05)

    return handler


@pytest.mark.parametrize(
    "handler",
    [
        pytest.param(trickling(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x"), id="head"),
        pytest.param(trickling(b"", b"HTTP/1.1 102 Processing\r\n\r\n"), id="1xx"),
        pytest.param(trickling(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "), id="body"),
    ],
)
async def test_an_endless_answer_ends_the_call(connect: Connect, monkeypatch: pytest.MonkeyPatch, handler: Handler):
    monkeypatch.setattr(_transport, "GET_DEADLINE", 2)
    async with raw_server(handler) as url, connect(url, request_timeout=2) as client:  # a busy machine connects late
        for call in (client.status("k1"), client.kickoff({"topic": "Lisbon"})):
            with pytest.raises(CrewConnectionError, match="not complete after 4 s") as caught:
                await asyncio.wait_for(call, 30)
            assert kickoff_fate(caught.value) is KickoffFate.UNCERTAIN
            assert_quiet(caught.value)
