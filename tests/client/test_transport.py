"""The client against real servers on loopback: what only a connection can do wrong."""

import asyncio
import contextlib
import gzip
import json
import socket
import ssl
import struct
import threading
import time
import traceback
import tracemalloc
import zlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from prefect_crew.client import _parsing, _transport
from prefect_crew.client._client import CrewClient
from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.exceptions import ConfigurationError, CrewAPIError, CrewConnectionError, ResponseFormatError
from prefect_crew.states import CrewState
from support.frames import locals_of
from support.raw import Handler, answer, answering, raw_server, read_request
from support.waiting import LIMIT, soon, until

TOKEN = "t0ken-0123456789"
STARTED = '{"kickoff_id": "k1"}'
RUNNING = '{"state": "RUNNING", "kickoff_id": "k1", "inputs": []}'


# What becomes of a kickoff


def reset(writer: asyncio.StreamWriter) -> None:
    """Have the connection end with a reset."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def then(sent: bytes = b"", seconds: float = 0.0, end: Callable[[Any], None] = lambda _: None) -> Handler:
    """Return what reads a request, sends something, waits, and ends the connection."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(sent)
        await writer.drain()
        await asyncio.sleep(seconds)
        end(writer)

    return handler


async def plain_http(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@pytest.mark.parametrize(
    ("handler", "at", "sent"),
    [
        pytest.param(then(end=reset), "", True, id="reset"),
        pytest.param(then(answer(STARTED)[:-5]), "", True, id="cut-short"),
        pytest.param(then(seconds=60), "", True, id="no-answer"),
        pytest.param(then(b"220 mail.example.com ESMTP\r\n\r\n"), "", True, id="not-http"),
        pytest.param(then(), "", True, id="dropped"),
        pytest.param(plain_http, "https://127.0.0.1:{port}", False, id="no-tls"),
        pytest.param(plain_http, "https://crew.invalid", False, id="no-such-name"),
        pytest.param(plain_http, "http://127.0.0.1:{free}", False, id="refused"),
    ],
)
async def test_whether_a_kickoff_may_have_started(handler: Handler, at: str, sent: bool):
    async with raw_server(handler) as url:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            url = at.format(port=url.rpartition(":")[2], free=probe.getsockname()[1]) or url
        async with CrewClient(url, TOKEN, request_timeout=1.0 if at == "" else 10.0) as client:
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


async def test_certificates_are_checked(certificate: Path, monkeypatch: pytest.MonkeyPatch):
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    async with raw_server(answering(answer(STARTED)), tls) as url:
        async with CrewClient(url, TOKEN) as client:
            with pytest.raises(CrewConnectionError, match=r"(?i)certificate") as caught:
                await client.kickoff({})
        assert not caught.value.sent
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        async with CrewClient(url, TOKEN) as client:
            assert await client.kickoff({}) == "k1"


def refusing(heads: list[str]) -> Handler:
    """Return a proxy that connects nobody and keeps what it is asked."""

    def refuse(head: str) -> bytes:
        heads.append(head)
        return answer("", "403 Forbidden")

    return answering(refuse)


async def test_a_refusing_proxy_gets_nothing(monkeypatch: pytest.MonkeyPatch):
    heads: list[str] = []
    async with raw_server(refusing(heads)) as url:
        monkeypatch.setenv("HTTPS_PROXY", url)
        async with CrewClient("https://crew.invalid", TOKEN) as client:
            for call in (client.kickoff({}), client.status("k1")):
                with pytest.raises(CrewConnectionError, match="403 Forbidden") as caught:
                    await call
                assert not caught.value.sent
    assert [head.split()[:2] for head in heads] == [["CONNECT", "crew.invalid:443"]] * 2
    assert TOKEN not in "".join(heads)
    monkeypatch.setenv("HTTPS_PROXY", "gopher://u:s3cret@p")
    with pytest.raises(ConfigurationError, match="proxy cannot be used") as refused:
        await CrewClient("https://crew.invalid", TOKEN).__aenter__()
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("crew", "no_proxy", "is_named"),
    [
        ("https://crew.invalid:8443", "other.invalid, crew.invalid:8443", True),
        ("https://crew.invalid:8443", "crew.invalid:9443", False),
        ("https://crew.invalid", "crew.invalid:443", True),
        ("https://crew.invalid:8443", ".invalid", True),
        ("https://[fd00::1]:8443", "fd00::1", True),
    ],
)
async def test_no_proxy_names_a_host_with_or_without_its_port(
    monkeypatch: pytest.MonkeyPatch, crew: str, no_proxy: str, is_named: bool
):
    heads: list[str] = []
    async with raw_server(refusing(heads)) as url:
        monkeypatch.setenv("HTTPS_PROXY", url)
        monkeypatch.setenv("no_proxy", no_proxy)
        async with CrewClient(crew, TOKEN, request_timeout=4) as client:
            with pytest.raises(CrewConnectionError):
                await client.status("k1")
    assert bool(heads) is not is_named


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


