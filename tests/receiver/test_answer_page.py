"""The page of a question in a real browser: on a phone and a desktop, light and dark, with any text of a crew."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

import pytest

from prefect_crew.devserver import CrewServer
from support.chromium import Chromium
from support.links import QUICK, Chat, answers_of, running
from support.scripts import script

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
    ]
)
DRAFT = "# Tea\n\n- Steep it for 3 minutes.\n- 90 °C is enough.\n\nThe second infusion is best."


class Program:
    """A crew of one task whose name and output are these, until a person approves."""

    name = "draft"

    def __init__(self, output: str, task: str) -> None:
        self.output, self.task = output, task

    def inputs(self) -> list[Any]:
        return []

    async def execute(self, run: Any) -> Any:
        from prefect_crew.devserver import Outcome

        run.plan([self.task])
        run.task_started(self.task)
        await run.ask(task_id=self.task, output=self.output)
        return Outcome(output=self.output)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
async def test_a_person_answers_on_any_screen(width: int, dark: bool, chat: Chat, chromium: Chromium, tmp_path: Path):
    key = f"page-{uuid.uuid4().hex[:8]}"
    with CrewServer(script({"name": "draft", "human": True, "output": DRAFT}), response_format="union") as server:
        async with running(server.crew(wait=QUICK, page_url="https://app.example.com/7"), key) as flow_run:
            url = await chat.link()

            def answer() -> str:
                with chromium.page(width=width, height=800, dark=dark) as page:
                    page.open(url)
                    page.screenshot(tmp_path / f"question-{width}-{dark}.png")
                    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it fits"
                    page.click("button")
                    assert page.url == url, "nothing is chosen, so nothing is sent"
                    page.click("text=Approve")
                    page.fill("textarea", "Fine.")
                    page.fill("#name", "Ada <b>")
                    page.raw(lambda playwright: playwright.locator("button").dblclick())
                    page.wait_for_text("by Ada <b>")
                    page.screenshot(tmp_path / f"sent-{width}-{dark}.png")
                    icon = f"{url.split('/answer')[0]}/favicon.ico"
                    assert {request.split("?")[0] for request in page.requests} <= {url, icon}
                    return page.text()

            said = await asyncio.to_thread(answer)
            assert "Your answer was sent" in said or "The question has its answer" in said
            await flow_run
            assert [(one.by, one.feedback) for one in await answers_of(key)] == [("Ada <b>", "Fine.")]
            assert server.requests["resume"] == 1


async def test_a_page_survives_a_hostile_text(chat: Chat, chromium: Chromium, tmp_path: Path):
    key = f"page-{uuid.uuid4().hex[:8]}"
    program = Program(HOSTILE + "b" * 30_000, "<b>task</b> \u202e evil.example")
    with CrewServer(program, response_format="union") as server:
        async with running(server.crew(wait=QUICK), key):
            url = await chat.link()

            def look() -> None:
                with chromium.page(width=390, height=800) as page:
                    page.raw(lambda playwright: playwright.on("dialog", lambda dialog: pytest.fail("a dialog")))
                    page.open(url)
                    page.screenshot(tmp_path / "hostile.png")
                    assert page.evaluate("document.title") == "A crew asks"
                    assert page.url == url
                    assert page.count("form") == page.count("button") == page.count("style") == 1
                    assert page.count("main img") == page.count("script") == page.count("main b") == 0
                    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
                    text = page.text()
                    assert "<script>document.title" in text
                    assert "[U+202E]evil" in text
                    assert "{{ 7 * 7 }}" in text
                    assert "The text is cut here." in text
                    assert not [one for one in page.requests if "evil" in one]

            await asyncio.to_thread(look)
            assert "evil" not in "".join(chat.texts).replace(key, "")
