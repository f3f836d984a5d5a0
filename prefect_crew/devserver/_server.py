"""The dev server: a crew behind the crew API, in a thread of this process, or in this thread until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import secrets
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from pydantic import AliasChoices, BaseModel, Field, StrictBool, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefect_crew.client.encoding import is_uuid
from prefect_crew.client.webhooks import Webhooks
from prefect_crew.devserver._faults import Fault, Faults
from prefect_crew.devserver._response_formats import FORMATS, WORDS, FormatName
from prefect_crew.devserver._runs import Answer, ProgramError, Run
from prefect_crew.devserver._scripts import Spec, load_program
from prefect_crew.devserver._webhooks import WebhookSender
from prefect_crew.devserver.web_server import WebServer, open_listener
from prefect_crew.states import CrewState

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


class _RefusedError(Exception):
    """An error as an answer: its HTTP status and its body."""


class _JSON(JSONResponse):
    """JSON in ASCII, since a crew may return text that UTF-8 cannot hold, and a program values that JSON cannot hold.

    It has no blanks, like the JSON of hosted crews (FastAPI), since some clients cut the id out of the text.
    """

    def render(self, content: Any) -> bytes:
        return json.dumps(content, default=str, separators=(",", ":")).encode()


class _Protocol(H11Protocol):
    """uvicorn's HTTP protocol, which lets a request drop its TCP connection: `request.state.drop()`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "drop": transport.abort}