class Talking:
    """A server that answers each request with `reply`, then does `after`, and notes the heads of each connection."""

    def __init__(self, reply: bytes = answer(RUNNING), after: bytes | Callable[[Any], None] = b"") -> None:
        self.heads: list[list[str]] = []
        self.gone = self.said_more = 0
        self._reply, self._after = reply, after

    @property
    def connections(self) -> list[int]:
        """The number of requests of each connection."""
        return [len(heads) for heads in self.heads]

    @property
    def paths(self) -> list[list[str]]:
        return [[head.split()[1] for head in heads] for heads in self.heads]

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads = list[str]()
        self.heads.append(heads)
        try:
            while head := await read_request(reader):
                heads.append(head.decode())
                writer.write(self._reply)
                await writer.drain()
                await asyncio.sleep(0.05)
                if callable(self._after):
                    self.said_more += 1
                    return self._after(writer)
                writer.write(self._after)
                self.said_more += 1
        finally:
            self.gone += 1


async def test_a_kickoff_takes_no_idle_connection(monkeypatch: pytest.MonkeyPatch):
    def idle(*, is_long: bool) -> None:
        monkeypatch.setattr(_transport, "POST_KEEPALIVE", 0.0 if is_long else LIMIT)

    crew = Talking()
    # A client among others: they share connections.
    async with raw_server(crew) as url, CrewClient(url, TOKEN) as other, CrewClient(url, TOKEN) as client:
        await client.inputs()
        idle(is_long=False)
        await client.kickoff({})
        await other.status("k1")
        idle(is_long=True)
        await client.kickoff({})
        idle(is_long=False)
        await client.kickoff({})  # of two connections, it takes the one just used
        idle(is_long=True)
        with pytest.raises(ConfigurationError):
            await client.status("a" * 70_000)  # makes no URL, and so makes no connection fresh
        await client.kickoff({})
    assert crew.paths == [["/inputs", "/kickoff", "/status/k1"], ["/kickoff", "/kickoff"], ["/kickoff"]]


async def test_open_clients_share_connections():
    crew = Talking()

    async def ask(token: str = TOKEN) -> None:
        async with CrewClient(url, token) as client:
            await client.inputs()

    async with raw_server(crew) as url:
        async with CrewClient(url, TOKEN):
            for token in (TOKEN, TOKEN, "another-token"):
                await ask(token)
        tokens = [[head.partition("Bearer ")[2].split()[0] for head in heads] for heads in crew.heads]
        assert tokens == [[TOKEN, TOKEN, "another-token"]], "each request has its own token"
        await ask()
        await ask()
        assert len(crew.heads) == 3, "closed with the last one"


async def test_idle_connections_are_closed_once_they_are_old(monkeypatch: pytest.MonkeyPatch):
    server = Talking()
    async with raw_server(server) as url, CrewClient(url, TOKEN) as client:
        await client.status("k1")
        await client.status("k1")
        assert server.connections == [2]
        monkeypatch.setattr(_transport, "POLL_KEEPALIVE", 0.0)
        await asyncio.gather(*(client.status("k1") for _ in range(10)))
        assert len(server.connections) == 11
        await client.status("k1")
        await until(lambda: server.gone >= 10)


