"""A crew's server that says back whatever it was sent, the token too, in every answer: the worst one there could be."""

from __future__ import annotations

import asyncio
import html
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from prefect_crew.devserver.web_server import open_listener

__all__ = ["Echo", "echoing"]

BODY: dict[str, str] = {"error": "{said}", "message": "{said}", "detail": "{said}", "status": "error"}


@dataclass
class Echo:
    """What it answers, and where it is.

    Attributes:
        inputs, kickoff, resume, stop: A status code, or "html", "text" or "empty" with 200; None is a good answer.
        accepted: The number of first kickoffs that get a good answer in any case.
        states: Of the status call, one after the other; the last one again and again. A code is an error, a word a
            state, "{said}" a state of which nobody has heard.
        task: The task that waits for a person; "{said}" is all that it was sent.
        received: The inputs that it was sent, in one text.
        discreet: Whether it keeps the token to itself.
        more: Characters that it adds to its output.
    """

    inputs: int | str | None = None
    kickoff: int | str | None = None
    resume: int | str | None = None
    stop: int | str | None = None
    accepted: int = 0
    states: Sequence[int | str] = ("COMPLETED",)
    task: str = "review"
    url: str = ""
    received: str = ""
    asked: int = 0
    kickoffs: int = 0
    discreet: bool = False
    more: int = 0

    def said(self, request: Request) -> str:
        token = "a token" if self.discreet else request.headers.get("authorization")
        return f"you said {token} and {self.received}"

    def answer(self, request: Request, how: int | str | None, good: Any) -> Response:
        said = self.said(request)
        if how is None:
            return JSONResponse(good)
        if how == "html":
            return HTMLResponse(f"<html><title>{html.escape(said)}</title><h1>{html.escape(said)}</h1></html>")
        if how == "text":
            return PlainTextResponse(said)
        if how == "empty":
            return Response(b"")
        details = {"missing_inputs": [said]} if how == 422 else {}
        body = {name: value.format(said=said) for name, value in BODY.items()}
        headers = {"Retry-After": "0"} if how in (429, 503) else {}
        return JSONResponse({**body, "details": details}, int(how), headers=headers)

    async def get_inputs(self, request: Request) -> Response:
        return self.answer(request, self.inputs, {"inputs": ["topic", "secret", "nested"]})

    async def post_kickoff(self, request: Request) -> Response:
        body = await request.json()
        # The values as they are, as they stand in JSON, and each alone.
        self.received = f"{json.dumps(body['inputs'])} {' '.join(map(str, body['inputs'].values()))}"
        self.kickoffs += 1
        if self.kickoff == "drop":
            await asyncio.sleep(5)
        how = None if self.kickoffs <= self.accepted else self.kickoff
        return self.answer(request, how, {"kickoff_id": f"run-{uuid4()}"})

    async def get_status(self, request: Request) -> Response:
        state = self.states[min(self.asked, len(self.states) - 1)]
        self.asked += 1
        if not isinstance(state, str) or state in ("html", "text", "empty"):
            return self.answer(request, state, None)
        said = self.said(request)
        task = {"task_id": said, "name": said, "agent": said, "output": said, "description": said}
        ended = {
            "result": {"output": said + "x" * self.more, "tasks": [task], "json_dict": {said: [said]}},
            "execution_time": 1.0,
        }
        running = {"current_task": said, "last_step": said, "progress": {"completed_tasks": 0, "total_tasks": 2}}
        body = {"state": state.replace("{said}", said), "status": said, **(ended if state == "COMPLETED" else running)}
        if state == "FAILED":
            body |= {"error": said, "result": said}
        if state == "PENDING_HUMAN_INPUT":
            body |= {"task_id": self.task.replace("{said}", said), "output": said}
        return JSONResponse(body)

    async def post_resume(self, request: Request) -> Response:
        return self.answer(request, self.resume, {"status": "resumed", "message": self.said(request)})

    async def post_stop(self, request: Request) -> Response:
        return self.answer(request, self.stop, {"status": "stopped", "message": self.said(request)})

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/inputs", self.get_inputs),
                Route("/kickoff", self.post_kickoff, methods=["POST"]),
                Route("/status/{id}", self.get_status),
                Route("/resume", self.post_resume, methods=["POST"]),
                Route("/stop/{id}", self.post_stop, methods=["POST"]),
            ]
        )


@contextmanager
def echoing(echo: Echo) -> Iterator[Echo]:
    """Serve it on a free port."""
    config = uvicorn.Config(echo.app(), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    socket = open_listener("127.0.0.1", 0)
    echo.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[socket])))
    thread.start()
    try:
        yield echo
    finally:
        server.should_exit = True
        thread.join()
        socket.close()
