"""The HTTP side of the dev server: its calls, what it holds, and the answers that faults spoil."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import re
import socket
import struct
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast, get_args

from pydantic import BaseModel, StrictBool, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefect_crew.client.inputs import is_uuid
from prefect_crew.client.webhooks import Webhooks
from prefect_crew.devserver._faults import Fault, Faults
from prefect_crew.devserver._response_formats import FORMATS, FormatName, ResponseFormat
from prefect_crew.devserver._runs import Answer, CrewRuns, Program, Run, is_flow
from prefect_crew.devserver._scripts import CrewScript, ScriptedProgram, ScriptError, load_script, parse_script
from prefect_crew.devserver._webhooks import CALLBACKS, Generation, ReviewWebhook, WebhookSender

CRASH_EXIT_CODE = 86
"""What the process of `serve` exits with when the fault `crash` ends it."""
BODY_LIMIT = 16 * 1024 * 1024
"""Bytes of a request body; larger ones are answered with 413."""

Spec = str | os.PathLike[str] | CrewScript | Program
"""A crew to serve; see `load_program`."""
T = TypeVar("T", bound=BaseModel)


@dataclass
class Counters:
    """What a server was asked, over its whole life, restarts included.

    Attributes:
        requests: Requests by place (inputs, kickoff, status, resume, stop, health), answered or not.
        unauthorized: Requests with a missing or wrong token; they count nowhere else.
        accepted: The kickoffs that started a run: kickoff id to meta.
    """

    requests: Counter[str] = field(default_factory=Counter[str])
    unauthorized: int = 0
    accepted: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def kickoffs(self) -> int:
        """Kickoffs that started a run."""
        return len(self.accepted)

    @property
    def kickoffs_by_key(self) -> Counter[str]:
        """Kickoffs that started a run, by the `idempotency_key` in their meta."""
        metas = [cast("dict[str, Any]", meta) for meta in list(self.accepted.values()) if isinstance(meta, dict)]
        return Counter(str(meta["idempotency_key"]) for meta in metas if "idempotency_key" in meta)


@dataclass
class ServerState:
    """What one server holds.

    Attributes:
        token: The bearer token that requests must carry; it may be replaced while the server runs.
        crews: The runs of each crew, by the name it is mounted at; "" for the only one.
        crash: What the fault `crash` does: end this process at once, without clean-up.
        closing: Set when the server shuts down, so that requests which never answer end.
    """

    token: str = field(repr=False)
    response_format: ResponseFormat
    faults: Faults
    sender: WebhookSender
    crews: dict[str, CrewRuns]
    counters: Counters = field(default_factory=Counters)
    crash: Callable[[], None] = lambda: os._exit(CRASH_EXIT_CODE)
    closing: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def runs(self) -> list[Run]:
        """All runs of all crews, oldest first for each crew."""
        return [run for runs in self.crews.values() for run in runs]

    def open(self) -> None:
        """Begin to run, on this event loop, for the first time or again; see `CrewRuns.open`."""
        self.closing = asyncio.Event()
        self.sender.open()
        for runs in self.crews.values():
            runs.open()

    def abandon(self) -> None:
        """End as a crash would: from now on nothing is sent or finished."""
        self.closing.set()
        for runs in self.crews.values():
            runs.abandon()
        self.sender.abandon()

    async def close(self) -> None:
        """Cancel the runs in flight and the requests that hang, and wait for their end."""
        self.abandon()
        for runs in self.crews.values():
            await runs.close()
        await self.sender.close()


class ServerOptions(TypedDict, total=False):
    """How a server behaves; `create_app` says what each option means."""

    response_format: FormatName
    generation: Generation
    faults: Iterable[Fault | str]
    speed: float
    stop: bool
    max_runs: int | None
    review_webhook: ReviewWebhook | None


def load_program(spec: Spec, *, speed: float = 1.0) -> Program:
    """Return a crew that the server can run.

    Args:
        spec: `module:factory` or `path/to/file.py:factory` for CrewAI code (needs the extra `crewai`), the path of a
            YAML file, its text (several lines), the name of a crew of this package ("echo" or "travel"), a script, or
            a program, which is returned as it is.
        speed: The seconds of a script are divided by it.

    Raises:
        ScriptError: The script is wrong or not there.
        ProgramNotFoundError: CrewAI is not installed, or the factory is not there, or builds no crew.
    """
    if isinstance(spec, CrewScript):
        return ScriptedProgram(spec, speed=speed)
    if not isinstance(spec, (str, os.PathLike)):
        return spec
    text = os.fspath(spec)
    if "\n" in text:
        return ScriptedProgram(parse_script(text), speed=speed)
    if re.fullmatch(r"([A-Za-z_][\w.]*|.+\.py):[A-Za-z_][\w.]*", text) and not Path(text).exists():
        from prefect_crew.devserver._crewai_runner import load_crewai  # imports CrewAI, which takes seconds

        return load_crewai(text)
    if text.endswith(".py"):
        raise ScriptError(f"{text} is Python code. Name the function or class that builds the crew: {text}:NAME.")
    return ScriptedProgram(load_script(text), speed=speed)


def create_app(
    spec: Spec | Mapping[str, Spec],
    *,
    token: str,
    response_format: FormatName = "documented",
    generation: Generation = "first",
    faults: Iterable[Fault | str] = (),
    speed: float = 1.0,
    stop: bool = True,
    max_runs: int | None = None,
    review_webhook: ReviewWebhook | None = None,
) -> Starlette:
    """Return an ASGI app that serves one crew, or several: a mapping mounts each under `/NAME`.

    Args:
        spec: What is served; see `load_program`.
        token: The bearer token that every request but `GET /` (and `GET /NAME` of a crew) must carry.
        response_format: How answers are worded: "documented" is the published API to the letter, "union" has everything
            that strict clients look for, "live" is what hosted crews answer.
        generation: How the bodies of webhooks are worded: "first" or "later".
        faults: What goes wrong, as `Fault` or as text such as "status:500@1", with those that a script brings.
        speed: The seconds of scripts are divided by it.
        stop: Whether there is `/stop`; the published contract has none.
        max_runs: At most this many runs of a crew at once; later ones are pending. None: no limit for scripts, 100 for
            CrewAI code.
        review_webhook: Where people are asked as a Flow does it: by a signed webhook, answered at its callback URL.

    Raises:
        ValueError: The token is empty, or an option or the crew makes no sense.
    """
    if not token:
        raise ValueError("The token must not be empty: every deployed crew has one.")
    if response_format not in FORMATS:
        raise ValueError(f"There is no response format {response_format!r}. Formats: {', '.join(FORMATS)}.")
    if generation not in get_args(Generation):
        raise ValueError(f"generation must be first or later, not {generation!r}.")
    programs = {
        name: load_program(one, speed=speed)
        for name, one in (spec if isinstance(spec, Mapping) else {"": spec}).items()
    }
    scripts = [program.script for program in programs.values() if isinstance(program, ScriptedProgram)]
    all_faults = Faults([*(fault for script in scripts for fault in script.faults), *faults])
    sender = WebhookSender(all_faults, generation=generation, review=review_webhook)
    crews = {name: CrewRuns(program, listener=sender, max_runs=max_runs) for name, program in programs.items()}
    state = ServerState(token, FORMATS[response_format], all_faults, sender, crews)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None, None]:
        state.open()
        try:
            yield
        finally:
            await state.close()

    async def not_here(request: Request, error: Exception) -> Response:
        status: int = getattr(error, "status_code", 404)
        body = state.response_format.error(
            HTTPStatus(status).phrase, f"There is no route {request.method} {request.url.path} here."
        )
        return JSONResponse(body, status, headers=getattr(error, "headers", None))

    routes: list[BaseRoute] = []
    for name, runs in crews.items():
        endpoints = _Endpoints(state, runs)
        own = endpoints.routes(stop=stop)
        # Within a mount no path is empty: its health page without a slash at the end, and the server's own, come first.
        health = [endpoints.route(path, "GET", "health", endpoints.health) for path in (f"/{name}", "/")]
        routes += [*health, Mount(f"/{name}", routes=own)] if name else own
    app = Starlette(
        routes=routes,
        middleware=[Middleware(_TokenMiddleware, state=state)],
        lifespan=lifespan,
        exception_handlers={404: not_here, 405: not_here},
    )
    app.router.redirect_slashes = False
    app.state.server = state
    return app


def state_of(app: Starlette) -> ServerState:
    """Return what an app that `create_app` made holds."""
    return app.state.server


class _Kickoff(BaseModel):
    inputs: dict[str, Any]
    meta: Any = None
    restoreFromStateId: Any = None  # noqa: N815 - the API's name


class _Resume(BaseModel):
    execution_id: str
    task_id: str
    human_feedback: str
    is_approve: StrictBool


class _Callback(BaseModel):
    feedback: str


class _RefusedError(Exception):
    def __init__(self, code: int, error: str, message: str, details: dict[str, Any] | None = None) -> None:
        self.code = code
        self.words = error, message, details


class _JSON(JSONResponse):
    """JSON in ASCII, since crews repeat what JSON can hold and UTF-8 cannot: halves of surrogate pairs."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, default=str).encode()


