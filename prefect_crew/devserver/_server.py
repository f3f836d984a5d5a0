"""The dev server: a crew behind the crew API, as an ASGI app, in a thread or as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import secrets
import shlex
import socket
import sys
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from anyio.abc import TaskStatus
from anyio.from_thread import start_blocking_portal
from pydantic import AliasChoices, BaseModel, Field, StrictBool, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefect_crew._internal.web_server import WebServer, open_listener, print_line, url_of
from prefect_crew.client.encoding import is_uuid
from prefect_crew.client.webhooks import Webhooks
from prefect_crew.devserver._faults import Fault, Faults
from prefect_crew.devserver._response_formats import FORMATS, WORDS, FormatName
from prefect_crew.devserver._runs import Answer, CrewRuns, Run
from prefect_crew.devserver._scripts import Spec, load_program
from prefect_crew.devserver._webhooks import CALLBACKS, ReviewWebhook, WebhookSender

if TYPE_CHECKING:
    from prefect_crew.blocks import DeployedCrew

T = TypeVar("T", bound=BaseModel)
Work = Callable[[Request], Awaitable[Response]]


class _Kickoff(BaseModel, extra="allow"):
    inputs: dict[str, Any]
    meta: Any = None
    restore_from: Any = Field(default=None, alias="restoreFromStateId")


class _LiveKickoff(_Kickoff):
    inputs: dict[str, Any] = {}


class _Resume(BaseModel, extra="allow"):
    execution_id: str
    task_id: str
    human_feedback: str
    is_approve: StrictBool


class _LiveResume(_Resume):
    execution_id: str = Field(alias="executionId")
    task_id: str = Field(alias="taskId")
    human_feedback: str = Field(validation_alias=AliasChoices("humanFeedback", "human_feedback"))
    is_approve: StrictBool = Field(validation_alias=AliasChoices("isApprove", "is_approve"))


class _Callback(BaseModel, extra="ignore"):
    feedback: str


class _RefusedError(Exception):
    """An error as an answer: its HTTP status and its body."""


class _JSON(JSONResponse):
    """JSON in ASCII, since a crew may return text that UTF-8 cannot hold, and a program values that JSON cannot hold.

    It has no blanks, like the JSON of hosted crews (FastAPI), since some clients cut the id out of the text.
    """

    def render(self, content: Any) -> bytes:
        return json.dumps(content, default=str, separators=(",", ":")).encode()


class CrewServer:
    """A crew server on a port of 127.0.0.1, in a thread of this process; `with` starts and stops it.

    Its ASGI app is `asgi`, to be mounted elsewhere; faults of the connection need this server.

    Args:
        spec: The crew; see `load_program`.
        port: The port; 0 takes a free one.
        token: The bearer token that every request but `GET /` must carry; a random one by default.
        response_format: The words of answers: "documented" is the published API to the letter, "live" is what crews
            on AMP really answer.
        faults: Mistakes of the server, as `Fault` or as text such as "status:500@1".
        speed: The divisor of the seconds in scripts.
        stop: Whether there is `/stop`; the published contract has none.
        max_runs: At most this many runs at once; later ones are pending. None: no limit for scripts, 100
            for CrewAI code.
        review_webhook: Where people are asked as a Flow does it: by a signed webhook, answered at its callback URL.

    Attributes:
        port: The port; 0 before the first start of a server that takes a free one.
        token: The bearer token. A new value rotates the token: from then on, the old token gets 401.
        faults: Mistakes of the server; they may be changed while it runs.
        requests: Requests by place: inputs, kickoff, status, resume, stop, health, inspect.
        unauthorized: How many requests had a missing or wrong token; they count nowhere else.
        accepted: The kickoffs that started a run: kickoff id to meta.
        on_kickoff: Called with the kickoff id of each run that starts, in the server's event loop.

    Raises:
        ValueError: An option or the crew is wrong. The text has the reason.
    """

    def __init__(
        self,
        spec: Spec = "echo",
        *,
        port: int = 0,
        token: str | None = None,
        response_format: FormatName = "documented",
        faults: Iterable[Fault | str] = (),
        speed: float = 1.0,
        stop: bool = True,
        max_runs: int | None = None,
        review_webhook: ReviewWebhook | None = None,
    ) -> None:
        if response_format not in FORMATS:
            raise ValueError(f"There is no response format {response_format!r}. Formats: {', '.join(FORMATS)}.")
        program = load_program(spec, speed=speed)
        self.port: int = port
        self.token: str = token or secrets.token_urlsafe(24)
        self.faults: Faults = Faults(faults)
        self.requests: Counter[str] = Counter()
        self.unauthorized: int = 0
        self.accepted: dict[str, Any] = {}
        self.on_kickoff: Callable[[str], None] = lambda kickoff_id: None
        self._format = FORMATS[response_format]
        self._tasks: set[asyncio.Task[None]] = set()
        self.hanging: set[Connection] = set()
        self._sender = WebhookSender(
            self.faults, spawn=self._spawn, response_format=self._format, review=review_webhook
        )
        self.crew_runs: CrewRuns = CrewRuns(program, listener=self._sender, spawn=self._spawn, max_runs=max_runs)
        self.asgi: Starlette = Starlette(
            routes=self._routes(stop=stop),
            lifespan=self._lifespan,
            exception_handlers={404: self._not_here, 405: self._not_here},
        )
        self.asgi.router.redirect_slashes = False
        self._running: contextlib.ExitStack | None = None

    def __repr__(self) -> str:
        return f"<CrewServer {self.url}>"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Base URL of the crew, without a slash at the end. Its port may be 0 before the first start."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        """The request headers that carry the token."""
        return {"Authorization": f"Bearer {self.token}"}

    @property
    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        return list(self.crew_runs.runs.values())

    @property
    def kickoffs(self) -> int:
        """The number of kickoffs that have started a run."""
        return len(self.accepted)

    @property
    def kickoffs_by_key(self) -> Counter[str]:
        """The number of kickoffs that have started a run, by the `idempotency_key` in their meta."""
        metas = [cast("dict[str, Any]", meta) for meta in list(self.accepted.values()) if isinstance(meta, dict)]
        return Counter(str(meta["idempotency_key"]) for meta in metas if "idempotency_key" in meta)

    def run(self, kickoff_id: str) -> Run:
        """Return one run, by any id that it has had.

        Raises:
            KeyError: No run has this id.
        """
        return {id_: run for run in self.runs for id_ in (run.id, *run.former_ids)}[kickoff_id]

    def crew(self, **fields: Any) -> DeployedCrew:
        """Return a Prefect block for this server. `fields` are further fields of the block."""
        from prefect_crew.blocks import DeployedCrew

        values: dict[str, Any] = {"url": self.url, "token": self.token, "flow": self.crew_runs.is_flow}
        return DeployedCrew(**values | fields)

    def start(self) -> None:
        """Start the server and return once it answers.

        Raises:
            OSError: The port is taken.
            RuntimeError: The server runs already, or does not start.
        """
        if self._running is not None:
            raise RuntimeError(f"{self!r} runs already")
        listener = open_listener("127.0.0.1", self.port)  # here, so that its error is the caller's
        self.port = listener.getsockname()[1]
        try:
            with contextlib.ExitStack() as running:
                portal = running.enter_context(start_blocking_portal(name=f"crew server {self.url}"))
                served, uvicorn = portal.start_task(self._serve, listener)
                running.callback(served.result)
                running.callback(portal.call, uvicorn.stop)
                self._running = running.pop_all()
        except (Exception, SystemExit) as error:
            raise RuntimeError(f"{self!r} does not start: {error}") from error

    def stop(self) -> None:
        """Stop the server and cancel the runs in flight. The port is free when this returns. Idempotent."""
        running, self._running = self._running, None
        if running is not None:
            running.close()

    async def _serve(self, listener: socket.socket, *, task_status: TaskStatus[WebServer]) -> None:
        with listener:
            uvicorn = _Uvicorn(self, on_started=lambda: task_status.started(uvicorn))
            await uvicorn.serve(sockets=[listener])

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Cancel the runs in flight and drop the requests that hang, and wait for their end."""
        for connection in self.hanging:
            connection.drop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            await self.close()

    def _routes(self, *, stop: bool) -> list[Route]:
        def route(method: str, path: str, place: str, work: Work, *, is_open: bool = False) -> Route:
            async def call(request: Request) -> Response:
                if not is_open and not self._has_token(request):
                    return self._unauthorized(request)
                return await self._answer(request, place, work)

            return Route(path, call, methods=[method])

        # Ids may hold anything, slashes too.
        return [
            route("GET", "/", "health", self._health, is_open=True),
            route("GET", "/inputs", "inputs", self._inputs),
            route("GET", "/inspect", "inspect", self._inspect),
            route("POST", "/kickoff", "kickoff", self._kickoff),
            route("POST", "/resume", "resume", self._resume),
            # Its URL holds a token of its own.
            route("POST", f"{CALLBACKS}{{token}}", "resume", self._callback, is_open=True),
            *([route("POST", "/stop/{id:path}", "stop", self._stop)] if stop else []),
            route("GET", "/status/{id:path}", "status", self._status),
            route("GET", "/{id:path}/status", "status", self._status),
        ]

    def _has_token(self, request: Request) -> bool:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        # Both are compared in any case, so that the time is the same for both.
        return hmac.compare_digest(token.strip().encode("latin-1"), self.token.encode()) & (scheme.lower() == "bearer")

    def _unauthorized(self, request: Request) -> Response:
        self.unauthorized += 1
        body = self._format.unauthorized(has_token="Authorization" in request.headers)
        return _JSON(body, 401, headers={"WWW-Authenticate": "Bearer"})

    async def _not_here(self, request: Request, error: Exception) -> Response:
        status: int = getattr(error, "status_code", 404)
        phrase, message = HTTPStatus(status).phrase, f"There is no route {request.method} {request.url.path} here."
        if self._format.is_live:
            message = phrase
        elif not self._has_token(request):
            return self._unauthorized(request)
        return _JSON(self._format.error(phrase, message), status, getattr(error, "headers", None))

    async def _answer(self, request: Request, place: str, work: Work) -> Response:
        """Do the work of a call, with its faults."""
        self.requests[place] += 1
        # A look at the version is in nobody's count of requests, so `any` leaves it out.
        drawn = self.faults.draw(place, *(() if place == "inspect" else ("any",)))
        # A slow server has the request, and goes on with it after a client that has given up; and a socket that is
        # closed with unread data is reset instead.
        await request.body()
        for fault in drawn:
            if fault.kind.group == "time":
                await asyncio.sleep(fault.value or 0)
        spoiling = next((fault for fault in drawn if fault.kind.group == "answer"), None)
        request.state.faults_of_run = {fault.name: fault.value or 0 for fault in drawn if fault.kind.group == "run"}
        if spoiling is None or spoiling.is_after:
            try:
                answer = await work(request)
            except _RefusedError as error:
                status, body = error.args
                answer = PlainTextResponse(body, status) if isinstance(body, str) else _JSON(body, status)
            if spoiling is None or answer.status_code >= 400:  # where nothing was accepted, there is no "after"
                return answer
        return self._spoiled(spoiling, request.url.path)

    async def _health(self, request: Request) -> Response:
        return _JSON({"detail": "Not Found"}, 404) if self._format.is_live else PlainTextResponse("Healthy")

    async def _inputs(self, request: Request) -> Response:
        return _JSON(self._format.inputs(self.crew_runs.program))

    async def _inspect(self, request: Request) -> Response:
        definition = getattr(self.crew_runs.program, "definition", None)
        if definition is None:
            raise _RefusedError(404, self._format.error("Not Found", "This crew has no definition to inspect."))
        return _JSON(definition())

    async def _kickoff(self, request: Request) -> Response:
        is_live = self._format.is_live
        body, targets = await self._read(request, _LiveKickoff if is_live else _Kickoff)
        inputs = body.inputs
        required = [item.name for item in self.crew_runs.program.inputs() if item.required]
        missing = [name for name in required if inputs.get(name) is None]
        if missing and not (is_live and self.crew_runs.is_flow):
            raise _RefusedError(*self._format.missing(missing))
        if is_live and not self.crew_runs.is_flow:
            inputs = {name: str(value) for name, value in inputs.items()}
        flow_id = inputs.get("id") if self.crew_runs.is_flow else None
        for name, value in (("inputs.id", flow_id), ("restoreFromStateId", body.restore_from)):
            if value is not None and not is_live and not is_uuid(value):
                raise _RefusedError(422, self._format.error("Validation Error", f"'{name}' must be a valid UUID."))
        run = Run(
            inputs,
            meta=body.meta,
            targets=targets,
            restore_from=body.restore_from,
            base_url=str(request.base_url).rstrip("/"),
        )
        run.faults |= request.state.faults_of_run
        self.crew_runs.start(run)
        self.accepted[run.id] = run.meta
        self.on_kickoff(run.id)
        return _JSON({"kickoff_id": run.id})

    async def _status(self, request: Request) -> Response:
        run = self.crew_runs.runs.get(request.path_params["id"])
        if run is not None:
            run.faults |= request.state.faults_of_run
        if run is None or run.deny_status():
            code, body = self._format.unknown()
            return _JSON(body, code)
        return _JSON(self._format.status(run))

    async def _resume(self, request: Request) -> Response:
        if self._format.is_live:
            return await self._resume_live(request)
        body, targets = await self._read(request, _Resume)
        run = self._known_run(body.execution_id)
        if self._sender.review is not None:
            message = "A Flow takes its answer at the callback URL."
            raise _RefusedError(400, self._format.error("Execution not pending", message))
        word = run.answer(body.task_id, Answer(body.is_approve, body.human_feedback), targets)
        if word is None:
            message = f"The execution is not pending human input for task {body.task_id}."
            raise _RefusedError(400, self._format.error("Execution not pending", message))
        return _JSON({"status": word, "message": f"The answer was accepted: {word}."})

    async def _resume_live(self, request: Request) -> Response:
        """Answer any execution and any task with a new id; only a question's own run goes on under it."""
        body, targets = await self._read(request, _LiveResume)
        run, kickoff_id = self.crew_runs.runs.get(body.execution_id), str(uuid.uuid4())
        questions = run.questions.values() if run is not None else ()
        question = next((question for question in questions if question.uuid == body.task_id), None)
        if run is not None and question is not None and self._sender.review is None:
            kickoff_id = self.crew_runs.rename(run)
            run.answer(question.task_id, Answer(body.is_approve, body.human_feedback), targets)
        return _JSON({"kickoff_id": kickoff_id})

    async def _callback(self, request: Request) -> Response:
        feedback = (await self._read(request, _Callback))[0].feedback
        entry, review = self._sender.asked.get(request.path_params["token"]), self._sender.review
        if entry is None or review is None:
            raise _RefusedError(401, self._format.error("unauthorized", "Invalid response token"))
        run, question = entry
        if run.questions.get(question.task_id) is not question:
            raise _RefusedError(409, self._format.error("already_responded", "Feedback was already provided."))
        approve = not review.options or feedback.casefold().startswith(review.options[0].casefold())
        run.answer(question.task_id, Answer(approve, feedback))
        return _JSON({"status": "accepted", "request": {"status": "responded", "feedback": feedback}})

    async def _stop(self, request: Request) -> Response:
        run = self._known_run(request.path_params["id"])
        if not self.crew_runs.stop(run):  # never published, and the same in all formats
            return _JSON({"detail": f"Cannot stop execution. Current state: {WORDS[run.state][0]}"}, 400)
        return _JSON({"status": "stopped", "kickoffId": run.id})

    def _known_run(self, id_: str) -> Run:
        run = self.crew_runs.runs.get(id_)
        if run is None or "forgotten" in run.faults:
            raise _RefusedError(404, self._format.error("Execution not found", "No execution has the given id."))
        return run

    async def _read(self, request: Request, model: type[T]) -> tuple[T, Webhooks]:
        """Return a request's body, and the targets of its webhooks."""
        try:
            body = model.model_validate_json(await request.body())
            targets = dict(body.model_extra or {})
            if self._format.is_live:
                targets["humanInputWebhook"] = targets.get("humanInputWebhookUrl")
            return body, Webhooks.from_json(targets)
        except ValidationError as error:
            raise _RefusedError(*self._format.invalid(error)) from None

    def _spoiled(self, fault: Fault, path: str) -> Response:
        """Return the answer that a fault gives, before the work or after it."""
        match fault.base_name:
            case "drop" | "timeout":
                return _NoAnswer(fault, self)
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