async def test_a_request_that_outlives_all_clients_closes_its_connection():
    server = Talking()
    async with raw_server(server) as url:
        async with CrewClient(url, TOKEN) as client:
            polling = asyncio.ensure_future(client.status("k1"))
            await until(lambda: server.heads)
        await polling
        await until(lambda: server.gone)


TWICE = answer(RUNNING) + answer('{"state": "SUCCESS", "kickoff_id": "k2"}')


@pytest.mark.parametrize("call", ["status", "kickoff"])
@pytest.mark.parametrize(
    ("server", "has_proxy"),
    [
        pytest.param(lambda: Talking(after=lambda _: None), False, id="closed"),
        pytest.param(lambda: Talking(after=reset), False, id="reset"),
        pytest.param(lambda: Talking(after=answer("", "408 Request Timeout")), False, id="said-more"),
        pytest.param(lambda: Talking(TWICE), False, id="two-answers"),
        pytest.param(lambda: Talking(TWICE), True, id="two-answers-of-a-proxy"),
    ],
)
async def test_a_connection_on_which_the_server_said_more_is_left(
    monkeypatch: pytest.MonkeyPatch, server: Callable[[], Talking], has_proxy: bool, call: str
):
    """A request must not take an earlier word of the server for its answer."""
    talking = server()
    async with raw_server(talking) as url:
        if has_proxy:
            monkeypatch.setenv("http_proxy", url)
            url = "http://crew.test"
        async with CrewClient(url, TOKEN, allow_http=True) as client:
            for number in range(1, 4):
                if call == "status":
                    assert (await client.status("k1")).state is CrewState.RUNNING
                else:
                    assert await client.kickoff({}) == "k1"
                await until(lambda number=number: talking.said_more == number)
                await asyncio.sleep(0.05)  # it arrives
    assert talking.connections == [1, 1, 1]


async def test_a_cancelled_client_closes_all_its_connections():
    server = Talking()
    async with raw_server(server) as url:
        with anyio.CancelScope() as scope:  # cancels at each await, as Prefect's timeout does
            async with CrewClient(url, TOKEN) as client:
                await asyncio.gather(*(client.status("k1") for _ in range(3)))
                scope.cancel()
                await asyncio.sleep(1)
        await until(lambda: server.gone == 3)


async def test_a_word_that_came_while_the_loop_was_busy_is_no_answer():
    listener, said_more = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def serve() -> None:
        """Answer one request of each connection, and say more a little later; in a thread, since the loop is busy."""
        for number in range(2):
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.sendall(answer(json.dumps({"kickoff_id": f"{number}"})))
            time.sleep(0.1)
            connection.sendall(answer(json.dumps({"kickoff_id": "stray"})))
            said_more.set()

    threading.Thread(target=serve, daemon=True).start()
    async with CrewClient(f"http://127.0.0.1:{listener.getsockname()[1]}", TOKEN) as client:
        ids = [await client.kickoff({})]
        said_more.wait(LIMIT)
        ids.append(await client.kickoff({}))
    listener.close()
    assert ids == ["0", "1"]


async def test_a_cancelled_request_closes_its_connection_and_shows_no_token():
    silent = Talking(reply=b"")
    async with raw_server(silent) as url, CrewClient(url, TOKEN) as client:
        task = asyncio.ensure_future(client.status("k1"))
        await until(lambda: silent.connections == [1])
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert_quiet(caught.value)
        await until(lambda: silent.gone)


# Answers of any size and encoding


@pytest.mark.parametrize("status", ["200 OK", "500 Oops"])
async def test_the_rest_of_an_answer_is_not_taken_for_the_next_one(monkeypatch: pytest.MonkeyPatch, status: str):
    monkeypatch.setattr(_transport, "MAX_BODY", 200_000)
    server = Talking(answer("x" * 3_000_000, status))
    async with raw_server(server) as url, CrewClient(url, TOKEN) as client:
        for _ in range(2):
            with pytest.raises(CrewAPIError if "500" in status else ResponseFormatError):
                await client.status("k1")
    assert server.connections == [1, 1]


