"""The dev server's app: the calls of the crew API, what it holds, and the answers that faults spoil."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import re
import secrets
import socket
import struct
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack, cast, get_args

from pydantic import BaseModel, Field, StrictBool, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefect_crew.client.inputs import is_uuid
from prefect_crew.client.webhooks import Webhooks
from prefect_crew.devserver._faults import Fault, Faults
from prefect_crew.devserver._response_formats import FORMATS, WORDS, FormatName
from prefect_crew.devserver._runs import Answer, CrewRuns, Program, Run
from prefect_crew.devserver._scripts import CrewScript, ScriptedProgram, ScriptError, load_script, parse_script
from prefect_crew.devserver._webhooks import CALLBACKS, Generation, ReviewWebhook, WebhookSender

CRASH_EXIT_CODE = 86
"""What the process of `serve` exits with when the fault `crash` ends it."""

Spec = str | os.PathLike[str] | CrewScript | Program
"""A crew to serve; see `load_program`."""
T = TypeVar("T", bound=BaseModel)


class ServerOptions(TypedDict, total=False):
    """How a server behaves; `CrewServer` says what each option means."""

    token: str | None
    response_format: FormatName
    generation: Generation
    faults: Iterable[Fault | str]
    speed: float
    stop: bool
    max_runs: int | None
    review_webhook: ReviewWebhook | None


def load_program(spec: Spec, *, speed: float = 1.0) -> Program:
    """Return a crew that the server can run; the seconds of a script are divided by `speed`.

    Args:
        spec: `module:factory` or `path/to/file.py:factory` for CrewAI code (needs the extra `crewai`), the path of a
            YAML file, its text (several lines), the name of a crew of this package ("echo" or "travel"), a script, or
            a program, which is returned as it is.

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
        from prefect_crew.devserver._crewai_loader import load_crewai

        return load_crewai(text)
    if text.endswith(".py"):
        raise ScriptError(f"{text} is Python code. Name the function or class that builds the crew: {text}:NAME.")
    return ScriptedProgram(load_script(text), speed=speed)


def create_app(spec: Spec | Mapping[str, Spec], **options: Unpack[ServerOptions]) -> Starlette:
    """Return an ASGI app. Its arguments are those of `CrewServer`; faults of the connection need that server.

    Raises:
        ValueError: An option or the crew makes no sense; the text says which and why.
    """
    return CrewApp(spec, **options).asgi


class _Kickoff(BaseModel, extra="allow"):
    inputs: dict[str, Any]
    meta: Any = None
    restore_from: Any = Field(default=None, alias="restoreFromStateId")


class _Resume(BaseModel, extra="allow"):
    execution_id: str
    task_id: str
    human_feedback: str
    is_approve: StrictBool


class _Callback(BaseModel, extra="ignore"):
    feedback: str


class _RefusedError(Exception):
    """An answer that is an error: its HTTP status, what a response format makes a body of."""


