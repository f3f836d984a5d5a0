"""The only way this package calls a crew."""

from __future__ import annotations

import asyncio
import functools
import json
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import anyio
import httpx
from pydantic import SecretStr

from prefect_crew.client import _transport
from prefect_crew.client._parsing import (
    parse_error,
    parse_inputs,
    parse_kickoff,
    parse_resume,
    parse_status,
    parse_stop,
    shown,
)
from prefect_crew.client._retry_safety import post_deadline
from prefect_crew.client._transport import Answer, Wire
from prefect_crew.client.inputs import encode_inputs, is_uuid
from prefect_crew.client.models import CrewInput, CrewStatus, ResumeAnswer, StopAnswer
from prefect_crew.client.redaction import Redactor, withheld
from prefect_crew.client.webhooks import Webhooks
from prefect_crew.exceptions import (
    AuthenticationError,
    ConfigurationError,
    CrewAPIError,
    CrewConnectionError,
    InvalidCallError,
    InvalidInputsError,
    NotFoundError,
    RateLimitedError,
    ResponseFormatError,
    ServerError,
)
from prefect_crew.states import CrewState

T = TypeVar("T")


@dataclass(frozen=True)
class _Call:
    """One call, as its errors tell of it; `secrets` are texts that they must not tell.

    What is sent stands here and in no local variable: error reporters show those of every frame.
    """

    method: str
    path: str
    kickoff_id: str | None = None
    secrets: tuple[str, ...] = field(default=(), repr=False)
    content: bytes | None = field(default=None, repr=False)
    before_sending: Callable[[], None] | None = field(default=None, repr=False)


_STATUS_PATHS = ("/status/{id}", "/{id}/status")
_HEALTHY = re.compile(r"\A[^<]*\bhealthy\b", re.IGNORECASE)
_POLL_KEEPALIVE = 60.0
"""Seconds that an idle connection is kept for the next poll: longer than the longest usual interval."""
_ONCE_KEEPALIVE = 1.0
"""Seconds that one is kept for the next kickoff or resume.

A server may close an idle connection at the very moment at which a request goes out on it. The next poll mends that for
a poll; a kickoff would be uncertain for nothing. Servers wait five seconds and more, so one second is safe, and still
spares a burst of kickoffs the handshakes.
"""


