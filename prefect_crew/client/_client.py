"""`CrewClient`: all calls of this package to a crew go through it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
from pydantic import SecretStr

from prefect_crew._text import EXCERPT, excerpt, listed_names
from prefect_crew.client import _parsing
from prefect_crew.client._transport import (
    AT_ONCE,
    Answer,
    Call,
    Connections,
    checked_token,
    checked_url,
    encoded_id,
    of_run,
    unreadable,
)
from prefect_crew.client.inputs import Inputs, Unshown
from prefect_crew.client.models import CrewInput, CrewStatus, ResumeAnswer, StopAnswer
from prefect_crew.client.redaction import Redactor
from prefect_crew.client.webhooks import Webhooks
from prefect_crew.exceptions import (
    AuthenticationError,
    ConfigurationError,
    CrewAPIError,
    CrewError,
    InvalidInputsError,
)
from prefect_crew.states import CrewState

T = TypeVar("T")

_REFUSED = (
    "Check the bearer token on the Status tab of the crew's page. Each crew has its own, and a User Bearer Token may "
    "do less than the organisation's. To renew a stored crew's token: prefect-crew crews save NAME --overwrite."
)
NOTHING_STARTED = "Nothing was started. To list the crew's inputs, run: prefect-crew inputs CREW."
_ADVICE = {
    401: _REFUSED,
    403: _REFUSED,
    404: "Check the crew's URL, and the id of the run if it names one.",
    429: "No run was started. Try again later, or lower the rate.",
    5: "This is often temporary. Run again with the same idempotency key, which starts no second run. If it lasts, ask "
    "the crew's operators (CrewAI's support for a hosted crew), and give them this whole message.",
}
"""What a person does next, by the status or its first digit."""
_STATUS_PATHS = ("/status/{id}", "/{id}/status")
VERSION_WITHIN = 5.0
"""Seconds that a look at a crew's version may take."""