class _JSON(JSONResponse):
    """JSON in ASCII, since crews say what JSON can hold and UTF-8 cannot, and programs what JSON cannot."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, default=str).encode()


class CrewApp:
    """Crews behind the API. `CrewServer` says what its options and attributes mean.

    `asgi` is the ASGI app; `crews` are the runs of each crew, by the name it is served at, "" for the only one.
    """

    def __init__(
        self,
        spec: Spec | Mapping[str, Spec],
        *,
        token: str | None = None,
        response_format: FormatName = "documented",
        generation: Generation = "first",
        faults: Iterable[Fault | str] = (),
        speed: float = 1.0,
        stop: bool = True,
        max_runs: int | None = None,
        review_webhook: ReviewWebhook | None = None,
    ) -> None:
        if response_format not in FORMATS:
            raise ValueError(f"There is no response format {response_format!r}. Formats: {', '.join(FORMATS)}.")
        if generation not in get_args(Generation):
            raise ValueError(f"generation must be first or later, not {generation!r}.")
        specs = spec if isinstance(spec, Mapping) else {"": spec}
        programs = {name: load_program(one, speed=speed) for name, one in specs.items()}
        scripts = [program.script for program in programs.values() if isinstance(program, ScriptedProgram)]
        self.token = token or secrets.token_urlsafe(24)
        self.faults = Faults([*(fault for script in scripts for fault in script.faults), *faults])
        self._format = FORMATS[response_format]
        self._tasks: set[asyncio.Task[None]] = set()
        self._sender = WebhookSender(self.faults, spawn=self._spawn, generation=generation, review=review_webhook)
        self.crews = {
            name: CrewRuns(program, listener=self._sender, spawn=self._spawn, max_runs=max_runs)
            for name, program in programs.items()
        }
        self.requests: Counter[str] = Counter()
        self.unauthorized = 0
        self.accepted: dict[str, Any] = {}
        self.crash: Callable[[], None] = lambda: os._exit(CRASH_EXIT_CODE)  # at once, without clean-up
        self.hanging: set[Connection] = set()
        self.asgi = Starlette(
            routes=[route for name, crew in self.crews.items() for route in self._routes(name, crew, stop=stop)],
            lifespan=self._lifespan,
            exception_handlers={404: self._not_here, 405: self._not_here},
        )
        self.asgi.router.redirect_slashes = False
        self.asgi.state.server = self

    @property
    def runs(self) -> list[Run]:
        """All runs of all crews, oldest first for each crew."""
        return [run for crew in self.crews.values() for run in list(crew.runs.values())]

    @property
    def kickoffs(self) -> int:
        """How many kickoffs have started a run."""
        return len(self.accepted)

    @property
    def kickoffs_by_key(self) -> Counter[str]:
        """How many kickoffs have started a run, by the `idempotency_key` in their meta."""
        metas = [cast("dict[str, Any]", meta) for meta in list(self.accepted.values()) if isinstance(meta, dict)]
        return Counter(str(meta["idempotency_key"]) for meta in metas if "idempotency_key" in meta)

    def open(self) -> None:
        """Begin to run, on this event loop, for the first time or again; see `CrewRuns.open`."""
        self._sender.open()
        for crew in self.crews.values():
            crew.open()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def abandon(self) -> None:
        """End as a crash would: from now on nothing is sent or finished, and no request hangs."""
        for connection in self.hanging:
            connection.drop()
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Abandon the runs in flight and the requests that hang, and wait for their end."""
        self.abandon()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncGenerator[None, None]:
        self.open()
        try:
            yield
        finally:
            await self.close()

    def _routes(self, name: str, crew: CrewRuns, *, stop: bool) -> list[Route]:
        def route(
            method: str, path: str, place: str, endpoint: Callable[..., Awaitable[Response]], *, is_open: bool = False
        ) -> Route:
            async def call(request: Request) -> Response:
                if not is_open and not self._has_token(request):
                    return self._unauthorized()
                return await self._answer(request, place, partial(endpoint, request, crew))

            return Route(path, call, methods=[method])

        prefix = f"/{name}" if name else ""
        # Ids may hold anything, slashes too.
        return [
            *(route("GET", path, "health", self._health, is_open=True) for path in {"/", prefix or "/", f"{prefix}/"}),
            route("GET", f"{prefix}/inputs", "inputs", self._inputs),
            route("POST", f"{prefix}/kickoff", "kickoff", self._kickoff),
            route("POST", f"{prefix}/resume", "resume", self._resume),
            # Its URL holds a token of its own.
            route("POST", f"{prefix}{CALLBACKS}{{token}}", "resume", self._callback, is_open=True),
            *([route("POST", f"{prefix}/stop/{{id:path}}", "stop", self._stop)] if stop else []),
            route("GET", f"{prefix}/status/{{id:path}}", "status", self._status),
            route("GET", f"{prefix}/{{id:path}}/status", "status", self._status),
        ]

    def _has_token(self, request: Request) -> bool:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        # Both are compared in any case, so that the time tells nothing.
        return hmac.compare_digest(token.strip().encode("latin-1"), self.token.encode()) & (scheme.lower() == "bearer")

    def _unauthorized(self) -> Response:
        self.unauthorized += 1
        body = self._format.error(
            "Unauthorized", "The bearer token is missing or wrong: send Authorization: Bearer TOKEN."
        )
        return _JSON(body, 401, headers={"WWW-Authenticate": "Bearer"})

    async def _not_here(self, request: Request, error: Exception) -> Response:
        if not self._has_token(request):
            return self._unauthorized()
        status: int = getattr(error, "status_code", 404)
        message = f"There is no route {request.method} {request.url.path} here."
        return _JSON(self._format.error(HTTPStatus(status).phrase, message), status)

    async def _answer(self, request: Request, place: str, work: Callable[[], Awaitable[Response]]) -> Response:
        """Do the work of a call, and do wrong what the faults say."""
        self.requests[place] += 1
        drawn = self.faults.draw(place, "any")
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
                answer = await work()
            except _RefusedError as error:
                status, *words = error.args
                answer = _JSON(self._format.error(*words), status)
            # Where nothing was accepted, there is no "after"; but any answer can be cut off.
            if spoiling is None or (answer.status_code >= 400 and spoiling.base_name != "cut"):
                return answer
        return self._spoiled(spoiling, answer, request.url.path)

    async def _health(self, request: Request, crew: CrewRuns) -> Response:
        return PlainTextResponse("Healthy")

    async def _inputs(self, request: Request, crew: CrewRuns) -> Response:
        return _JSON(self._format.inputs(crew.program.inputs()))

    async def _kickoff(self, request: Request, crew: CrewRuns) -> Response:
        body, targets = await _read(request, _Kickoff)
        required = [item.name for item in crew.program.inputs() if item.required]
        if missing := [name for name in required if body.inputs.get(name) is None]:
            message = f"Missing required inputs: {', '.join(missing)}"
            raise _RefusedError(422, "Validation error", message, {"missing_inputs": missing})
        flow_id = body.inputs.get("id") if crew.is_flow else None
        for name, value in (("inputs.id", flow_id), ("restoreFromStateId", body.restore_from)):
            if value is not None and not is_uuid(value):
                raise _RefusedError(422, "Validation Error", f"'{name}' must be a valid UUID.")
        run = Run(
            body.inputs,
            meta=body.meta,
            targets=targets,
            restore_from=body.restore_from,
            base_url=str(request.base_url).rstrip("/"),
        )
        run.faults |= request.state.faults_of_run
        crew.start(run)
        self.accepted[run.id] = run.meta
        return _JSON({"kickoff_id": run.id})

    async def _status(self, request: Request, crew: CrewRuns) -> Response:
        run = crew.runs.get(request.path_params["id"])
        if run is not None:
            run.faults |= request.state.faults_of_run
        if run is None or run.deny_status():
            code, body = self._format.unknown()
            return _JSON(body, code)
        return _JSON(self._format.status(run))

    async def _resume(self, request: Request, crew: CrewRuns) -> Response:
        body, targets = await _read(request, _Resume)
        run = _known(crew, body.execution_id)
        if self._sender.review is not None:
            raise _RefusedError(400, "Execution not pending", "A Flow takes its answer at the callback URL.")
        word = run.answer(body.task_id, Answer(body.is_approve, body.human_feedback), targets)
        if word is None:
            message = f"The execution is not pending human input for task {body.task_id}."
            raise _RefusedError(400, "Execution not pending", message)
        return _JSON({"status": word, "message": f"The answer was accepted: {word}."})

    async def _callback(self, request: Request, crew: CrewRuns) -> Response:
        feedback = (await _read(request, _Callback))[0].feedback
        asked, review = self._sender.asked.get(request.path_params["token"]), self._sender.review
        if asked is None or review is None:
            raise _RefusedError(401, "unauthorized", "Invalid response token")
        run, question = asked
        if run.questions.get(question.task_id) is not question:
            raise _RefusedError(409, "already_responded", "Feedback was already provided.")
        approve = not review.options or feedback.casefold().startswith(review.options[0].casefold())
        run.answer(question.task_id, Answer(approve, feedback))
        return _JSON({"status": "accepted", "request": {"status": "responded", "feedback": feedback}})

    async def _stop(self, request: Request, crew: CrewRuns) -> Response:
        run = _known(crew, request.path_params["id"])
        if not crew.stop(run):  # never published, and the same in all formats
            return _JSON({"detail": f"Cannot stop execution. Current state: {WORDS[run.state][0]}"}, 400)
        return _JSON({"status": "stopped", "kickoffId": run.id})

    def _spoiled(self, fault: Fault, answer: Response | None, path: str) -> Response:
        """Return what is sent in place of the answer, which is None where the fault comes before the work."""
        match fault.base_name:
            case "drop" | "reset" | "timeout" | "cut" | "crash":
                return _BrokenAnswer(fault, answer, self)
            case "redirect":
                return Response(status_code=307, headers={"Location": f"/elsewhere{path}"})
            case "html":
                return HTMLResponse("<!DOCTYPE html><title>Sign in</title><body><h1>Sign in</h1></body>")
            case "garbage":
                return Response(b'{"kickoff_id": "', media_type="application/json")
            case "empty":
                return Response(b"", media_type="application/json")
            case "no-id":
                return _JSON({"message": "Crew started"})
            case code:
                status = HTTPStatus(int(code.removesuffix("-bare")))
                headers = None if fault.value is None else {"Retry-After": f"{fault.value:g}"}
                body = self._format.error(status.phrase, f"The fault {fault.name} was asked for.")
                return _JSON(body, status, headers)