class CrewClient:
    """Calls one deployed crew. Needs no Prefect.

        async with CrewClient("https://my-crew.example.com", token) as client:
            kickoff_id = await client.kickoff({"topic": "Lisbon"})
            status = await client.status(kickoff_id)

    Nothing is retried here, and redirects are not followed: the token would go with them. One client belongs to one
    event loop. Proxies and CAs come from the environment as httpx reads it, or from `proxy` and `verify`. Loopback is
    asked through a proxy only where `proxy` is given, and plain http through one only with `allow_http`.

    Args:
        url: The crew's base URL. Plain http is refused beyond loopback.
        token: The crew's bearer token.
        request_timeout: Seconds that the server may be silent. Connecting gets half of that, 10 at most. A whole GET
            gets ten times that, a whole POST `certainty.post_deadline`; a POST that took longer counts as sent.
        allow_http: Allow plain http beyond loopback: the token then crosses the network in plain text.
        inputs_as_json: Send inputs as JSON values rather than as the text that the API documents.
        verify: True, False, an SSL context, or the path of a file or folder of CA certificates.
        proxy: The URL of a proxy, in place of the environment's.
        transport: How requests are carried, in place of the network. Not closed by this client.

    Every method raises, besides what it names itself:
        AuthenticationError: 401 or 403.
        RateLimitedError, ServerError: 429 and 5xx, with `retry_after` in seconds where the server asks for it.
        CrewAPIError: Any other status that is an error, a redirect too.
        CrewConnectionError: No answer; `sent` is False only where the request surely did not leave.
        ResponseFormatError: An answer that is none of the known shapes, larger than 64 MiB, or of more
            than two million lists and objects.
        ConfigurationError: URL, token, id or inputs cannot be used. Nothing was sent.
    """

    def __init__(
        self,
        url: str,
        token: str | SecretStr,
        *,
        request_timeout: float = 30.0,
        allow_http: bool = False,
        inputs_as_json: bool = False,
        verify: ssl.SSLContext | str | bool = True,
        proxy: str | httpx.Proxy | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if not request_timeout > 0:
            raise ConfigurationError(f"The request timeout is {request_timeout!r} seconds; it must be more than 0.")
        self.url = _transport.checked_url(url, allow_http=allow_http)
        self.request_timeout = request_timeout
        self.inputs_as_json = inputs_as_json
        self._token = _transport.checked_token(token)
        self._verify = verify
        self._allow_http = allow_http
        self._proxy = proxy
        self._transport = transport
        self._polls: Wire | None = None
        self._once: Wire | None = None
        self._status_path: str | None = None

    def __repr__(self) -> str:
        return f"CrewClient({self.url!r})"

    async def __aenter__(self) -> CrewClient:
        if self._polls is not None:
            raise InvalidCallError("This CrewClient is open already: open another one.")
        self._polls = self._open(_POLL_KEEPALIVE)
        self._once = self._open(_ONCE_KEEPALIVE)
        return self

    async def __aexit__(self, *_: object) -> None:
        wires, self._polls, self._once = (self._polls, self._once), None, None
        for wire in filter(None, wires):
            await wire.aclose()

    def _open(self, keepalive: float) -> Wire:
        return Wire(
            self.url,
            self._token,
            timeout=self.request_timeout,
            keepalive=keepalive,
            verify=self._verify,
            proxy=self._proxy,
            transport=self._transport,
            allow_http=self._allow_http,
        )

    async def inputs(self) -> list[CrewInput]:
        """Return the inputs that the crew names.

        Raises:
            NotFoundError: The crew's server has no `/inputs`, or there is no crew at this URL.
        """
        call = _Call("GET", "/inputs")
        return await self._parsed(call, await self._send(call), parse_inputs)

    async def kickoff(
        self,
        inputs: Mapping[str, Any],
        *,
        meta: Mapping[str, Any] | None = None,
        webhooks: Webhooks | None = None,
        restore_from: str | None = None,
        secrets: Sequence[str] = (),
        before_sending: Callable[[], None] | None = None,
    ) -> str:
        """Start a run, which is a purchase, and return its id. `certainty.kickoff_fate` reads what this raises.

        `meta` is any JSON object; webhooks bring it back. `restore_from` is the id of a state of a Flow, a UUID, that
        the run starts from; the API takes one that it does not know for none. `secrets` are texts that no error may
        show, in case the server's answer repeats what it was sent; the webhooks' own secrets are among them anyway.
        `before_sending` is called once there is a connection, right before the first byte. What it raises is raised,
        and nothing was sent.

        Raises:
            InvalidInputsError: 400 or 422; `missing_inputs` where the server says which.
        """
        call = replace(self._kickoff(inputs, meta, webhooks, restore_from, secrets), before_sending=before_sending)
        del inputs, meta, webhooks, secrets
        answer = await self._send(call)
        if answer.status in (400, 422):
            self._refuse(call, answer, InvalidInputsError)
        return await self._parsed(call, answer, parse_kickoff)

    def _kickoff(
        self,
        inputs: Mapping[str, Any],
        meta: Mapping[str, Any] | None,
        webhooks: Webhooks | None,
        restore_from: str | None,
        secrets: Sequence[str],
    ) -> _Call:
        try:
            body: dict[str, Any] = {"inputs": encode_inputs(inputs, as_json=self.inputs_as_json)}
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"{error} Nothing was started.") from None
        if restore_from is not None:
            if not is_uuid(restore_from):
                raise ConfigurationError("The state to restore is named by a UUID. Nothing was started.")
            body["restoreFromStateId"] = restore_from
        if meta is not None:
            body["meta"] = dict(meta)
        body.update(webhooks.for_kickoff() if webhooks else {})
        hidden = (*secrets, *(webhooks.secrets() if webhooks else ()))
        return _Call("POST", "/kickoff", secrets=hidden, content=_encoded(body))

    async def status(self, kickoff_id: str) -> CrewStatus:
        """Return where a run stands. A 404 is a status too: CrewState.UNKNOWN.

        Servers differ in the path. Both are asked until one has told of a run; that one is then used for this client's
        life.
        """
        encoded = _transport.segment(kickoff_id, what="kickoff id")
        text = ""
        for template in (self._status_path,) if self._status_path else _STATUS_PATHS:
            call = _Call("GET", template.replace("{id}", encoded), kickoff_id)
            answer = await self._send(call)
            if answer.status not in (404, 405):
                status = await self._parsed(call, answer, lambda body: parse_status(body, kickoff_id))
                self._status_path = template
                return status
            text = self._without_token(call, answer.text)
        facts = parse_error(404, {}, text)
        return CrewStatus(
            kickoff_id=kickoff_id, state=CrewState.UNKNOWN, message=facts.message or facts.title, raw=facts.raw
        )

    async def resume(
        self, kickoff_id: str, task_id: str, feedback: str, approve: bool, *, webhooks: Webhooks | None = None
    ) -> ResumeAnswer:
        """Answer for a person: `approve` the output of task `task_id`, or have it done again with `feedback`.

        Give the webhooks of the kickoff again: the server does not carry them over. Like a kickoff, this is not safe to
        send twice.

        Raises:
            NotFoundError: No such run or task.
            CrewAPIError: 400: the run does not wait for a person.
        """
        _transport.segment(kickoff_id, what="kickoff id")
        body = {
            "execution_id": kickoff_id,
            "task_id": task_id,
            "human_feedback": feedback,
            "is_approve": approve,
            **(webhooks.for_resume() if webhooks else {}),
        }
        hidden = tuple(webhooks.secrets()) if webhooks else ()
        call = _Call("POST", "/resume", kickoff_id, hidden, _encoded(body))
        del feedback, body, hidden, webhooks
        return await self._parsed(call, await self._send(call), parse_resume)

    async def stop(self, kickoff_id: str) -> StopAnswer:
        """Ask the server to stop a run, and return what came of it. `/stop` is not documented and may be missing.

        A run that has ended, a run that is not known and a missing `/stop` are outcomes, not errors.
        """
        call = _Call("POST", f"/stop/{_transport.segment(kickoff_id, what='kickoff id')}", kickoff_id)
        answer = await self._send(call)
        return await _apart(answer, lambda: self._stopped(call, answer, kickoff_id))

    def _stopped(self, call: _Call, answer: Answer, kickoff_id: str) -> StopAnswer:
        def parse(_: bytes) -> StopAnswer | None:
            return parse_stop(self._without_token(call, answer.text), kickoff_id, answer.status)

        found = self._shaped(call, answer, parse)
        if found is None:
            self._refuse(call, answer)
        # Of this answer nothing but its outcome is of use, so it is masked where the others are given as they are.
        words = {name: said and withheld(said) for name in ("message", "raw_state") if (said := getattr(found, name))}
        text = self._without_token(call, answer.text)
        return found.model_copy(update={**words, "raw": found.raw if withheld(text) == text else None})

    async def health(self) -> bool:
        """Return whether `GET /` says that the server is healthy. A page of something else does not say so.

        Raises only AuthenticationError and CrewConnectionError.
        """
        call = _Call("GET", "/")
        try:
            answer = await self._send(call)
        except ResponseFormatError:
            return False
        if answer.status in (401, 403):
            self._refuse(call, answer)
        return 200 <= answer.status < 300 and _HEALTHY.search(answer.body[:1000].decode("utf-8", "replace")) is not None

    async def _send(self, call: _Call) -> Answer:
        wire = self._polls if call.method == "GET" else self._once
        if wire is None:
            raise InvalidCallError("This CrewClient is not open: use it in `async with CrewClient(…) as client`.")
        try:
            return await self._exchange(wire, call)
        except httpx.InvalidURL:
            raise ConfigurationError(f"{call.method} {call.path[:100]}… makes no URL. Check the id.") from None
        except (httpx.HTTPError, OSError) as error:
            # What came instead of HTTP is the server's own text, and may repeat what it was sent.
            theirs = isinstance(error, httpx.RemoteProtocolError)
            cause = _transport.quiet(error, functools.partial(self._redacted if theirs else self._without_token, call))
            reason, may_have_left = _transport.told(cause)
            raise CrewConnectionError(
                method=call.method,
                url=f"{self.url}{call.path}",
                reason=reason,
                sent=may_have_left,
                kickoff_id=call.kickoff_id,
            ) from cause

    async def _exchange(self, wire: Wire, call: _Call) -> Answer:
        """Send a request and read its answer, within the one deadline of the whole call."""
        seconds = _transport.GET_DEADLINE * self.request_timeout
        if call.method == "POST":
            seconds = post_deadline(self.request_timeout)
        # httpx's timeouts count between two pieces; a head, 1xx answers and a body may come in any number of pieces.
        with anyio.move_on_after(seconds):
            response = await wire.send(call.method, call.path, call.content, call.before_sending)
            try:
                return await _transport.read_answer(response, kickoff_id=call.kickoff_id)
            finally:
                await response.aclose()
        raise httpx.ReadTimeout(f"the answer was not complete after {seconds:g} s")

    def _without_token(self, call: _Call, text: str) -> str:
        return Redactor(call.secrets, tokens=[self._token.get_secret_value()])(text)

    def _redacted(self, call: _Call, text: str) -> str:
        """Return what may be told of a text that the server has sent."""
        return withheld(self._without_token(call, text))

    async def _parsed(self, call: _Call, answer: Answer, parse: Callable[[bytes], T]) -> T:
        """Return the model of a 2xx, or raise the error that the status means."""
        if not 200 <= answer.status < 300:
            self._refuse(call, answer)
        return await _apart(answer, lambda: self._shaped(call, answer, parse))

    def _shaped(self, call: _Call, answer: Answer, parse: Callable[[bytes], T]) -> T:
        try:
            return parse(answer.body)
        except ResponseFormatError as error:
            expected = error.expected
        # From the whole body, not from the excerpt in that error: half a secret would not be found any more.
        body = shown(self._redacted(call, answer.text))
        raise ResponseFormatError(expected=expected, body=body, status_code=answer.status, kickoff_id=call.kickoff_id)

    def _refuse(self, call: _Call, answer: Answer, kind: type[CrewAPIError] | None = None) -> NoReturn:
        """Raise the error for an answer that is none of 2xx."""
        facts = parse_error(answer.status, answer.headers, self._redacted(call, answer.text))
        title, message = facts.title, facts.message
        if 300 <= answer.status < 400:
            title, message = "A redirect, not followed", _redirection(answer)
        told: dict[str, Any] = {
            "status_code": answer.status,
            "method": call.method,
            "path": f"{urlsplit(self.url).path}{call.path}",
            # Once more: what was escaped in the body is plain now.
            "title": title and self._redacted(call, title),
            "message": message and self._redacted(call, message),
            "body": facts.body,
            "kickoff_id": call.kickoff_id,
        }
        kind = kind or _kind(answer.status)
        if issubclass(kind, InvalidInputsError):
            told["missing_inputs"] = [self._redacted(call, name) for name in facts.missing_inputs]
        elif issubclass(kind, (RateLimitedError, ServerError)):
            told["retry_after"] = facts.retry_after
        raise kind(**told)


async def _apart(answer: Answer, work: Callable[[], T]) -> T:
    """Return what `work` makes of an answer; of a large one in a thread, so that all else goes on meanwhile."""
    return await asyncio.to_thread(work) if len(answer.body) > _transport.AT_ONCE else work()


def _kind(status: int) -> type[CrewAPIError]:
    if status in (401, 403):
        return AuthenticationError
    if status == 404:
        return NotFoundError
    if status == 429:
        return RateLimitedError
    return ServerError if 500 <= status < 600 else CrewAPIError


def _redirection(answer: Answer) -> str:
    """Return where a redirect leads, without a query, which may hold what is not for everyone."""
    try:
        target = urlsplit(answer.headers.get("location", ""))
    except ValueError:
        return "it leads nowhere that can be read"
    where = f"{target.scheme}://{target.hostname}{target.path}" if target.hostname else target.path or "nowhere"
    return f"it leads to {where}. Give the crew's final URL"


def _encoded(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"The request's body cannot be written as JSON: {type(error).__name__}. Check meta and feedback."
        ) from None
