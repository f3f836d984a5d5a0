"""The HTTP side of the dev server."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from typing import Any, Literal

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from prefect_crew.devserver._json import JSONAnswer
from prefect_crew.devserver.faults import Fault, Faults
from prefect_crew.devserver.middleware import FaultLayer, TokenLayer, faults_of_run
from prefect_crew.devserver.response_formats import DialectName, cannot_stop, dialect_named
from prefect_crew.devserver.runs import Answer, Execution, Hooks, HooksError, Journal, NotWaitingError, Program
from prefect_crew.devserver.state import Counters, Executions, Runtime, StoppedTooLateError, die
from prefect_crew.devserver.webhooks import CALLBACKS, Generation, ReviewWebhook, WebhookSender


def inspect_route(runtime: Runtime) -> Route:
    """Return the route of the page.

    Its body: `requests` by place, `answers` by "PLACE STATUS", `unauthorized`, `kickoffs`, `kickoffs_by_key`,
    `faults` that came ("FAULT" and its occurrence), `webhooks` by "KIND STATUS", and `runs` (id, state, meta, inputs,
    restore_from).
    """

    async def requests(request: Request) -> Response:
        counters = runtime.counters
        return JSONAnswer(
            {
                "requests": dict(counters.requests),
                "answers": {f"{place} {status}": count for (place, status), count in counters.answers.items()},
                "unauthorized": counters.unauthorized,
                "kickoffs": counters.kickoffs,
                "kickoffs_by_key": dict(counters.kickoffs_by_key),
                "faults": [{"fault": str(it.fault), "occurrence": it.occurrence} for it in runtime.faults.fired],
                "webhooks": {f"{kind} {status}": count for (kind, status), count in runtime.sender.sent.items()},
                "runs": [
                    {
                        "id": run.id,
                        "state": str(run.state),
                        "meta": run.meta,
                        "inputs": dict(run.inputs),
                        "restore_from": run.restore_from,
                    }
                    for run in runtime.runs
                ],
            }
        )

    return Route("/_test/requests", requests, methods=["GET"])


BODY_LIMIT = 16 * 1024 * 1024
"""Bytes of a request body; larger ones are answered with 413."""

STATUS_PATHS = ("/status/{id}", "/{id}/status")
"""The two paths of the status call that servers in the field have."""


def create_app(
    program: Program | Mapping[str, Program],
    *,
    token: str,
    dialect: DialectName | str = "documented",
    generation: Generation = "first",
    faults: Faults | Iterable[Fault | str] | None = None,
    status_paths: Iterable[str] = STATUS_PATHS,
    stop: bool = True,
    max_runs: int | None = None,
    journal: str | os.PathLike[str] | None = None,
    on_crash: Literal["rerun", "lose"] = "rerun",
    inspect: bool = False,
    new_id: Callable[[], str] | None = None,
    counters: Counters | None = None,
    crash: Callable[[], None] = die,
    review_webhook: ReviewWebhook | None = None,
) -> Starlette:
    """Return an ASGI app that serves one crew, or several: a mapping mounts each under `/NAME`.

    Args:
        program: What is run.
        token: The bearer token that every request but `GET /` (and `GET /NAME` of a crew) must carry.
        dialect: documented, union or live; see `dialects`.
        generation: Of the webhooks' bodies: first or later; see `bodies`.
        faults: What goes wrong; see `faults`.
        status_paths: Which of STATUS_PATHS there are.
        stop: Whether there is `/stop`; the published contract has none.
        max_runs: At most this many runs of a crew at once; later ones are pending.
        journal: A file that lets a restarted server know its runs again; see `journal`.
        on_crash: What becomes of runs in flight after a restart: rerun (from the start, same id) or lose.
        inspect: Whether there is `GET /_test/requests`; see `inspection`.
        new_id: Makes the ids of runs; UUIDs by default.
        counters: Counts on where an earlier app stopped.
        crash: What the fault `crash` does; by default it ends the process.
        review_webhook: Asks people as a Flow does: by a signed webhook there, answered at its callback URL.

    Raises:
        ValueError: An unknown dialect, fault or status path, or an empty token.
    """
    if not token:
        raise ValueError("The token must not be empty: every deployed crew has one.")
    paths = tuple(status_paths)
    if not paths or set(paths) - set(STATUS_PATHS):
        raise ValueError(f"status_paths must be one or both of {', '.join(STATUS_PATHS)}, not {paths!r}.")
    faults = faults if isinstance(faults, Faults) else Faults(faults or ())
    sender = WebhookSender(faults, generation=generation, review=review_webhook)
    book = Journal(journal) if journal else None
    programs = dict(program) if isinstance(program, Mapping) else {"": program}
    crews = {
        # Two mounts may serve one script: what tells their runs apart in the journal is the mount.
        name: Executions(
            one, name=name, listener=sender, max_runs=max_runs, journal=book, on_crash=on_crash, new_id=new_id
        )
        for name, one in programs.items()
    }
    runtime = Runtime(
        token=token,
        dialect=dialect_named(dialect),
        faults=faults,
        counters=Counters() if counters is None else counters,
        sender=sender,
        crews=crews,
        journal=book,
        crash=crash,
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None, None]:
        await runtime.start()
        try:
            yield
        finally:
            await runtime.close()

    routes: list[BaseRoute] = [inspect_route(runtime)] if inspect else []
    for name, executions in crews.items():
        endpoints = _Endpoints(runtime, executions)
        one = endpoints.routes(paths, stop=stop)
        # Within a mount no path is empty: its health page without a slash at the end, and the server's own, come first.
        routes += [endpoints.page(f"/{name}"), endpoints.page("/"), Mount(f"/{name}", routes=one)] if name else one
    app = Starlette(
        routes=routes,
        middleware=[Middleware(TokenLayer, runtime=runtime)],
        lifespan=lifespan,
        exception_handlers={404: _nothing_here(runtime), 405: _nothing_here(runtime)},
    )
    app.router.redirect_slashes = False
    app.state.runtime = runtime
    return app


def runtime_of(app: Starlette) -> Runtime:
    """Return the runtime of an app that `create_app` made."""
    return app.state.runtime


class _BadRequestError(Exception):
    def __init__(self, code: int, error: str, message: str) -> None:
        self.code, self.error, self.message = code, error, message


class _Endpoints:
    """The calls of one crew."""

    def __init__(self, runtime: Runtime, executions: Executions) -> None:
        self._runtime = runtime
        self._executions = executions

    def routes(self, status_paths: tuple[str, ...], *, stop: bool) -> list[BaseRoute]:
        routes = [
            self._route("/", "GET", "health", self.health),
            self._route("/inputs", "GET", "inputs", self.inputs),
            self._route("/kickoff", "POST", "kickoff", self.kickoff),
            self._route("/resume", "POST", "resume", self.resume),
            self._route(f"{CALLBACKS}{{token}}", "POST", "resume", self.callback),
        ]
        if stop:
            routes.append(self._route("/stop/{id:path}", "POST", "stop", self.stop))
        # Ids may hold anything, slashes too.
        routes += [
            self._route(path.replace("{id}", "{id:path}"), "GET", "status", self.status) for path in status_paths
        ]
        return routes

    def page(self, path: str) -> BaseRoute:
        """Return a further path of the health page."""
        return self._route(path, "GET", "health", self.health)

    def _route(self, path: str, method: str, place: str, endpoint: Callable[[Request], Any]) -> BaseRoute:
        layer = Middleware(FaultLayer, place=place, runtime=self._runtime)
        return Route(path, self._safe(endpoint), methods=[method], middleware=[layer])

    def _safe(self, endpoint: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def call(request: Request) -> Response:
            try:
                return await endpoint(request)
            except _BadRequestError as error:
                return self._error(error.code, error.error, error.message)

        return call

    def _error(self, code: int, error: str, message: str, details: dict[str, Any] | None = None) -> Response:
        status, body = self._runtime.dialect.error(code, error, message, details)
        return JSONAnswer(body, status)

    async def health(self, request: Request) -> Response:
        return PlainTextResponse("Healthy")

    async def inputs(self, request: Request) -> Response:
        return JSONAnswer(self._runtime.dialect.inputs(self._executions.program.inputs()))

    async def kickoff(self, request: Request) -> Response:
        body = await _json_body(request)
        inputs = body.get("inputs")
        if not isinstance(inputs, dict):
            raise _BadRequestError(400, "Invalid request", "The body needs `inputs`, an object of names to values.")
        hooks = _hooks(body)
        given: dict[str, Any] = inputs  # pyright: ignore[reportUnknownVariableType]
        needed = [item.name for item in self._executions.program.inputs() if item.required]
        if missing := [name for name in needed if given.get(name) is None]:
            message = f"Missing required inputs: {', '.join(missing)}"
            return self._error(422, "Validation error", message, {"missing_inputs": missing})
        restore_from = body.get("restoreFromStateId")
        ids = {"inputs.id": given.get("id") if self._executions.flow else None, "restoreFromStateId": restore_from}
        if wrong := [name for name, value in ids.items() if value is not None and not _is_uuid(value)]:
            return self._error(422, "Validation Error", f"'{wrong[0]}' must be a valid UUID.")
        faults = {fault.kind.name: fault for fault in faults_of_run(request.scope)}
        run = self._executions.start(
            given, meta=body.get("meta"), hooks=hooks, restore_from=restore_from, stuck="stuck" in faults
        )
        self._runtime.counters.accepted[run.id] = run.meta
        run.base_url = str(request.base_url).rstrip("/")
        if early := faults.get("early-404"):
            run.hidden_polls = math.ceil(early.value or 0)
        if early := faults.get("early-404-seconds"):
            run.hidden_until = time.monotonic() + (early.value or 0)
        return JSONAnswer({"kickoff_id": run.id})

    async def status(self, request: Request) -> Response:
        run = self._executions.get(request.path_params["id"])
        if run is None or run.forgotten or _still_hidden(run):
            code, body = self._runtime.dialect.unknown()
            return JSONAnswer(body, code)
        return JSONAnswer(self._runtime.dialect.status(run))

    async def resume(self, request: Request) -> Response:
        body = await _json_body(request)
        id_, task_id, feedback = _text(body, "execution_id"), _text(body, "task_id"), _text(body, "human_feedback")
        approve = body.get("is_approve")
        if not isinstance(approve, bool):
            raise _BadRequestError(400, "Invalid request", "The body needs `is_approve`, true or false.")
        run = self._known(id_)
        hooks = _hooks(body)
        if self._runtime.sender.review is not None:
            raise _BadRequestError(400, "Execution not pending", "A Flow takes its answer at the callback URL.")
        try:
            word = run.answer(task_id, Answer(approve=approve, feedback=feedback), hooks)
        except NotWaitingError:
            message = f"The execution is not pending human input for task {task_id}."
            raise _BadRequestError(400, "Execution not pending", message) from None
        return JSONAnswer({"status": word, "message": _RESUMED[word]})

    async def callback(self, request: Request) -> Response:
        body = await _json_body(request)
        feedback, asked = _text(body, "feedback"), self._runtime.sender.asked.get(request.path_params["token"])
        if asked is None:
            raise _BadRequestError(401, "unauthorized", "Invalid response token")
        run, question = asked
        options = self._runtime.sender.review.options if self._runtime.sender.review else ()
        approve = not options or feedback.casefold().startswith(options[0].casefold())
        if run.questions.get(question.task_id) is not question or run.state.ended:
            raise _BadRequestError(409, "already_responded", "Feedback was already provided.")
        run.answer(question.task_id, Answer(approve=approve, feedback=feedback), run.hooks)
        return JSONAnswer({"status": "accepted", "request": {"status": "responded", "feedback": feedback}})

    async def stop(self, request: Request) -> Response:
        run = self._known(request.path_params["id"])
        try:
            self._executions.stop(run)
        except StoppedTooLateError:
            code, body = cannot_stop(run)
            return JSONAnswer(body, code)
        return JSONAnswer({"status": "stopped", "kickoffId": run.id})

    def _known(self, id_: str) -> Execution:
        run = self._executions.get(id_)
        if run is None or run.forgotten:
            raise _BadRequestError(404, "Execution not found", "No execution found with the given id.")
        return run


_RESUMED = {
    "resumed": "The answer was accepted and the crew goes on.",
    "retrying": "The task runs again with the feedback.",
    "completed": "The answer was accepted; it was the last task.",
}


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise _BadRequestError(400, "Invalid request", f"The body needs `{name}`, a text.")
    return value


def _is_uuid(value: Any) -> bool:
    try:
        uuid.UUID(value)
    except (AttributeError, TypeError, ValueError):
        return False
    return True


def _still_hidden(run: Execution) -> bool:
    if run.hidden_polls > 0:
        run.hidden_polls -= 1
        return True
    return time.monotonic() < run.hidden_until


def _hooks(body: dict[str, Any]) -> Hooks:
    try:
        return Hooks.of(body)
    except HooksError as error:
        raise _BadRequestError(400, "Invalid request", f"The webhooks make no sense: {error}.") from None


async def _json_body(request: Request) -> dict[str, Any]:
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > BODY_LIMIT:
            raise _BadRequestError(413, "Request too large", f"A body may have {BODY_LIMIT} bytes.")
        chunks.append(chunk)
    try:
        body = json.loads(b"".join(chunks))
    except (ValueError, RecursionError):
        raise _BadRequestError(400, "Invalid request", "The body is not JSON.") from None
    if not isinstance(body, dict):
        raise _BadRequestError(400, "Invalid request", "The body must be a JSON object.")
    return body  # pyright: ignore[reportUnknownVariableType]


def _nothing_here(runtime: Runtime) -> Callable[[Request, Exception], Response]:
    def handler(request: Request, error: Exception) -> Response:
        code = getattr(error, "status_code", 404)
        title = "Not found" if code == 404 else "Method not allowed"
        message = f"There is no route {request.method} {request.url.path} here."
        status, body = runtime.dialect.error(code, title, message)
        return JSONAnswer(body, status, headers=getattr(error, "headers", None))

    return handler
