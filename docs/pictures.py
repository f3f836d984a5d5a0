"""Take the pictures of docs/images: a real Prefect server, crews on the dev server, a real browser.

    python docs/pictures.py          about a minute; needs Chromium and the environment of the tests

Each picture is of Prefect's present interface, as a reader sees it. Look at them before you commit them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
sys.path.insert(0, str(ROOT / "tests"))
HOME = Path(tempfile.mkdtemp(prefix="prefect-crew-pictures-"))
# Before Prefect is imported: nothing of your own Prefect is touched.
for name in [name for name in os.environ if name.startswith("PREFECT_")]:
    del os.environ[name]
os.environ["PREFECT_HOME"] = str(HOME / "client")

from support.chromium import Chromium, Page, find_chromium  # noqa: E402
from support.prefect_server import PrefectServer, connected  # noqa: E402
from support.seen import Seen  # noqa: E402

TRIP = {"budget": "1000 USD", "interests": "tiles, food", "duration": "4 days", "age": "34"}
REPORT = {
    "research": "About {{ topic }}:\n\n- It is half oxidised.\n- 90 °C is enough.\n- The second infusion is best.",
    "prices": "{{ topic }}: 9 to 40 EUR for 100 g.",
    "write": "# {{ topic }}\n\n{{ notes }}",
}
SECONDS = {"research": 2.0, "prices": 0.5, "write": 1.5}


def script(task: str) -> str:
    """Return a crew of one task."""
    inputs = "[topic, notes]" if task == "write" else "[topic]"
    output = REPORT[task].replace("\n", "\\n")
    tasks = f'[{{name: {task}, agent: Writer, seconds: {SECONDS[task]}, output: "{output}"}}]'
    return f"name: {task}\ninputs: {inputs}\ntasks: {tasks}\n"


def artifact_id(seen: Seen, key: str) -> str:
    """Return the id of the newest artifact with a key."""
    about = {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC"}
    return wait_for(lambda: seen.post("/artifacts/filter", about))[0]["id"]


def take_run(page: Page, server: PrefectServer, seen: Seen) -> None:
    """The artifact of one run."""
    from prefect_crew import run_crew
    from prefect_crew.devserver import CrewServer

    with CrewServer("travel") as crew:
        crew.crew().save("travel", overwrite=True)
        run_crew("travel", TRIP, idempotency_key="lisbon")
    page.open(server.artifact_url(artifact_id(seen, "crew-travel"), ui="v2"))
    page.wait_for_text("Execution time")
    page.screenshot(IMAGES / "artifact.png", whole=False)


def take_pipeline(page: Page, server: PrefectServer, seen: Seen) -> None:
    """The artifact of a pipeline."""
    from prefect_crew import CrewStep, run_pipeline
    from prefect_crew.devserver import CrewServer

    with contextlib.ExitStack() as running:
        for name in REPORT:
            running.enter_context(CrewServer(script(name))).crew().save(name, overwrite=True)
        notes = "{{ research.output }} {{ prices.output }}"
        steps = [
            CrewStep("research", "research", {"topic": "{{ topic }}"}),
            CrewStep("prices", "prices", {"topic": "{{ topic }}"}),
            CrewStep("write", "write", {"topic": "{{ topic }}", "notes": notes}),
        ]
        run_pipeline(steps, {"topic": "Oolong"}, name="report", idempotency_key="report-oolong")
    page.open(server.artifact_url(artifact_id(seen, "pipeline-report"), ui="v2"))
    page.wait_for_text("3 of 3 steps")
    page.screenshot(IMAGES / "pipeline.png", whole=False)


def take_form(page: Page, server: PrefectServer, seen: Seen) -> None:
    """The form in which a person is asked."""
    from prefect_crew import resume_crew, run_crew
    from prefect_crew.devserver import CrewServer

    draft = (ROOT / "flows" / "crews" / "draft.yaml").read_text(encoding="utf-8")
    with CrewServer(draft) as crew:
        crew.crew().save("draft", overwrite=True)
        inputs = {"topic": "Coffee", "audience": "beginners", "notes": "- grind it fresh\n- water of 92 °C"}
        waiting = threading.Thread(
            target=lambda: run_crew("draft", inputs, idempotency_key="coffee", review="form"), daemon=True
        )
        waiting.start()
        asked = {"flow_runs": {"state": {"type": {"any_": ["PAUSED"]}}}}
        paused = wait_for(lambda: seen.post("/flow_runs/filter", asked))
        page.open(f"{server.ui_url}/v2/runs/flow-run/{paused[0]['id']}")
        page.click("button[aria-haspopup='menu']")
        page.click('role=menuitem[name="Resume"]')
        page.wait_for('[role="dialog"]')
        page.raw(lambda raw: raw.wait_for_timeout(800))
        page.screenshot(IMAGES / "review-form.png", selector='[role="dialog"]')
        resume_crew("draft", crew.runs[0].id, approve=True)
        waiting.join(60)


def take_link(page: Page, server: PrefectServer, seen: Seen) -> None:
    """The page of a question, to which a link leads."""
    from prefect_crew import arun_crew
    from prefect_crew.devserver import CrewServer
    from support.links import Chat, notifying, send
    from support.webhooks import SECRET, receiver_of

    draft = (ROOT / "flows" / "crews" / "draft.yaml").read_text(encoding="utf-8")
    inputs = {"topic": "Rooibos", "audience": "beginners", "notes": "- steep it for 8 minutes\n- water that boils"}

    async def ask(crew: CrewServer, chat: Chat) -> None:
        await crew.crew().asave("draft", overwrite=True)
        async with notifying(chat):
            waiting = asyncio.create_task(arun_crew("draft", inputs, idempotency_key="rooibos"))
            link = await chat.link()
            await asyncio.to_thread(page.open, link)
            page.screenshot(IMAGES / "answer-link.png", selector="main")
            await send(link, decision="approve")
            await waiting

    receiver = receiver_of(server.env(), HOME)
    with CrewServer(draft) as crew, Chat() as chat, receiver as (_, port):
        os.environ["PREFECT_INTEGRATIONS_CREW_ANSWER_URL"] = f"http://127.0.0.1:{port}"
        os.environ["PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET"] = SECRET
        asyncio.run(ask(crew, chat))
        del os.environ["PREFECT_INTEGRATIONS_CREW_ANSWER_URL"]


def take_killed(page: Page, server: PrefectServer, seen: Seen) -> None:
    """A command that is killed while its crew runs, and the same command again: one kickoff."""
    from rich.console import Console
    from rich.terminal_theme import DEFAULT_TERMINAL_THEME

    from prefect_crew.devserver import CrewServer
    from support.environment import program
    from support.processes import Process

    terminal = Console(record=True, width=104, file=StringIO())
    words = ["prefect-crew", "run", "research", "-i", "topic=Oolong", "--key", "tea-of-the-week"]
    with CrewServer(script("research").replace("seconds: 2.0", "seconds: 15")) as crew:
        crew.crew().save("research", overwrite=True)
        for is_killed in (True, False):
            log = HOME / f"killed-{is_killed}.log"
            command = [program(words[0]), *words[1:]]
            with Process(command, log=log, env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}) as process:
                process.wait_for("kicked off" if is_killed else "found run")
                if is_killed:
                    process.kill()
                else:
                    process.wait(120)
            terminal.print(f"$ {shlex.join(words)}", style="bold", highlight=False)
            terminal.print(log.read_text(encoding="utf-8").strip(), markup=False, highlight=False)
            if is_killed:
                terminal.print("Killed\n", style="bold red")
        assert len(crew.runs) == 1, "one kickoff"
    picture = HOME / "killed.svg"
    picture.write_text(terminal.export_svg(title="one key, one run", theme=DEFAULT_TERMINAL_THEME), encoding="utf-8")
    page.open(picture.as_uri())
    page.screenshot(IMAGES / "killed.png", selector="svg")


def wait_for(look: Callable[[], Any]) -> Any:
    """Return what `look` gives once that is something."""
    deadline = time.monotonic() + 60
    while not (value := look()):
        if time.monotonic() > deadline:
            raise SystemExit("It did not happen within a minute.")
        time.sleep(0.3)
    return value


def main() -> None:
    """Take all pictures, or those that are named."""
    chromium = find_chromium()
    if chromium is None:
        raise SystemExit("There is no Chromium on this machine.")
    takes = {"artifact": (take_run, 1620), "pipeline": (take_pipeline, 680), "form": (take_form, 1000)}
    takes |= {"killed": (take_killed, 640), "link": (take_link, 1000)}
    with PrefectServer(HOME / "server") as server, connected(server, HOME / "client"), Chromium(chromium) as browser:
        seen = Seen(server)
        for name in sys.argv[1:] or takes:
            take, height = takes[name]
            with browser.page(width=1440, height=height) as page:
                take(page, server, seen)
        seen.close()


if __name__ == "__main__":
    main()