def _known(crew: CrewRuns, id_: str) -> Run:
    run = crew.runs.get(id_)
    if run is None or "forgotten" in run.faults:
        raise _RefusedError(404, "Execution not found", "No execution found with the given id.")
    return run


async def _read(request: Request, model: type[T]) -> tuple[T, Webhooks]:
    """Return a request's body, and where it has webhooks sent."""
    try:
        body = model.model_validate_json(await request.body())
        return body, Webhooks.from_json(body.model_extra or {})
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise _RefusedError(400, "Invalid request", f"{where}: {first['msg']}") from None


class Connection:
    """The TCP connection that a request came over."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def drop(self) -> None:
        self._transport.abort()  # close() would wait for an answer that never comes

    def reset(self) -> None:
        with contextlib.suppress(OSError):  # the client was faster
            # A linger time of zero makes the kernel send RST instead of FIN.
            linger = struct.pack("ii", 1, 0)
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._transport.abort()


class ConnectionProtocol(H11Protocol):
    """uvicorn's HTTP protocol, with the connection in the state of each request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "connection": Connection(transport)}


class _BrokenAnswer(Response):
    """No answer, or the first half of one, and the end of the connection."""

    def __init__(self, fault: Fault, answer: Response | None, app: CrewApp) -> None:
        body, status = (answer.body, answer.status_code) if answer else (b'{"status":"running"}', 200)
        super().__init__(body, status, media_type="application/json")
        self._fault = fault
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection: Connection = scope["state"]["connection"]  # there only if this package's own server is used
        match self._fault.base_name:
            case "crash":
                self._app.crash()  # where the process lives on, it resets its connections
            case "reset":
                connection.reset()
            case "timeout":
                self._app.hanging.add(connection)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._fault.value or None):
                        await _until_gone(receive)
                self._app.hanging.discard(connection)
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


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
