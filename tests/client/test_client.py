"""The client's requests and what it makes of answers, over a transport without a network."""

import asyncio
import html
import json
import pickle
import re
import traceback
from collections.abc import AsyncIterator, Callable
from typing import Any
from unittest import mock
from urllib.parse import quote

import httpx
import pytest
import respx
from pydantic import SecretStr

import prefect_crew as pc
from prefect_crew.client._client import CrewClient
from prefect_crew.client._retry_safety import BARE_DELAY, KickoffFate, kickoff_delay, kickoff_fate
from prefect_crew.client.redaction import Redactor, withholding
from prefect_crew.client.webhooks import BearerAuth, HumanInputWebhook, Webhooks
from prefect_crew.states import CrewState
from support.frames import locals_of

URL = "https://crew.example.com"
TOKEN = "t0ken-0123456789"


@pytest.fixture
def router() -> Any:
    with respx.mock(base_url=URL, assert_all_called=False) as routes:
        yield routes


@pytest.fixture
async def client(router: respx.MockRouter) -> AsyncIterator[CrewClient]:
    async with CrewClient(URL, TOKEN) as opened:
        yield opened


WEBHOOKS = Webhooks(task="https://hooks.example.com/t", human_input="https://hooks.example.com/h")
STATE = "3f2b8c1e-9d47-4a6b-8f0e-5c1d2a7b9e64"
RUNNING = httpx.Response(200, json={"state": "RUNNING"})


async def test_kickoff_sends_text_or_json_values(router: respx.MockRouter):
    router.post("/kickoff").respond(201, json={"kickoff_id": 7})
    inputs = {"topic": "Лиссабон", "days": 3, "sights": ["a"], "left_out": None}
    for as_json, expected in ((False, {"days": "3", "sights": '["a"]'}), (True, {"days": 3, "sights": ["a"]})):
        async with CrewClient(f"{URL}/", SecretStr(f" {TOKEN}\n"), flow=as_json) as client:
            assert await client.kickoff(inputs, meta={"n": 1}, webhooks=WEBHOOKS, restore_from=STATE) == "7"
        body = {"inputs": {"topic": "Лиссабон", **expected}, "meta": {"n": 1}, "restoreFromStateId": STATE}
        assert json.loads(router.calls.last.request.content) == body | WEBHOOKS.to_json()
    headers = router.calls.last.request.headers
    assert headers["authorization"] == f"Bearer {TOKEN}"
    assert headers["content-type"] == "application/json"
    assert headers["accept-encoding"] == "identity"
    assert headers["user-agent"].startswith("prefect-crew/")


async def test_resume_sends_the_answer_and_webhooks(router: respx.MockRouter, client: CrewClient):
    router.post("/resume").respond(json={"status": "resumed", "message": "ok"})
    answer = await client.resume("k1", "t1", "Shorter", False, webhooks=WEBHOOKS)
    documented = {"execution_id": "k1", "task_id": "t1", "human_feedback": "Shorter", "is_approve": False}
    live = {"executionId": "k1", "taskId": "t1", "humanFeedback": "Shorter", "isApprove": False}
    assert json.loads(router.calls[0].request.content) == documented | live | WEBHOOKS.to_json()
    assert answer.status == "resumed"
    assert answer.message == "ok"
    router.post("/resume").respond(422, json={"detail": "Not pending"})
    with pytest.raises(pc.CrewAPIError, match=r"Not pending.*crew's page") as caught:
        await client.resume("k1", "t1", "", True)
    assert type(caught.value) is pc.CrewAPIError, "it is not about inputs"


@pytest.mark.parametrize(
    ("kickoff_id", "path"),
    [
        ("a/../b", b"/status/a%2F..%2Fb"),
        ("..", b"/status/%2E%2E"),
        (".", b"/status/%2E"),
        ("a?b=c#d", b"/status/a%3Fb%3Dc%23d"),
        ("é %2F", b"/status/%C3%A9%20%252F"),
        ("a\r\nb\x00", b"/status/a%0D%0Ab%00"),
    ],
)
async def test_ids_are_encoded_into_the_path(
    router: respx.MockRouter, client: CrewClient, kickoff_id: str, path: bytes
):
    router.get().mock(RUNNING)
    assert (await client.status(kickoff_id)).kickoff_id == kickoff_id
    assert [call.request.url.raw_path for call in router.calls] == [path]