class Connection:
    """The TCP connection of a request."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def drop(self) -> None:
        self._transport.abort()  # close() would wait for an answer that never comes


class ConnectionProtocol(H11Protocol):
    """uvicorn's HTTP protocol, with the connection in the state of each request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "connection": Connection(transport)}


class _NoAnswer(Response):
    """The end of the connection, at once or after some time."""

    def __init__(self, fault: Fault, server: CrewServer) -> None:
        super().__init__()
        self._fault = fault
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection: Connection = scope["state"]["connection"]  # there only if this package's own server is used
        if self._fault.base_name == "timeout":
            self._server.hanging.add(connection)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._fault.value or None):
                    await _until_gone(receive)
            self._server.hanging.discard(connection)
        connection.drop()
        await _until_gone(receive)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Uvicorn(WebServer):
    """Serves a dev server."""

    def __init__(self, served: CrewServer, *, on_started: Callable[[], None]) -> None:
        super().__init__(served.asgi, on_started=on_started, http=ConnectionProtocol, timeout_graceful_shutdown=1)
        self._served = served

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the runs and the requests that never answer, then shut down."""
        await self._served.close()
        await super().shutdown(sockets)


def serve(
    server: CrewServer,
    *,
    host: str = "127.0.0.1",
    name: str | None = None,
    show_token: bool = False,
    on_listening: Callable[[str, str, bool], None] | None = None,
) -> int:
    """Serve a crew until Ctrl-C or SIGTERM, which cancel the runs in flight. Returns 0.

    Once the server answers, standard output gets a line with its URL and the command that runs the crew. A terminal
    also gets a line with the kickoff id of each run.

    Args:
        server: The server, not started.
        host: The address to listen on, with the server's port.
        name: The name under which the crew is stored; without one it is run by its URL.
        show_token: Whether the command has the token in it.
        on_listening: Called with the crew's URL, its token, and whether it is a Flow, before the server answers.

    Raises:
        OSError: The port is taken, or the host is not this machine's.
    """
    if sys.stdout.isatty():  # a pipe that nobody reads would block the server once it is full
        server.on_kickoff = lambda kickoff_id: print_line(f"Started run {kickoff_id}")
    with contextlib.closing(open_listener(host, server.port)) as listener:
        program, url = server.crew_runs.program, url_of(listener)
        inputs = "".join(f" -i {shlex.quote(item.name)}=…" for item in program.inputs() if item.required)
        if on_listening is not None:
            on_listening(url, server.token, server.crew_runs.is_flow)
        token = f"CREW_TOKEN={server.token} " if show_token else ""
        line = f"{token}prefect-crew run {shlex.quote(name) if name else url}{inputs}"
        line = f"Serving the crew {program.name} at {url}  Try: {line}  Stop: Ctrl-C"
        asyncio.run(_Uvicorn(server, on_started=lambda: print_line(line)).serve(sockets=[listener]))
    return 0
