"""Ending asyncio tasks, so that what a cancelled one has yet to do is neither cut off nor lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import anyio
from prefect.exceptions import ExternalSignal

P = ParamSpec("P")
T = TypeVar("T")
ENDINGS = (asyncio.CancelledError, KeyboardInterrupt, SystemExit, ExternalSignal)
"""How a task is ended from outside: cancelled, or by a signal whose exception was raised in the midst of it."""


async def cancel_and_wait(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks once each, and return when all have ended, however they did.

    Not `asyncio.gather`: a second cancellation of the caller would cancel the tasks a second time, and cut off what
    they finish after the first one: a POST in flight, the stop of a crew.
    """
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # or asyncio complains that nobody has asked for it


def cancelled_once(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Have a cancellation reach a coroutine once, and see what it then does to its end.

    A timeout of Prefect is a cancel scope of anyio: it cancels at every await until the scope is left, also through
    `asyncio.gather`, and would cut off what a cancelled start, wait or batch has to do yet: give a claim back, see a
    kickoff in flight to its end, stop a crew. That has time limits of its own.
    """

    @wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        work = asyncio.create_task(function(*args, **kwargs))
        args, kwargs = (), {}  # pyright: ignore[reportAssignmentType]  error reporters show the variables of frames
        try:
            await asyncio.wait({work})
        except BaseException:
            if not work.done() and not work.cancelling():  # a loop that ends has cancelled all of its tasks itself
                work.cancel()
            while not work.done():
                with suppress(asyncio.CancelledError), anyio.CancelScope(shield=True):
                    await asyncio.wait({work})
            if not work.cancelled():
                work.exception()  # or asyncio complains that nobody has asked for it
            raise
        return work.result()

    return call