async def test_a_kickoff_can_be_called_off(router: respx.MockRouter):
    kickoff = router.post("/kickoff").respond(json={"kickoff_id": "k1"})
    announce = mock.Mock(side_effect=[LookupError("not now"), None])
    async with CrewClient(URL, TOKEN, transport=httpx.MockTransport(router.async_handler)) as client:
        with pytest.raises(LookupError, match="not now"):
            await client.kickoff({}, before_sending=announce)
        assert not kickoff.called
        assert await client.kickoff({}, before_sending=announce) == "k1"
    assert announce.call_count == 2


FIRST, SECOND = "/status/k1", "/k1/status"
NOT_FOUND = httpx.Response(404, json={"detail": "Not Found"})


async def test_both_status_paths_are_tried(router: respx.MockRouter, client: CrewClient):
    first = router.get(FIRST).respond(404, json={"error": "Execution not found", "message": "Not yet"})
    second = router.get(SECOND)
    second.side_effect = [NOT_FOUND, httpx.Response(502), NOT_FOUND, RUNNING, RUNNING]
    unknown = await client.status("k1")
    assert unknown.state == CrewState.UNKNOWN
    assert unknown.message == "Not Found"
    assert unknown.raw == {"detail": "Not Found"}
    with pytest.raises(pc.CrewAPIError):  # says nothing of the path
        await client.status("k1")
    states = [(await client.status("k1")).state for _ in range(3)]
    assert states == [CrewState.UNKNOWN, CrewState.RUNNING, CrewState.RUNNING]
    assert first.call_count == 4
    assert second.call_count == 5


@pytest.mark.parametrize(("path", "other", "missing"), [(FIRST, SECOND, 404), (SECOND, FIRST, 405)])
async def test_the_status_path_is_remembered(
    router: respx.MockRouter, client: CrewClient, path: str, other: str, missing: int
):
    rest = router.get(other).respond(missing)
    router.get(path).side_effect = [RUNNING, NOT_FOUND, RUNNING]
    states = [(await client.status("k1")).state for _ in range(3)]
    assert states == [CrewState.RUNNING, CrewState.UNKNOWN, CrewState.RUNNING]
    assert rest.call_count == (path == SECOND)


async def test_version_is_a_digest_of_the_definition(router: respx.MockRouter, client: CrewClient):
    definitions = [{"name": "travel", "tasks": ["plan"]}, {"tasks": ["plan"], "name": "travel"}, {"name": "travel"}]
    others = [
        *(httpx.Response(404, json={"detail": "Not Found"}), httpx.Response(405), httpx.Response(401)),
        *(httpx.Response(500, json={"name": "travel"}), httpx.ConnectError("no route")),
        *(httpx.Response(200, text="<html>Sign in</html>"), httpx.Response(200, json=["travel"])),
        *(httpx.Response(200, json={}), httpx.Response(200)),
    ]
    router.get("/inspect").mock(side_effect=[*(httpx.Response(200, json=body) for body in definitions), *others])
    first, other_order, other = [await client.version() for _ in definitions]
    assert first is not None
    assert first == other_order != other
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert [await client.version() for _ in others] == [None] * len(others)


REDIRECTS = dict.fromkeys((301, 307), "A redirect to nowhere, not followed. Give the crew's final URL")
"""Their message is the client's own: nobody reads the body."""
ANSWERS: list[tuple[int, str | None, type[pc.CrewAPIError], KickoffFate]] = [
    *((status, "3", pc.CrewAPIError, KickoffFate.REFUSED) for status in (402, 409, 413, 499)),
    *((status, "3", pc.InvalidInputsError, KickoffFate.REFUSED) for status in (400, 422)),
    *((status, "3", pc.AuthenticationError, KickoffFate.REFUSED) for status in (401, 403)),
    (404, "3", pc.CrewAPIError, KickoffFate.REFUSED),
    *((429, after, pc.CrewAPIError, KickoffFate.RETRY) for after in (None, "3")),
    *((503, after, pc.CrewAPIError, KickoffFate.RETRY) for after in ("0", "3")),
    *((status, None, pc.CrewAPIError, KickoffFate.UNCERTAIN) for status in (500, 502, 503)),
    *((status, "3", pc.CrewAPIError, KickoffFate.UNCERTAIN) for status in (500, 504)),
    *((status, "3", pc.CrewAPIError, KickoffFate.UNCERTAIN) for status in (*REDIRECTS, 408, 600)),
]