class CrewClient:
    """Calls one deployed crew. Needs no Prefect.

        async with CrewClient("https://my-crew.example.com", token) as client:
            kickoff_id = await client.kickoff({"topic": "Lisbon"})
            status = await client.status(kickoff_id)

    The client retries nothing, and follows no redirect, since the token would go to the other address. One client
    belongs to one event loop. Proxies and CAs come from the environment; a request to loopback uses no proxy.

    Args:
        url: The crew's base URL. Plain http is refused beyond loopback.
        token: The crew's bearer token.
        request_timeout: Seconds for which the server may send nothing. To connect may take half of these, 10 s at most;
            a whole GET ten times as long, a whole POST twice. A POST that takes longer counts as sent.
        allow_http: Allow plain http beyond loopback. The token then crosses the network in plain text.
        flow: Whether this is a Flow: no input is required, and inputs are sent as JSON values instead of as text.
        transport: An httpx transport that carries requests instead of the network. This client does not close it.

    No error shows the token or the webhooks of a call, even if the server repeats them.

    In addition to its own errors, every call raises:
        AuthenticationError: 401 or 403.
        CrewAPIError: Any other error status, with `retry_after` in seconds if the server asks for it; and a redirect.
        CrewConnectionError: No answer; `sent` is False only if the request was surely not sent.
        ResponseFormatError: An answer in no known format, over 64 MiB, or with over two million lists and objects.
        ConfigurationError: URL, token, id or inputs cannot be used. Nothing was sent.
    """

    def __init__(
        self,
        url: str,
        token: str | SecretStr,
        *,
        request_timeout: float = 30.0,
        allow_http: bool = False,
        flow: bool = False,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if not request_timeout > 0:
            raise ConfigurationError(f"The request timeout is {request_timeout!r} seconds; it must be more than 0.")
        self.url: str = checked_url(url, allow_http=allow_http)
        self.request_timeout: float = request_timeout
        self.flow: bool = flow
        self._token = checked_token(token)
        self._transport = transport
        self._connections: Connections | None = None
        self._status_path: str | None = None
        self._refused_fields = frozenset[str]()

    def __repr__(self) -> str:
        return f"CrewClient({self.url!r})"

    async def __aenter__(self) -> CrewClient:
        if self._connections is not None:
            raise ConfigurationError("This CrewClient is open already. Open another one.")
        self._connections = Connections(
            self.url, token=self._token, timeout=self.request_timeout, transport=self._transport
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        connections, self._connections = self._connections, None
        if connections is not None:
            await connections.aclose()

    async def inputs(self) -> list[CrewInput]:
        """Return the inputs of the crew, from `GET /inputs`. A Flow lists the fields of its state, and needs none.

        Raises:
            CrewAPIError: 404: the crew's server has no `/inputs`, or there is no crew at this URL.
        """
        call = self._call("GET", "/inputs")
        inputs = await self._parsed(call, await self._send(call), "the crew's inputs", _parsing.parse_inputs)
        return [item.model_copy(update={"required": False}) for item in inputs] if self.flow else inputs

    async def version(self) -> str | None:
        """Return a digest of the deployed definition, 16 hexadecimal digits; None if the server does not report it.

        `GET /inspect` is in no OpenAPI. Its source is the AGENTS.md that CrewAI's command line writes into each project
        (crewai-cli 1.15.30). So every error and every answer but a JSON object counts as unknown. Nothing keeps the
        definition, which holds prompts. The call takes at most `VERSION_WITHIN`, and raises nothing.
        """
        call = self._call("GET", "/inspect")
        with contextlib.suppress(CrewError, TimeoutError):
            async with asyncio.timeout(VERSION_WITHIN):
                return await self._parsed(call, await self._send(call), "a definition", _digest_of)
        return None

    async def kickoff(
        self,
        inputs: Mapping[str, Any] | Inputs,
        *,
        meta: Mapping[str, Any] | None = None,
        webhooks: Webhooks | None = None,
        restore_from: str | None = None,
        before_sending: Callable[[], None] | None = None,
    ) -> str:
        """Start a run and return its id. It costs money and cannot be undone.

        `meta` is any JSON object; webhooks contain it. `restore_from` is the id of the Flow state from which the run
        starts, which is the kickoff id of an earlier run; the API ignores an id that it does not know. The client calls
        `before_sending` when it has a connection, right before the first byte. If that raises, the client passes the
        error on and sends nothing.

        Raises:
            InvalidInputsError: 400 or 422. It has `missing_inputs` if the server names them.
        """
        inputs = inputs if isinstance(inputs, Inputs) else Inputs(inputs, as_json=self.flow)
        body: dict[str, Any] = {"inputs": inputs.encoded}
        if meta is not None:
            meta = body["meta"] = Unshown(meta)
        if restore_from is not None:
            body["restoreFromStateId"] = restore_from
        call = self._call("POST", "/kickoff", None, body, webhooks, before_sending=before_sending)
        answer = await self._send(call)
        if answer.status in (400, 422):
            raise self._error(call, answer, InvalidInputsError)
        return await self._parsed(call, answer, "the id of the run that was started", _parsing.parse_kickoff)

    async def status(self, kickoff_id: str) -> CrewStatus:
        """Return the status of a run. For a 404, its state is CrewState.UNKNOWN.

        Servers use `/status/{id}` or `/{id}/status`. The client tries both until one path knows a run, and then uses
        only it.
        """
        encoded, text = encoded_id(kickoff_id), ""
        for template in (self._status_path,) if self._status_path else _STATUS_PATHS:
            call = self._call("GET", template.replace("{id}", encoded), kickoff_id)
            answer = await self._send(call)
            if answer.status not in (404, 405):
                parse = partial(_parsing.parse_status, kickoff_id=kickoff_id)
                status = await self._parsed(call, answer, "the status of this run", parse)
                self._status_path = template
                return status
            text = call.hide(answer.text)
        body, message = _parsing.decode(text), _parsing.parse_error(text)[0]
        return CrewStatus(kickoff_id=kickoff_id, state=CrewState.UNKNOWN, message=message, raw=body)

    async def resume(
        self, kickoff_id: str, task_id: str, feedback: str, approve: bool, *, webhooks: Webhooks | None = None
    ) -> ResumeAnswer:
        """Send a person's answer: `approve` the output of task `task_id`, or have the task done again with `feedback`.

        Pass the kickoff's webhooks again, since the server does not keep them. Like a kickoff, do not send this twice.
        A hosted crew continues under a new id, which the answer has. The documentation and hosted crews name the fields
        differently: this sends both, and once more in one spelling where a server's validation refuses the other.

        Raises:
            CrewAPIError: 404: no such run or task.
            CrewAPIError: 400: the run does not wait for a person.
        """
        encoded_id(kickoff_id)
        body = {"execution_id": kickoff_id, "task_id": task_id, "human_feedback": feedback, "is_approve": approve}
        body |= {"executionId": kickoff_id, "taskId": task_id, "humanFeedback": feedback, "isApprove": approve}
        body |= webhooks.to_json() if webhooks else {}
        del feedback  # error reporters show the local variables of all frames
        answer, call = await self._send_resume(kickoff_id, Unshown(body), webhooks)
        if answer.status == 422 and (refused := _parsing.other_spelling(answer.text)):
            self._refused_fields = refused
            answer, call = await self._send_resume(kickoff_id, Unshown(body), webhooks)
        del body
        return await self._parsed(call, answer, "the answer to a resume", _parsing.parse_resume)

    async def _send_resume(self, kickoff_id: str, body: Unshown, webhooks: Webhooks | None) -> tuple[Answer, Call]:
        known = {name: value for name, value in body.items() if name not in self._refused_fields}
        call = self._call("POST", "/resume", kickoff_id, Unshown(known), webhooks)
        return await self._send(call), call

    async def stop(self, kickoff_id: str) -> StopAnswer:
        """Ask the server to stop a run, and return the outcome. `/stop` is not documented and may be missing.

        An ended run, an unknown run and a missing `/stop` are outcomes, not errors.
        """
        call = self._call("POST", f"/stop/{encoded_id(kickoff_id)}", kickoff_id)
        answer = await self._send(call)
        parse = partial(_parsing.parse_stop, kickoff_id=kickoff_id)
        is_refused = not httpx.codes.is_success(answer.status)
        stop_answer = _parsing.parse_refused_stop(answer.text, kickoff_id, answer.status) if is_refused else None
        stop_answer = stop_answer or await self._parsed(call, answer, "the answer to a stop", parse)
        # Nobody needs the texts of this answer, so they are masked. The texts of other answers are not masked.
        texts = {"message": stop_answer.message, "raw_state": stop_answer.raw_state}
        return stop_answer.model_copy(update={name: text and call.shown(text) for name, text in texts.items()})

    def _call(
        self,
        method: str,
        path: str,
        kickoff_id: str | None = None,
        body: Mapping[str, Any] | None = None,
        webhooks: Webhooks | None = None,
        *,
        before_sending: Callable[[], None] | None = None,
    ) -> Call:
        hide = Redactor(webhooks.secrets() if webhooks else (), tokens=[self._token.get_secret_value()])
        if body is None:
            return Call(method, path, kickoff_id, hide)
        body = Unshown({**body, **(webhooks.to_json() if webhooks else {})})
        try:
            # In one expression, so that no frame has the text: half of a surrogate pair cannot be encoded.
            content = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
            return Call(method, path, kickoff_id, hide, content, before_sending)
        except (TypeError, ValueError, RecursionError) as error:
            problem = type(error).__name__
        raise ConfigurationError(f"The request cannot be written as JSON: {problem}. Check meta and feedback.")

    async def _send(self, call: Call) -> Answer:
        if self._connections is None:
            raise ConfigurationError("This CrewClient is not open. Use it in `async with CrewClient(…) as client`.")
        return await self._connections.exchange(call)

    async def _parsed(self, call: Call, answer: Answer, expected: str, parse: Callable[[Any], T | None]) -> T:
        """Return the model of a 2xx answer, or raise the error for the status."""
        if not httpx.codes.is_success(answer.status):
            raise self._error(call, answer)

        def read() -> T | None:
            return parse(_parsing.decode(answer.text))

        parsed = await asyncio.to_thread(read) if len(answer.body) > AT_ONCE else read()
        if parsed is not None:
            return parsed
        # Mask the whole text first, then cut it: the redactor would not find half a secret.
        body = call.shown(answer.text)[: 4 * EXCERPT]
        raise unreadable(expected, body, answer.status, call.kickoff_id)

    def _error(self, call: Call, answer: Answer, kind: type[CrewAPIError] | None = None) -> CrewAPIError:
        """Return the error for an answer whose status is not 2xx."""
        message, missing = _parsing.parse_error(answer.text)
        if 300 <= answer.status < 400:
            message = f"A redirect to {_redirection(answer)}, not followed. Give the crew's final URL"
        status, missing = answer.status, [*map(call.shown, missing)] if kind is InvalidInputsError else []
        advice = _ADVICE.get(status) or _ADVICE.get(status // 100, "See the crew's page and the answer above.")
        if kind is InvalidInputsError:
            advice = NOTHING_STARTED + (f" Missing inputs: {listed_names(missing)}." if missing else "")
        kind = kind or (AuthenticationError if status in (401, 403) else CrewAPIError)
        body = excerpt(call.shown(answer.text))
        message = call.shown(message or "")
        text = (excerpt(message) or body or "an empty body").rstrip(".")
        path = f"{urlsplit(self.url).path}{call.path}"
        return kind(
            f"{call.method} {path} answered {status}{of_run(call.kickoff_id)}: {text}. {advice}",
            status_code=status,
            message=message,
            body=body,
            kickoff_id=call.kickoff_id,
            retry_after=_parsing.parse_retry_after(answer.headers.get("retry-after")),
            **({"missing_inputs": missing} if missing else {}),
        )


def _redirection(answer: Answer) -> str:
    """Return the target of a redirect without its query, which may contain secrets."""
    try:
        target = urlsplit(answer.headers.get("location", ""))
    except ValueError:
        return "an address that cannot be read"
    return f"{target.scheme}://{target.hostname}{target.path}" if target.hostname else target.path or "nowhere"


def _digest_of(definition: Any) -> str | None:
    """Return a digest of a JSON object that is not empty, None for any other value."""
    if not isinstance(definition, dict) or not definition:
        return None
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:16]