class CrewServer:
    """A crew server on a port of 127.0.0.1, in a thread of this process; `with` starts and stops it.

    Args:
        spec: The crew; see `load_program`.
        port: The port; 0 takes a free one.
        token: The bearer token that every request but `GET /` must carry; a random one by default.
        response_format: The words of answers: "documented" is the published API to the letter, "live" is what crews
            on AMP really answer.
        faults: Mistakes of the server, as `Fault` or as text such as "status:500@1".
        speed: The divisor of the seconds in scripts.

    Attributes:
        port: The port; 0 before the first start of a server that takes a free one.
        token: The bearer token. A new value rotates the token: from then on, the old token gets 401.
        program: The crew. A new value deploys the crew anew.
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
    ) -> None:
        self.program = load_program(spec, speed=speed)
        self.port: int = port
        self.token: str = token or secrets.token_urlsafe(24)
        self.faults: Faults = Faults(faults)
        self.requests: Counter[str] = Counter()
        self.unauthorized: int = 0
        self.accepted: dict[str, Any] = {}
        self.on_kickoff: Callable[[str], None] = lambda kickoff_id: None
        self._format = FORMATS[response_format]
        self._runs: dict[str, Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._held: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._sender: Callable[[Run, str, Any], None] = WebhookSender(self.faults, self._spawn, self._format)
        self.asgi: Starlette = Starlette(
            routes=self._routes(),
            lifespan=self._lifespan,
            exception_handlers={404: self._not_here, 405: self._not_here},
        )
        self.asgi.router.redirect_slashes = False
        self._web: WebServer | None = None
        self._thread: threading.Thread | None = None

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
    def is_flow(self) -> bool:
        """Whether the crew is a Flow."""
        return getattr(self.program, "flow", False)

    @property
    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        return list(self._runs.values())

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

    @property
    def held(self) -> int:
        """How many requests the fault `hold` keeps waiting now."""
        return len(self._held)

    def release(self) -> None:
        """Let the requests go on that the fault `hold` keeps waiting. Later ones are held again."""
        for loop, released in [*self._held]:
            loop.call_soon_threadsafe(released.set)

    def crew(self, **fields: Any) -> DeployedCrew:
        """Return a Prefect block for this server. `fields` are further fields of the block."""
        from prefect_crew.blocks import DeployedCrew

        values: dict[str, Any] = {"url": self.url, "token": self.token, "flow": self.is_flow}
        return DeployedCrew(**values | fields)

    def start(self) -> None:
        """Start the server in a thread, and return once it answers.

        Raises:
            OSError: The port is taken.
            RuntimeError: The server runs already.
        """
        if self._thread is not None:
            raise RuntimeError(f"{self!r} runs already")
        listener = open_listener("127.0.0.1", self.port)
        self.port = listener.getsockname()[1]
        name, started = f"crew server {self.url}", threading.Event()
        self._thread = threading.Thread(target=self.serve, args=(listener, started.set), name=name, daemon=True)
        self._thread.start()
        started.wait()

    def stop(self) -> None:
        """Stop the server and cancel the runs in flight. The port is free when this returns. Idempotent."""
        if self._web is not None and self._thread is not None:
            self._web.should_exit = True
            self._thread.join()
            self._thread = None

    def serve(self, listener: socket.socket, on_started: Callable[[], None]) -> None:
        """Serve in this thread. The main thread serves until Ctrl-C or SIGTERM, which cancel the runs in flight."""
        self._web = WebServer(
            self.asgi, on_started=on_started, http=_Protocol, loop="asyncio", timeout_graceful_shutdown=1
        )
        asyncio.run(self._web.serve(sockets=[listener]))

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncGenerator[None, None]:
        yield
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # The runs

    def _start(self, run: Run) -> None:
        run.is_flow, run.listener = self.is_flow, self._sender
        self._runs[run.id] = run
        run.task = self._spawn(self._execute(run))

    async def _execute(self, run: Run) -> None:
        outcome, error = None, None
        try:
            run.begin()
            if "stuck" in run.faults:
                await asyncio.get_running_loop().create_future()
            outcome = await self.program.execute(run)
        except asyncio.CancelledError:
            error = "the crew was cancelled from within"
        except ProgramError as failure:
            error = str(failure)
        # An error of the crew is a failed run, never a broken server; sys.exit() would end the event loop.
        except (Exception, SystemExit) as failure:  # noqa: BLE001
            error = f"{type(failure).__name__}: {failure}"
        if run.task is not None and not run.task.cancelling():  # else it was stopped, or the server has ended
            run.end(CrewState.COMPLETED if error is None else CrewState.FAILED, outcome=outcome, error=error)

    def _renamed(self, run: Run) -> str:
        """Give a run a new id, and return it. The old one is unknown from then on."""
        old, run.id = run.id, str(uuid.uuid4())
        run.former_ids.add(old)
        # Replaced in its place, since the order of runs is that of their kickoffs, and another thread reads it.
        self._runs = {run.id if id_ == old else id_: one for id_, one in self._runs.items()}
        return run.id

    def _known_run(self, id_: str) -> Run:
        run = self._runs.get(id_)
        if run is None or "forgotten" in run.faults:
            raise _RefusedError(404, self._format.error("Execution not found", "No execution has the given id."))
        return run

    # The calls

    def _routes(self) -> list[Route]:
        calls: list[tuple[str, str, str, Work]] = [
            ("GET", "/", "health", self._health),
            ("GET", "/inputs", "inputs", self._inputs),
            ("GET", "/inspect", "inspect", self._inspect),
            ("POST", "/kickoff", "kickoff", self._kickoff),
            ("POST", "/resume", "resume", self._resume),
            ("POST", "/stop/{id:path}", "stop", self._stop),  # ids may hold anything, slashes too
            ("GET", "/status/{id:path}", "status", self._status),
            ("GET", "/{id:path}/status", "status", self._status),
        ]
        return [Route(path, partial(self._call, place, work), methods=[method]) for method, path, place, work in calls]

    def _has_token(self, request: Request) -> bool:
        given = request.headers.get("Authorization", "")
        return hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode())

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

    async def _call(self, place: str, work: Work, request: Request) -> Response:
        """Do the work of a call, with its faults."""
        if place != "health" and not self._has_token(request):
            return self._unauthorized(request)
        self.requests[place] += 1
        # A look at the version is in nobody's count of requests, so `any` leaves it out.
        drawn = self.faults.draw(place, *(() if place == "inspect" else ("any",)))
        # A slow server has the request, and goes on with it after a client that has given up; and a socket that is
        # closed with unread data is reset instead.
        await request.body()
        for fault in drawn:
            if fault.kind.group == "time":
                await asyncio.sleep(fault.value or 0)
            elif fault.kind.group == "hold" and not fault.is_after:
                await self._hold()
        spoiling = next((fault for fault in drawn if fault.kind.group == "answer"), None)
        request.state.faults_of_run = {fault.name: fault.value or 0 for fault in drawn if fault.kind.group == "run"}
        if spoiling is None or spoiling.is_after:
            try:
                answer = await work(request)
            except _RefusedError as error:
                status, body = error.args
                answer = PlainTextResponse(body, status) if isinstance(body, str) else _JSON(body, status)
            if any(fault.kind.group == "hold" and fault.is_after for fault in drawn):
                await self._hold()
            if spoiling is None or answer.status_code >= 400:  # where nothing was accepted, there is no "after"
                return answer
        return await self._spoiled(spoiling, request)

    async def _hold(self) -> None:
        held = (asyncio.get_running_loop(), asyncio.Event())
        self._held.append(held)
        try:
            await held[1].wait()
        finally:
            self._held.remove(held)

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

    async def _health(self, request: Request) -> Response:
        return _JSON({"detail": "Not Found"}, 404) if self._format.is_live else PlainTextResponse("Healthy")

    async def _inputs(self, request: Request) -> Response:
        return _JSON(self._format.inputs(self.program))

    async def _inspect(self, request: Request) -> Response:
        definition = getattr(self.program, "definition", None)
        if definition is None:
            raise _RefusedError(404, self._format.error("Not Found", "This crew has no definition to inspect."))
        return _JSON(definition())

    async def _kickoff(self, request: Request) -> Response:
        is_live = self._format.is_live
        body, targets = await self._read(request, _LiveKickoff if is_live else _Kickoff)
        inputs = body.inputs
        missing = [item.name for item in self.program.inputs() if item.required and inputs.get(item.name) is None]
        if missing and not (is_live and self.is_flow):
            raise _RefusedError(*self._format.missing(missing))
        if is_live and not self.is_flow:
            inputs = {name: str(value) for name, value in inputs.items()}
        flow_id = inputs.get("id") if self.is_flow else None
        for name, value in (("inputs.id", flow_id), ("restoreFromStateId", body.restore_from)):
            if value is not None and not is_live and not is_uuid(value):
                raise _RefusedError(422, self._format.error("Validation Error", f"'{name}' must be a valid UUID."))
        run = Run(inputs, meta=body.meta, targets=targets, restore_from=body.restore_from)
        run.faults |= request.state.faults_of_run
        self._start(run)
        self.accepted[run.id] = run.meta
        self.on_kickoff(run.id)
        return _JSON({"kickoff_id": run.id})

    async def _status(self, request: Request) -> Response:
        run = self._runs.get(request.path_params["id"])
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
        word = run.answer(body.task_id, Answer(body.is_approve, body.human_feedback), targets)
        if word is None:
            message = f"The execution is not pending human input for task {body.task_id}."
            raise _RefusedError(400, self._format.error("Execution not pending", message))
        return _JSON({"status": word, "message": f"The answer was accepted: {word}."})

    async def _resume_live(self, request: Request) -> Response:
        """Answer any execution and any task with a new id; only a question's own run goes on under it."""
        body, targets = await self._read(request, _LiveResume)
        run = self._runs.get(body.execution_id)
        if run is None or body.task_id not in run.questions:
            return _JSON({"kickoff_id": str(uuid.uuid4())})
        kickoff_id = self._renamed(run)
        run.answer(body.task_id, Answer(body.is_approve, body.human_feedback), targets)
        return _JSON({"kickoff_id": kickoff_id})

    async def _stop(self, request: Request) -> Response:
        run = self._known_run(request.path_params["id"])
        if run.state.ended:  # never published, and the same in both formats
            return _JSON({"detail": f"Cannot stop execution. Current state: {WORDS[run.state][0]}"}, 400)
        run.end(CrewState.STOPPED)
        if run.task is not None:
            run.task.cancel()
        return _JSON({"status": "stopped", "kickoffId": run.id})

    async def _spoiled(self, fault: Fault, request: Request) -> Response:
        """Return the answer that a fault gives, before the work or after it."""
        match fault.base_name:
            case "drop":
                return await self._dropped(request)
            case "timeout":
                until = time.monotonic() + (fault.value or float("inf"))
                while not (await request.is_disconnected() or time.monotonic() > until or self._is_ending):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
                return await self._dropped(request)
            case "redirect":
                return Response(status_code=307, headers={"Location": f"/elsewhere{request.url.path}"})
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

    @property
    def _is_ending(self) -> bool:
        return self._web is not None and self._web.should_exit

    async def _dropped(self, request: Request) -> Response:
        """Drop the connection of a request: no answer reaches anybody."""
        request.state.drop()
        while not await request.is_disconnected():  # noqa: ASYNC110
            await asyncio.sleep(0)
        return Response()