@pytest.mark.parametrize(("status", "after", "kind", "fate"), ANSWERS)
async def test_a_kickoffs_status_becomes_its_error(
    router: respx.MockRouter, client: CrewClient, status: int, after: str | None, kind: type, fate: KickoffFate
):
    headers = {} if after is None else {"retry-after": after}
    router.post("/kickoff").respond(status, json={"error": "Short", "message": "Long"}, headers=headers)
    with pytest.raises(pc.CrewAPIError) as caught:
        await client.kickoff({"a": "b"})
    error = caught.value
    assert type(error) is kind
    assert kickoff_fate(error) == fate
    assert error.status_code == status
    assert str(error).startswith(f"POST /kickoff answered {status}: {REDIRECTS.get(status, 'Short: Long')}. ")
    assert error.retry_after == (None if after is None else float(after))
    # Of any other 5xx nobody knows whether it started a run, whatever time it names.
    delay = BARE_DELAY if after is None else float(after)
    assert kickoff_delay(error) == (delay if fate is KickoffFate.RETRY else None)


@pytest.mark.parametrize(
    ("error", "fate"),
    [
        (pc.InvalidInputsError("no", missing_inputs=["a"], before_kickoff=True), KickoffFate.REFUSED),
        (pc.ConfigurationError("no token"), KickoffFate.REFUSED),
        (pc.ResponseFormatError("no id", body="{}", status_code=200), KickoffFate.UNCERTAIN),
        (pc.KickoffUncertainError("x", idempotency_key="k"), KickoffFate.UNCERTAIN),
        *((kind(), KickoffFate.UNCERTAIN) for kind in (RuntimeError, asyncio.CancelledError, KeyboardInterrupt)),
    ],
    ids=lambda one: type(one).__name__,
)
def test_fate_of_a_kickoff_that_failed_otherwise(error: BaseException, fate: KickoffFate):
    assert kickoff_fate(error) is fate


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("https://sso.example.com/login?next=s3cret", "https://sso.example.com/login"),
        ("/login?s3cret", "/login"),
        ("https://u:s3cret@h.example.com/x", "https://h.example.com/x"),
        ("http://[s3cret", "an address that cannot be read"),
        ("", "nowhere"),
    ],
)
async def test_redirects_are_not_followed(router: respx.MockRouter, client: CrewClient, location: str, shown: str):
    router.get("/inputs").respond(302, headers={"location": location})
    with pytest.raises(pc.CrewAPIError) as caught:
        await client.inputs()
    assert shown in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert len(router.calls) == 1


NOT_SENT = [httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError, httpx.UnsupportedProtocol]
SENT = [httpx.ReadError, httpx.ReadTimeout, httpx.WriteError, httpx.WriteTimeout, httpx.CloseError]
SENT += [httpx.RemoteProtocolError, httpx.LocalProtocolError, httpx.NetworkError, ConnectionResetError, OSError]


@pytest.mark.parametrize("kind", [*NOT_SENT, *SENT], ids=lambda kind: kind.__name__)
async def test_whether_a_request_may_have_left(router: respx.MockRouter, client: CrewClient, kind: type[Exception]):
    router.post("/kickoff").mock(side_effect=kind("why"))
    with pytest.raises(pc.CrewConnectionError, match="why") as caught:
        await client.kickoff({})
    assert caught.value.sent is (kind in SENT)
    assert kickoff_fate(caught.value) is (KickoffFate.UNCERTAIN if kind in SENT else KickoffFate.RETRY)
    assert type(caught.value.__cause__) is kind
    assert str(caught.value).startswith(f"POST {URL}/kickoff got no answer: ")


async def test_what_cannot_be_written_is_never_sent(router: respx.MockRouter, client: CrewClient):
    with pytest.raises(pc.ConfigurationError, match=r"Input 'a'.*Nothing was started"):
        await client.kickoff({"a": b"x"})
    for kickoff_id in ("", "\ud800", "x" * 70_000):
        for call in (client.status(kickoff_id), client.stop(kickoff_id)):
            with pytest.raises(pc.ConfigurationError, match=r"is not a valid id|makes no URL"):
                await call
    for value in (float("nan"), object(), "\ud800"):
        with pytest.raises(pc.ConfigurationError, match="meta") as caught:
            await client.kickoff({"pin": "hunter22"}, meta={"a": value})
        assert "hunter22" not in locals_of(caught.value, but=__file__)
    assert not router.calls


