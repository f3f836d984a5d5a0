"""Crews that ask a person: what the local crew server's own states cannot show, such as a server that lags.

`AskingServer` has the crew API over HTTP on loopback and keeps showing a question for as long as the test says.
`Asking` is a program for the local crew server whose next round begins once the state in between was read.
"""

import asyncio
from collections.abc import Callable
from typing import Any
from uuid import uuid4

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from prefect_crew.client.models import CrewInput, Review, ReviewRequest
from prefect_crew.devserver import Outcome, Run


def judging(asked: list[ReviewRequest], *, approves_at: float = 1, feedback: str = "") -> Callable[..., Review]:
    """Return a review function that keeps the questions, and rejects all of the rounds before `approves_at`.

    Its own feedback has the round: two drafts in the same words are one question for five minutes.
    """

    def judge(request: ReviewRequest) -> Review:
        asked.append(request)
        approve = request.round >= approves_at
        return Review(approve=approve, feedback=feedback or ("" if approve else f"no {request.round}"))

    return judge


class AskingServer:
    """One crew that asks `rounds` times. Each run goes on `lag` status calls after an answer.

    `changing`: the sentence for people and the last step change with every status call, as on servers that count
    seconds. `shown`: the status shows the output. `fails`: the answer to `/resume`, by its number, instead of 200;
    the answer of the person is taken all the same.
    """

    def __init__(
        self, *, rounds: int = 1, lag: int = 0, changing: bool = False, shown: bool = False, between: bool = True,
        fails: dict[int, int] | None = None,
    ) -> None:  # fmt: skip
        self.rounds, self.lag, self.changing, self.shown, self.between = rounds, lag, changing, shown, between
        self.fails = fails or {}
        self.starts: list[dict[str, Any]] = []
        self.resumes: list[dict[str, Any]] = []
        self.run_id = f"asking-{uuid4()}"
        self.kickoffs = 0
        self.polls = 0
        self._left: int | None = None
        self._round = 1

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/inputs", self._inputs),
                Route("/kickoff", self._kickoff, methods=["POST"]),
                Route("/status/{id}", self._status),
                Route("/resume", self._resume, methods=["POST"]),
            ]
        )

    async def _inputs(self, request: Request) -> Response:
        return JSONResponse({"inputs": []})

    async def _kickoff(self, request: Request) -> Response:
        self.kickoffs += 1
        self.starts.append(await request.json())
        return JSONResponse({"kickoff_id": self.run_id})

    async def _status(self, request: Request) -> Response:
        self.polls += 1
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                self._left, self._round = None, self._round + 1
                if self.between and self._round <= self.rounds:
                    return JSONResponse({"state": "RUNNING"})
        if self._round > self.rounds:
            return JSONResponse({"state": "SUCCESS", "result": "done"})
        body: dict[str, Any] = {"state": "PENDING_HUMAN_INPUT", "task_id": "draft"}
        if self.changing:
            body |= {"status": f"Waiting for human input, {self.polls} s", "last_step": f"thought {self.polls}"}
        if self.shown:
            body["task_output"] = f"draft {self._round}"
        return JSONResponse(body)

    async def _resume(self, request: Request) -> Response:
        self.resumes.append(await request.json())
        if self._left is None:
            self._left = self.lag
        status = self.fails.get(len(self.resumes))
        return Response("broken", status) if status else JSONResponse({"status": "resumed"})


class Asking:
    """A program that asks until it is approved, always the same. The next round waits for a read of the status."""

    name = "asking"

    def __init__(self, *, output: str = "always the same") -> None:
        self.output = output
        self.polls: Callable[[], int] = lambda: 0

    def inputs(self) -> list[CrewInput]:
        return []

    async def execute(self, run: Run) -> Outcome:
        run.plan(["draft"])
        run.task_started("draft")
        while not (await run.ask(task_id="draft", output=self.output)).approve:
            # Two: one may have been under way.
            seen = self.polls()
            while self.polls() < seen + 2:
                await asyncio.sleep(0.005)
        return Outcome(output=self.output)