class _TokenMiddleware:
    """Answers 401 to everything without the token, before anything else.

    Open are the health pages, and the callbacks of reviews, whose URLs hold a token of their own.
    """

    def __init__(self, app: ASGIApp, *, state: ServerState) -> None:
        self._app = app
        self._state = state
        mounts = ["", *(f"/{name}" for name in state.crews if name)]
        self._open_paths = {f"{mount}{slash}" for mount in mounts for slash in ("", "/")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] != "http" or scope["path"] in self._open_paths or CALLBACKS in scope["path"]
        if is_open or self._has_token(scope):
            await self._app(scope, receive, send)
            return
        self._state.counters.unauthorized += 1
        message = "The bearer token is missing or wrong: send Authorization: Bearer TOKEN."
        body = self._state.response_format.error("Unauthorized", message)
        await JSONResponse(body, 401, headers={"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _has_token(self, scope: Scope) -> bool:
        scheme, _, token = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        # Both are compared in any case, so that the time tells nothing.
        return hmac.compare_digest(token.strip(), self._state.token.encode()) & (scheme.lower() == b"bearer")


class _Endpoints:
    """The calls of one crew."""

    def __init__(self, state: ServerState, runs: CrewRuns) -> None:
        self._state = state
        self._runs = runs

    def routes(self, *, stop: bool) -> list[BaseRoute]:
        # Ids may hold anything, slashes too.
        return [
            self.route("/", "GET", "health", self.health),
            self.route("/inputs", "GET", "inputs", self.inputs),
            self.route("/kickoff", "POST", "kickoff", self.kickoff),
            self.route("/resume", "POST", "resume", self.resume),
            self.route(f"{CALLBACKS}{{token}}", "POST", "resume", self.callback),
            *([self.route("/stop/{id:path}", "POST", "stop", self.stop)] if stop else []),
            self.route("/status/{id:path}", "GET", "status", self.status),
            self.route("/{id:path}/status", "GET", "status", self.status),
        ]

    def route(self, path: str, method: str, place: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
        async def call(request: Request) -> Response:
            self._state.counters.requests[place] += 1
            return await self._answer(request, place, endpoint)

        return Route(path, call, methods=[method])

    async def _answer(
        self, request: Request, place: str, endpoint: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """Call an endpoint, and do wrong what the faults say."""
        drawn = self._state.faults.draw(place, "any")
        # A slow server has the request, and goes on with it after a client that has given up; and a socket that is
        # closed with unread data is reset instead.
        await request.body()
        for fault in drawn:
            if fault.kind.group == "time":
                await asyncio.sleep(fault.value or 0)
        spoiling = next((fault for fault in drawn if fault.kind.group == "answer"), None)
        request.state.faults_of_run = {fault.name: fault.value or 0 for fault in drawn if fault.kind.group == "run"}
        answer = None
        if spoiling is None or spoiling.is_after:
            try:
                answer = await endpoint(request)
            except _RefusedError as error:
                answer = _JSON(self._state.response_format.error(*error.words), error.code)
            # Where nothing was accepted, there is no "after"; but any answer can be cut off.
            if spoiling is None or (answer.status_code >= 400 and spoiling.base_name != "cut"):
                return answer
        return _spoil(spoiling, answer, request.url.path, self._state)

    async def health(self, request: Request) -> Response:
        return PlainTextResponse("Healthy")

    async def inputs(self, request: Request) -> Response:
        return _JSON(self._state.response_format.inputs(self._runs.program.inputs()))

    async def kickoff(self, request: Request) -> Response:
        body, targets = await _read(request, _Kickoff)
        required = [item.name for item in self._runs.program.inputs() if item.required]
        if missing := [name for name in required if body.inputs.get(name) is None]:
            message = f"Missing required inputs: {', '.join(missing)}"
            raise _RefusedError(422, "Validation error", message, {"missing_inputs": missing})
        flow_id = body.inputs.get("id") if is_flow(self._runs.program) else None
        for name, value in (("inputs.id", flow_id), ("restoreFromStateId", body.restoreFromStateId)):
            if value is not None and not is_uuid(value):
                raise _RefusedError(422, "Validation Error", f"'{name}' must be a valid UUID.")
        run = Run(
            body.inputs,
            meta=body.meta,
            targets=targets,
            restore_from=body.restoreFromStateId,
            base_url=str(request.base_url).rstrip("/"),
        )
        run.faults |= request.state.faults_of_run
        self._runs.start(run)
        self._state.counters.accepted[run.id] = run.meta
        return _JSON({"kickoff_id": run.id})

    async def status(self, request: Request) -> Response:
        run = self._runs.get(request.path_params["id"])
        if run is not None:
            run.faults |= request.state.faults_of_run
        if run is None or run.deny_status():
            code, body = self._state.response_format.unknown()
            return _JSON(body, code)
        return _JSON(self._state.response_format.status(run))

    async def resume(self, request: Request) -> Response:
        body, targets = await _read(request, _Resume)
        run = self._known(body.execution_id)
        if self._state.sender.review is not None:
            raise _RefusedError(400, "Execution not pending", "A Flow takes its answer at the callback URL.")
        word = run.answer(body.task_id, Answer(body.is_approve, body.human_feedback), targets)
        if word is None:
            message = f"The execution is not pending human input for task {body.task_id}."
            raise _RefusedError(400, "Execution not pending", message)
        message = {
            "resumed": "The answer was accepted and the crew goes on.",
            "retrying": "The task runs again with the feedback.",
            "completed": "The answer was accepted; it was the last task.",
        }[word]
        return _JSON({"status": word, "message": message})

    async def callback(self, request: Request) -> Response:
        feedback = (await _read(request, _Callback))[0].feedback
        sender = self._state.sender
        asked = sender.asked.get(request.path_params["token"])
        if asked is None or sender.review is None:
            raise _RefusedError(401, "unauthorized", "Invalid response token")
        run, question = asked
        if run.questions.get(question.task_id) is not question:
            raise _RefusedError(409, "already_responded", "Feedback was already provided.")
        run.answer(question.task_id, Answer(sender.review.approves(feedback), feedback))
        return _JSON({"status": "accepted", "request": {"status": "responded", "feedback": feedback}})

    async def stop(self, request: Request) -> Response:
        run = self._known(request.path_params["id"])
        if not self._runs.stop(run):
            return _JSON(self._state.response_format.cannot_stop(run), 400)
        return _JSON({"status": "stopped", "kickoffId": run.id})

    def _known(self, id_: str) -> Run:
        run = self._runs.get(id_)
        if run is None or "forgotten" in run.faults:
            raise _RefusedError(404, "Execution not found", "No execution found with the given id.")
        return run


async def _read(request: Request, model: type[T]) -> tuple[T, Webhooks]:
    """Return a request's body, and where it has webhooks sent."""
    content = await request.body()
    if len(content) > BODY_LIMIT:
        raise _RefusedError(413, "Request too large", f"A body may have {BODY_LIMIT} bytes.")
    try:
        value = json.loads(content)
        return model.model_validate(value), Webhooks.from_json(value)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise _RefusedError(400, "Invalid request", f"{where}: {first['msg']}") from None
    except (ValueError, RecursionError):
        raise _RefusedError(400, "Invalid request", "The body is not JSON.") from None


# What faults do to answers

_CONNECTION = "prefect_crew.connection"


class Connection:
    """The TCP connection that a request came over."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def drop(self) -> None:
        """Close it: the client sees that the server disconnected without (the rest of) an answer."""
        self._transport.abort()  # close() would wait for an answer that never comes

    def reset(self) -> None:
        """Reset it (TCP RST): the client sees a read error."""
        with contextlib.suppress(OSError):  # the client was faster
            # A linger time of zero makes the kernel send RST instead of FIN.
            linger = struct.pack("ii", 1, 0)
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._transport.abort()


def with_connection(connection: Connection) -> dict[str, Any]:
    """Return the ASGI state of a request that came over a connection."""
    return {_CONNECTION: connection}


class ConnectionProtocol(H11Protocol):
    """uvicorn's HTTP protocol, with the connection in the state of each request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Hand the connection to its requests."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, **with_connection(Connection(transport))}


def _spoil(fault: Fault, answer: Response | None, path: str, state: ServerState) -> Response:
    """Return what is sent in place of the answer, which is None where the fault comes before the work."""
    match fault.base_name:
        case "drop" | "reset" | "timeout" | "cut" | "crash":
            return _BrokenAnswer(fault, answer, state)
        case "redirect":
            return Response(status_code=307, headers={"Location": f"/elsewhere{path}"})
        case "html":
            return HTMLResponse("<!DOCTYPE html><title>Sign in</title><body><h1>Sign in</h1></body>")
        case "garbage":
            return Response(b'{"kickoff_id": "', media_type="application/json")
        case "empty":
            return Response(b"", media_type="application/json")
        case "no-id":
            return JSONResponse({"message": "Crew started"})
        case code:
            status = HTTPStatus(int(code.removesuffix("-bare")))
            headers = None if fault.value is None else {"Retry-After": f"{fault.value:g}"}
            body = state.response_format.error(status.phrase, f"The fault {fault} was asked for.")
            return JSONResponse(body, status, headers)


class _BrokenAnswer(Response):
    """No answer, or the first half of one, and the end of the connection."""

    def __init__(self, fault: Fault, answer: Response | None, state: ServerState) -> None:
        body, status = (answer.body, answer.status_code) if answer else (b'{"status":"running"}', 200)
        super().__init__(body, status, media_type="application/json")
        self._fault = fault
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Break the connection, and return once the client is gone."""
        try:
            connection: Connection = scope["state"][_CONNECTION]
        except KeyError:
            message = "Faults of the connection need this package's own server: CrewServer or serve()."
            raise RuntimeError(message) from None
        match self._fault.base_name:
            case "crash":
                self._state.crash()  # where the process lives on, it resets its connections
            case "reset":
                connection.reset()
            case "timeout":
                await self._wait(receive)
                connection.drop()
            case "cut":
                body = bytes(self.body)
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
                await asyncio.sleep(0.05)  # aborting a connection throws away what is still to be written
                connection.drop()
            case _:
                connection.drop()
        await _until_gone(receive)

    async def _wait(self, receive: Receive) -> None:
        """Wait for the fault's seconds, or until the client is gone or the server ends."""
        ends = {asyncio.ensure_future(_until_gone(receive)), asyncio.ensure_future(self._state.closing.wait())}
        try:
            await asyncio.wait(ends, timeout=self._fault.value or None, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
