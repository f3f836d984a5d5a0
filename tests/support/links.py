"""Answer links as people meet them: a chat that gets notifications, and the pages that the links lead to."""

import asyncio
import contextlib
import html
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx
from prefect import flow
from prefect.blocks.notifications import CustomWebhookNotificationBlock, MattermostWebhook
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from pydantic import SecretStr

from prefect_crew import DeployedCrew, Review, WaitPolicy, arun_crew
from prefect_crew.automations import alert_automations, apply_automation
from prefect_crew.runs.database import in_store
from prefect_crew.runs.reviews.links import ASKED_ALERT
from prefect_crew.runs.reviews.questions import reviews_of
from prefect_crew.store import attempts, questions
from support.receiver import Receiver
from support.waiting import until

QUICK = WaitPolicy(initial=0.1, max_interval=0.2)
LINK = re.compile(r"https?://\S+/answer/\S+")


class Chat(Receiver):
    """A chat that a notification block of Prefect posts to."""

    @property
    def texts(self) -> list[str]:
        return [str(got.body.get("text") or f"{got.body['subject']}\n{got.body['body']}") for got in self.got]

    @property
    def links(self) -> list[str]:
        """The links so far. The server's own alert, which has none, goes to this chat too."""
        return [link for text in self.texts for link in LINK.findall(text)]

    async def link(self, number: int = 1) -> str:
        """Return a link, counted from 1, once it has come."""
        await until(lambda: len(self.links) >= number, f"link {number}")
        return self.links[number - 1]


@asynccontextmanager
async def notifying(chat: Chat, *, by_apprise: bool = False) -> AsyncIterator[str]:
    """Set up the automation that names a block which posts to the chat; give the automation's id."""
    data = {"subject": "{{subject}}", "body": "{{body}}"}
    port = int(chat.url.rpartition(":")[2])
    block: Any = MattermostWebhook(hostname="127.0.0.1", port=port, token=SecretStr("t" * 26))
    if not by_apprise:
        block = CustomWebhookNotificationBlock.model_validate({"name": "people", "url": chat.url, "json_data": data})
    block_id = await block.save("people", overwrite=True, _sync=False)
    alerts = alert_automations(block_id, waiting=timedelta(hours=4))
    (asked,) = [automation for automation in alerts if automation.name == ASKED_ALERT]
    async with get_client() as client:
        await apply_automation(client, asked)
        (stored,) = await client.read_automations_by_name(ASKED_ALERT)
        try:
            yield str(stored.id)
        finally:
            with contextlib.suppress(PrefectHTTPStatusError):  # the test has deleted it
                await client.delete_automation(stored.id)


@dataclass(frozen=True)
class Shown:
    """An answer of the receiver: its status and text, and the page as its reader sees it."""

    status: int
    text: str
    headers: dict[str, str]

    @property
    def said(self) -> str:
        """The page without its tags and its style."""
        body = self.text.partition("<body>")[2]
        return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def _shown(answer: httpx.Response) -> Shown:
    headers = {name: value for name, value in answer.headers.items() if name != "date"}
    return Shown(answer.status_code, answer.text, headers)


async def read(url: str, *, method: str = "GET", **headers: str) -> Shown:
    async with httpx.AsyncClient(timeout=60) as client:
        return _shown(await client.request(method, url, headers=headers))


async def send(url: str, *, headers: dict[str, str] | None = None, content: Any = None, **fields: str) -> Shown:
    """Send the form of a page."""
    sent: dict[str, Any] = {"data": fields} if content is None else {"content": content}
    async with httpx.AsyncClient(timeout=60) as client:
        return _shown(await client.post(url, headers=headers, **sent))


@asynccontextmanager
async def running(crew: DeployedCrew, name: str, **options: Any) -> AsyncIterator[asyncio.Task[str]]:
    """Store a crew under a name and run it in a flow; its key is the name."""
    await crew.asave(name, overwrite=True)

    @flow
    async def asks() -> str:
        return (await arun_crew(name, {}, idempotency_key=name, **options)).output

    task = asyncio.create_task(asks())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


async def answers_of(key: str) -> list[Review]:
    """Return the answers on record to the latest run of a key."""
    now, _, asked = await in_store(questions.look, (await in_store(attempts.of_key, key))[-1].id)
    return reviews_of(asked, now)
