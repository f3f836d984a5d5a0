"""The page of a question in a real browser: on a phone and a desktop, light and dark, with any text of a crew."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from prefect_crew.client.models import CrewInput
from prefect_crew.devserver import CrewServer, Outcome
from support.chromium import Chromium
from support.links import QUICK, Chat, answers_of, running

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_api")]

HOSTILE = "\n".join(
    [
        "<script>document.title = 'owned'</script><img src=https://evil.example/x.png onerror=alert(1)>",
        '</div></main><form action="https://evil.example/"><button>Send the answer</button></form>',
        '"><style>body { display: none }</style><meta http-equiv=refresh content="0;url=https://evil.example">',
        "{{ 7 * 7 }} {% raw %} javascript:alert(1) &lt;b&gt; \x1b[2J\x00",
        "\u202eevil \u2066right to left",
        "عربي עברית",
        "a" * 3000,
        "Z\u0351\u0352\u0353" * 200,
        "b" * 30_000,
    ]
)


class HostileCrew:
    """A crew of one task with a hostile name and output, which a person has to approve."""

    name = "draft"

    def inputs(self) -> list[CrewInput]:
        return []

    async def execute(self, run: Any) -> Outcome:
        task = "<b>task</b> \u202e evil.example"
        run.plan([task])
        run.task_started(task)
        await run.ask(task_id=task, output=HOSTILE)
        return Outcome(output="done")


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
async def test_a_person_answers_whatever_the_text(
    width: int, dark: bool, chat: Chat, chromium: Chromium, key: str, tmp_path: Path
):
    def answer(url: str) -> str:
        with chromium.page(width=width, height=800, dark=dark) as page:
            page.raw(lambda playwright: playwright.on("dialog", lambda dialog: pytest.fail("a dialog")))
            page.open(url)
            page.screenshot(tmp_path / f"question-{width}.png")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it fits"
            assert page.evaluate("document.title") == "A crew asks"
            assert page.count("form") == page.count("button") == page.count("style") == 1
            assert page.count("main img") == page.count("script") == page.count("main b") == 0
            for text in ("<script>document.title", "[U+202E]evil", "{{ 7 * 7 }}", "The text is cut here."):
                assert text in page.text()
            page.click("button")
            assert page.url == url, "nothing is chosen, so nothing is sent"
            page.click("text=Approve")
            page.fill("textarea", "Fine.")
            page.fill("#name", "Ada <b>")
            page.raw(lambda playwright: playwright.locator("button").dblclick())
            page.wait_for_text("by Ada <b>")
            page.screenshot(tmp_path / f"sent-{width}.png")
            icon = f"{url.split('/answer')[0].removesuffix('/of/crews')}/favicon.ico"
            assert {request.split("?")[0] for request in page.requests} <= {url, icon}
            return page.text()

    with CrewServer(HostileCrew(), response_format="union") as server:
        async with running(server.crew(wait=QUICK, page_url="https://app.example.com/7"), key) as flow_run:
            text = await asyncio.to_thread(answer, await chat.link())
            assert "Your answer was sent" in text or "The question has its answer" in text
            await flow_run
            assert [(review.by, review.feedback) for review in await answers_of(key)] == [("Ada <b>", "Fine.")]
            assert server.requests["resume"] == 1
    assert "evil" not in "".join(chat.texts)