def trickling(start: bytes, piece: bytes, pause: float = 0.05) -> Handler:
    """Return a server that sends a start, an error's for `/inputs`, and then a piece without end."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_good = b"/inputs" not in await read_request(reader)
        writer.write(start if is_good else start.replace(b"200 OK", b"500 Oops"))
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)

    return handler


def encoded(body: bytes, coding: str) -> Handler:
    def reply(head: str) -> bytes:
        return answer(body, "500 Oops" if "/inputs" in head else "200 OK", f"Content-Encoding: {coding}\r\n")

    return answering(reply)


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_a_compressed_answer_is_read(coding: str, pack: Callable[[bytes], bytes]):
    body = pack(b'{"state": "RUNNING", "detail": "too many crews"}')
    async with raw_server(encoded(body, coding)) as url, CrewClient(url, TOKEN) as client:
        assert (await client.status("k1")).state is CrewState.RUNNING
        with pytest.raises(CrewAPIError, match="too many crews"):
            await client.inputs()


ENDLESS = trickling(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 1024**2, pause=0)
BOMB = gzip.compress(b" " * (_transport.MAX_BODY + 1), compresslevel=1)


@pytest.mark.parametrize(
    ("handler", "problem"),
    [
        pytest.param(ENDLESS, "more than 64 MiB", id="endless"),
        pytest.param(encoded(b"plain", "gzip"), "an encoding that cannot be read", id="not-gzip"),
        pytest.param(encoded(gzip.compress(RUNNING.encode())[:-12], "gzip"), "the status of this run", id="cut-short"),
        pytest.param(encoded(b"packed", "br"), "an encoding that cannot be read", id="another"),
        pytest.param(encoded(gzip.compress(BOMB), "gzip, gzip"), "an encoding that cannot be read", id="twice"),
        pytest.param(encoded(BOMB, "gzip"), "more than 64 MiB", id="bomb"),
    ],
)
async def test_an_answer_of_a_wrong_size_or_encoding(handler: Handler, problem: str):
    async with raw_server(handler) as url, CrewClient(url, TOKEN) as client:
        tracemalloc.start()
        with pytest.raises(ResponseFormatError, match=problem) as caught:
            await client.status("k1")
        assert tracemalloc.get_traced_memory()[1] < 3 * _transport.MAX_BODY
        tracemalloc.stop()
        with pytest.raises(CrewAPIError) as failed:
            await client.inputs()
    assert caught.value.status_code == 200
    assert caught.value.kickoff_id == "k1"
    assert len(failed.value.body) < 600


async def test_a_large_answer_is_parsed_in_a_thread(monkeypatch: pytest.MonkeyPatch):
    threads: list[int] = []
    decode = _parsing.decode

    def seen(text: str) -> object:
        threads.append(threading.get_ident())
        return decode(text)

    monkeypatch.setattr(_parsing, "decode", seen)
    for text in ("x", "Lisbon – لشبونة " * (10 * 1024**2 // 24)):
        body = json.dumps({"state": "SUCCESS", "result": text}, ensure_ascii=False)
        async with raw_server(answering(answer(body))) as url, CrewClient(url, TOKEN) as client:
            assert (await client.status("k1")).output == text
    small, large = threads
    assert small == threading.get_ident() != large


async def test_an_endless_answer_ends_the_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_transport, "GET_DEADLINE", 2)
    endless = (  # a head, answers before the answer, a body
        trickling(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x"),
        trickling(b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
        trickling(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
    )
    async with contextlib.AsyncExitStack() as running:
        calls: list[Awaitable[object]] = []
        for handler in endless:
            url = await running.enter_async_context(raw_server(handler))
            # Not shorter: a busy machine connects late.
            client = await running.enter_async_context(CrewClient(url, TOKEN, request_timeout=2))
            calls += [client.status("k1"), client.kickoff({"topic": "Lisbon"})]
        errors = await asyncio.gather(*map(soon, calls), return_exceptions=True)
    for error in errors:
        with pytest.raises(CrewConnectionError, match="not complete after 4 s") as caught:
            raise cast("BaseException", error)
        assert kickoff_fate(caught.value) is KickoffFate.UNCERTAIN
        assert_quiet(caught.value)
