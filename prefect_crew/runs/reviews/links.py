"""Answer links: the notification that brings the link of a question to people who have no Prefect.

    {receiver}/answer/{id of the question}

Anybody who has the URL can answer the question while it is open. The first answer counts. So the id stands in the
notification alone: in no event, log, artifact or name. The notification has no text of the crew, since chat programs
make links, mentions and formatting of text.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from prefect.blocks.core import Block
from prefect.client.orchestration import get_client

from prefect_crew._internal.asyncio_tasks import call_in_thread
from prefect_crew._internal.clock import moment
from prefect_crew._internal.prefect_api import lock_here
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS, prefect_error
from prefect_crew.client._transport import checked_url
from prefect_crew.client.models import ReviewRequest
from prefect_crew.crew import WaitPolicy
from prefect_crew.exceptions import ConfigurationError, CrewError
from prefect_crew.runs.database import in_store
from prefect_crew.settings import CrewSettings
from prefect_crew.store.questions import open_link
from prefect_crew.webhooks import UNLIMITED

if TYPE_CHECKING:
    from prefect_crew.runs.run import LiveRun

ASKED_ALERT = "prefect-crew: alert asked"
"""The automation (automations.py) whose block sends the links. Its own alert goes out for questions without a link."""
NOTIFY_WITHIN = 20.0
"""Seconds to load the block and to send one notification."""
_WORDS = re.compile(r"[^\W_](?:[\w /-]{0,78}[^\W_])?")
"""Names that a notification shows. Without dots, signs and colons they are no link, mention or formatting."""
_SENDERS = ("apprise", "httpx", "urllib3", "slack_sdk")
"""Libraries whose loggers may write the body of a notification, or a URL with it, at the level DEBUG or INFO."""


async def notify_people(run: LiveRun, request: ReviewRequest, policy: WaitPolicy) -> None:
    """Send people the link for a question by the stored block; send none if a person has disabled its automation, or if
    an earlier wait has sent it.

    The link ends with the `human_timeout` of `policy`. One notification is sent at a time in each event loop.

    Raises:
        CrewError: It was not sent, or not in time. The message has the reason, without the link and the block's texts.
    """
    settings = CrewSettings()
    if settings.answer_url is None or run.crew.block is None:
        raise ConfigurationError("the crew is no stored block, so the receiver has no token for it")
    base = checked_url(settings.answer_url, allow_http=True, what="PREFECT_INTEGRATIONS_CREW_ANSWER_URL")
    sender = "the Prefect API"
    try:
        async with lock_here("notifications"), asyncio.timeout(NOTIFY_WITHIN):
            block = await _load_block()
            until = None if block is None else await in_store(open_link, request.id, policy.human_timeout or UNLIMITED)
            if block is None or until is None:
                return
            subject, body = describe_link(run, request, f"{base}/answer/{request.id}", until)
            sender = f"the block {block.get_block_type_slug()}"
            # A block may be sync, and Prefect calls one so in a sync flow: here it would hold up all polls.
            await call_in_thread(asyncio.run, _notify(block, subject, body, request.id))
    except TimeoutError:
        raise CrewError(f"{sender} took more than {NOTIFY_WITHIN:g} s") from None
    except CrewError:
        raise
    except Exception as error:  # noqa: BLE001  a block may raise anything
        # The texts of the block's errors may have the link, or the address of the chat.
        raise CrewError(f"{sender} raised {type(error).__name__}") from None


def describe_link(run: LiveRun, request: ReviewRequest, url: str, until: float) -> tuple[str, str]:
    """Return the subject and the body of the notification about a question."""
    names = {"task": "" if run.show == "none" else run.redact_name(request.task_id), "run": run.idempotency_key or ""}
    facts = [f"{kind} {name}" for kind, name in names.items() if _WORDS.fullmatch(name)]
    return f"Crew {run.crew.label} asks a person", (
        f"{', '.join([f'Crew {run.crew.label} waits for an answer', *facts, f'question {request.round}'])}.\n\n"
        f"Read it and answer:\n{url}\n\n"
        f"Anybody who has this link can answer, until {moment(until):%Y-%m-%d %H:%M} UTC. The first answer counts."
    )


async def _load_block() -> Block | None:
    """Return the block that `automations apply --notify` has named, None if a person has disabled its automation.

    Raises:
        CrewError: There is no such automation, or the Prefect API does not answer or refuses.
    """
    import_module("prefect.blocks.notifications")  # so that Prefect finds the classes of its own blocks
    try:
        async with get_client() as client:
            automations = await client.read_automations_by_name(ASKED_ALERT)
        if not automations:
            raise ConfigurationError("no block is named for links: prefect-crew automations apply --notify TYPE/NAME")
        if not automations[0].enabled:
            return None
        action: Any = automations[0].actions[0]
        return await Block.aload_from_ref(action.block_document_id)
    except PREFECT_ERRORS as error:
        raise prefect_error(error, "The block cannot be loaded.") from None


async def _notify(block: Any, subject: str, body: str, token: str) -> None:
    with _unlogged(token), block.raise_on_failure():
        # By Prefect's context, a block's method returns a coroutine or does its work at once.
        sending = block.notify(body=body, subject=subject)
        if inspect.isawaitable(sending):
            await sending


@contextmanager
def _unlogged(token: str) -> Generator[None]:
    """Drop the lines with a token from the logs of libraries that send notifications."""

    def has_no_token(line: logging.LogRecord) -> bool:
        return token not in line.getMessage()

    # The filter of a logger is not one of the loggers below it.
    names = {*_SENDERS, *(name for name in [*logging.root.manager.loggerDict] if name.startswith(_SENDERS))}
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(has_no_token)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(has_no_token)