@pytest.mark.parametrize("url", ["http://localhost:8000", "http://127.0.0.1/x", "http://[::1]:1", "https://a.test/p/"])
def test_urls_that_are_taken(url: str):
    assert CrewClient(url, TOKEN).url == url.rstrip("/")
    assert CrewClient("http://crew.example.com", TOKEN, allow_http=True).url == "http://crew.example.com"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        *(({"url": f"http://{host}"}, "allow_http") for host in ("crew.example.com", "127.0.0.1.example.com")),
        *(({"url": f"http://{host}.localhost"}, "allow_http") for host in ("crew", "evil.example.com%2f")),
        *(({"url": url}, "https://") for url in ("", "crew.example.com", "u:s3cret@crew.example.com?s3cret")),
        ({"url": "https://u:s3cret@crew.example.com"}, "credentials"),
        ({"url": "https://crew.example.com?token=s3cret"}, "query"),
        ({"url": "https://crew.example.com#s3cret"}, "fragment"),
        *(({"url": f"https://{host}"}, "is not a valid URL") for host in ("[s3cret", f"{'a' * 64}.example.com")),
        *(({"token": token}, "token") for token in ("", "  ", "two words s3cret", "s3cret\nX-Other: 1", "s3cr\xe9t")),
        *(({"request_timeout": timeout}, "timeout") for timeout in (0, -1, float("nan"))),
    ],
    ids=str,
)
def test_what_no_client_can_be_made_of_is_refused(options: dict[str, Any], says: str):
    with pytest.raises(pc.ConfigurationError, match=says) as caught:
        CrewClient(**{"url": URL, "token": TOKEN, **options})
    assert "s3cr" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


async def test_a_client_is_opened_once_and_used_open():
    client = CrewClient(URL, TOKEN)
    with pytest.raises(pc.ConfigurationError, match="not open"):
        await client.inputs()
    async with client:
        with pytest.raises(pc.ConfigurationError, match="open already"):
            await client.__aenter__()
    with pytest.raises(pc.ConfigurationError, match="not open"):
        await client.kickoff({})


# No error shows what a request held. tests/proof/test_secrets.py looks at logs, the crew database and everything else.

ODD_TOKEN = 't0k"en<&>/\\+0123456789'
INPUT, IN_PATH, IN_HEADER = "1nput-secret", "p4th-secret", "h00k-secret"
HOOKS = Webhooks(
    crew=f"https://hooks.example.com/{IN_PATH}",
    human_input=HumanInputWebhook(
        url="https://hooks.example.com/", authentication=BearerAuth.model_validate({"token": IN_HEADER})
    ),
)
FORMS = (json.dumps(ODD_TOKEN)[1:-1], quote(ODD_TOKEN, safe=""), repr(ODD_TOKEN)[1:-1])
WRITERS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "application/json": lambda text, body: json.dumps(
        {"error": "Bad", "message": text, "detail": [{"msg": f"{text} {body}", "loc": ["x"], "input": body}]}
    ),
    "text/json": lambda text, _: '{"message": "' + "".join(f"\\u{ord(letter):04x}" for letter in text) + '"}',
    "text/plain": lambda text, body: f"{text} {quote(text, safe='')} {body}" * 50,
    "text/html": lambda text, body: f"<html><title>{html.escape(text)} {text} {body}</title></html>",
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("status", [200, 302, 400, 401, 404, 422, 429, 500, 503])
async def test_a_server_that_repeats_requests(status: int, kind: str):
    def repeat(request: httpx.Request) -> httpx.Response:
        text = WRITERS[kind](request.headers["authorization"], json.loads(request.content or "{}"))
        return httpx.Response(status, text=text, headers={"content-type": kind})

    errors: list[pc.CrewError] = []
    with withholding(Redactor([INPUT])):
        async with CrewClient("https://crew.test", ODD_TOKEN, transport=httpx.MockTransport(repeat)) as client:
            assert ODD_TOKEN not in f"{client!r} {client}"
            for call in (
                client.inputs(),
                client.kickoff({"key": INPUT}, webhooks=HOOKS),
                client.status("k1"),
                client.resume("k1", "t1", "f", True, webhooks=HOOKS),
                client.stop("k1"),
            ):
                try:
                    await call
                except pc.CrewError as error:
                    errors.append(error)
    assert errors
    for error in errors:
        trace = "".join(traceback.format_exception(error))
        shown = f"{error!r} {error} {vars(error)} {pickle.dumps(error)!r} {trace}"
        for secret in (ODD_TOKEN, *FORMS, INPUT, IN_PATH, IN_HEADER):
            assert secret not in shown
