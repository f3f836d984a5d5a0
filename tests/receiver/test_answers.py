"""The pages that answer questions: one answer for each question, and nothing for anybody without its link."""

import asyncio
import os
import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import prefect_crew as pc
from prefect_crew._internal.clock import utcnow
from prefect_crew.blocks import crew_of
from prefect_crew.client.models import CrewInput
from prefect_crew.devserver import CrewServer, Outcome
from prefect_crew.receiver import answers
from prefect_crew.runs.reviews import reviewer
from prefect_crew.runs.reviews.answer import resume_run
from prefect_crew.runs.run import LiveRun
from prefect_crew.webhooks import Hook, token_of
from support.asking import AskingServer
from support.chromium import Chromium
from support.links import QUICK, Chat, answers_of, read, running, send
from support.review_callbacks import ReviewingServer, ReviewWebhook
from support.scripts import ASKS, script
from support.waiting import until
from support.webhooks import SECRET, served

pytestmark = pytest.mark.usefixtures("prefect_api")


@asynccontextmanager
async def asking(
    spec: Any = ASKS, *, faults: Any = (), options: tuple[str, ...] = (), **fields: Any
) -> AsyncIterator[Any]:
    """Run a crew that asks, or with `options` a Flow; give its server, its flow and its key."""
    key = f"link-{uuid.uuid4().hex[:12]}"
    hook = ReviewWebhook(f"{os.environ['PREFECT_INTEGRATIONS_CREW_ANSWER_URL']}requests", "whsec", options)
    server = ReviewingServer(spec, faults=faults, review_webhook=hook) if options else CrewServer(spec, faults=faults)
    with server:
        async with running(server.crew(**{"wait": QUICK, **fields}), key) as flow_run:
            yield server, flow_run, key


@asynccontextmanager
async def asking_server(*, show: Any = "full", wait: Any = QUICK, **options: Any) -> AsyncIterator[AskingServer]:
    """Run a crew of a server that keeps its question."""
    server = AskingServer(**options)
    async with served(server.app()) as url:
        crew = pc.DeployedCrew(url=url, token="secret-token", wait=wait, show=show)
        async with running(crew, f"link-{uuid.uuid4().hex[:12]}"):
            yield server


async def test_a_link_shows_the_question_and_answers_it(chat: Chat):
    async with asking() as (server, flow_run, key):
        url = await chat.link()
        page = await read(url)
        assert page.status == 200
        assert page.said == (
            f"Crew {key} asks Task draft , question 1. The crew waits for your answer. Please judge a draft "
            "Your answer Approve The crew continues. Reject The task is done again with your feedback. "
            "Feedback for the crew Your name, for the record Send the answer "
            "The answer is sent once, and cannot be taken back."
        )
        head = await read(url, method="HEAD")
        assert head.status == 200
        assert head.text == ""
        assert (await read(url, method="PUT")).status == 404
        assert server.requests["resume"] == 0
        assert await answers_of(key) == []
        sent = await send(url, decision="approve", name="Ada")
        assert sent.status == 200
        assert "Approved by Ada." in sent.said
        assert await flow_run == "printed"
        assert server.requests["resume"] == 1
        (answer,) = await answers_of(key)
        assert answer.approve
        assert answer.by == "Ada"
        assert answer.outcome == "sent"


async def test_links_answer_a_crew_as_on_amp(chat: Chat, monkeypatch: pytest.MonkeyPatch):
    """A hosted crew's question comes by its webhook alone, and its run goes on under new ids."""
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", os.environ["PREFECT_INTEGRATIONS_CREW_ANSWER_URL"])
    async with asking(response_format="live") as (server, flow_run, _):
        assert (await send(await chat.link(), decision="reject", feedback="Shorter.")).status == 200
        assert (await send(await chat.link(2), decision="approve")).status == 200
        assert await flow_run == "printed"
    assert server.requests["resume"] == 2
    assert server.kickoffs == 1


async def test_a_rejection_has_a_link_of_its_own_next(chat: Chat):
    async with asking() as (_, flow_run, key):
        first = await chat.link()
        assert (await send(first, decision="reject", feedback="Shorter,\r\nplease.")).status == 200
        second = await chat.link(2)
        assert "a draft Shorter, please." in (await read(second)).said
        assert "It was rejected by an answer link" in (await read(first)).said
        assert (await send(second, decision="approve")).status == 200
        await flow_run
        answers = [(answer.feedback, answer.by) for answer in await answers_of(key)]
        assert answers == [("Shorter,\nplease.", "an answer link"), ("", "an answer link")]


SECOND_QUESTIONS: dict[str, Any] = {
    "between two polls, in a status without an output": lambda: asking(
        script({"name": "draft", "seconds": 1, "human": True}),
        wait=pc.WaitPolicy(initial=4, max_interval=4),
    ),
    "equal, after a while": lambda: asking_server(
        rounds=2, between=False, wait=QUICK.model_copy(update={"next_round_after": 1.0})
    ),
}


@pytest.mark.parametrize("case", SECOND_QUESTIONS)
async def test_a_second_question_that_looks_alike_has_a_link(case: str, chat: Chat):
    async with SECOND_QUESTIONS[case]():
        assert (await send(await chat.link(), decision="reject", feedback="No.")).status == 200
        assert (await send(await chat.link(2), decision="approve")).status == 200


@pytest.mark.parametrize("option", [0, 1])
async def test_a_flow_is_answered_with_its_outcome(option: int, chat: Chat, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_REVIEW_SECRET", "whsec")
    crew = script({"name": "publish", "seconds": 0.6, "human": True, "output": "D. {{ feedback }}"})
    options = ("ship <b>it", "needs_revision")
    # The receiver cannot mask the texts of a crew with secret inputs.
    secret_inputs = ["topic"] if option == 0 else []
    async with asking(crew, options=options, secret_inputs=secret_inputs) as (_, flow_run, key):
        link = await chat.link()
        page = await read(link)
        assert "ship <b>it" in page.said
        assert 'value="approve"' not in page.text
        assert (await send(link, decision="approve")).status == 400
        assert (await send(link, decision="option-2")).status == 400
        assert (await send(link, decision=f"option-{option}", feedback="Now.")).status == 200
        if option == 0:  # its name does not reject
            assert await flow_run == "D. "
        else:
            assert "D. needs_revision: Now." in (await read(await chat.link(2))).said
        assert (await answers_of(key))[0].option == options[option]


async def test_a_flow_that_was_answered_elsewhere_takes_no_answer(chat: Chat, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_REVIEW_SECRET", "whsec")
    crew = script({"name": "publish", "human": True, "output": "D."})
    async with asking(crew, options=("ship", "hold")) as (server, flow_run, key):
        url = await chat.link()
        server.has_other_answer = True
        page = await send(url, decision="option-0", feedback="Now.")
        assert page.status == 409
        assert "does not wait for this answer any more" in page.said
        assert "Your feedback Now." in page.said
        assert not flow_run.done()
        assert await answers_of(key) == []


async def test_a_flow_whose_question_comes_late_is_answered(chat: Chat, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_REVIEW_SECRET", "whsec")
    monkeypatch.setattr(reviewer, "OUTPUT_WITHIN", 0.0)
    crew = script({"name": "publish", "human": True, "output": "D."})
    async with asking(crew, options=("ship", "hold"), faults=["webhook:delay=2"]) as (_, flow_run, _):
        url = await chat.link()

        async def has_options() -> bool:
            return "hold" in (await read(url)).said

        await until(has_options, "the Flow's question comes")
        assert (await send(url, decision="option-0")).status == 200
        assert await flow_run == "D."


async def test_each_wrong_link_is_refused_alike(chat: Chat):
    async with asking() as (server, _, _):
        url = await chat.link()
        base, _, token = url.rpartition("/")
        hook = Hook("crew", "k", utcnow() + timedelta(days=1))
        wrong = {
            "guessed": f"{'b' if token[0] == 'a' else 'a'}{token[1:]}",
            "a webhook's": token_of(hook, SECRET),
            "long": "a" * 5000,
            "cut off": token[:-1],
            "nonsense": "%00%ff",
        }
        pages = {name: await read(f"{base}/{token}") for name, token in wrong.items()}
        for name, token in wrong.items():
            pages[f"{name}, sent"] = await send(f"{base}/{token}", decision="approve")
        pages["cross-site"] = await send(url, headers={"Sec-Fetch-Site": "cross-site"}, decision="approve")
        kinds = {(page.status, page.text, tuple(sorted(page.headers.items()))) for page in pages.values()}
        assert len(kinds) == 1, {name: page.status for name, page in pages.items()}
        assert {page.status for page in pages.values()} == {404}
        assert server.requests["resume"] == 0
        hooks = base.removesuffix("/answer") + "/hooks/crew/"
        assert (await send(hooks + url.rpartition("/")[2], content=b"{}")).status == 404


async def test_a_link_ends_with_peoples_time(chat: Chat):
    async with asking(wait=QUICK.model_copy(update={"human_timeout": 4.0})) as (server, _, _):
        url = await chat.link()
        assert (await read(url)).status == 200

        async def is_over() -> bool:
            return (await read(url)).status == 404

        await until(is_over, "the end of people's time")
        assert (await send(url, decision="approve")).status == 404
        assert server.requests["resume"] == 0


async def test_pages_are_not_kept_framed_or_indexed(chat: Chat):
    policy = "default-src 'none'; style-src 'sha256-HASH='; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    async with asking():
        url = await chat.link()
        for headers in ((await read(url)).headers, (await read(url + "x")).headers):
            assert headers["cache-control"] == "no-store"
            assert headers["referrer-policy"] == "no-referrer"
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["x-robots-tag"] == "noindex, nofollow"
            assert re.sub("sha256-[^=]+", "sha256-HASH", headers["content-security-policy"]) == policy


@pytest.mark.parametrize(
    ("fields", "status", "notice"),
    [
        ({}, 400, "Choose an answer."),
        ({"decision": "option-0"}, 400, "Choose an answer."),
        ({"decision": "reject", "feedback": " \n "}, 400, "A rejection needs feedback. Write what the crew has"),
        ({"decision": "reject", "feedback": "ä" * 10_001}, 400, "at most 10,000 characters"),
        ({"decision": "approve", **{f"field-{n}": "x" for n in range(10)}}, 400, "too many fields"),
        ({"content": b"x" * 200_000}, 413, "at most 131072 bytes"),
        ({"content": b"{}", "headers": {"Content-Type": "application/json"}}, 400, "Choose an answer."),
    ],
)
async def test_a_bad_form_is_not_sent_and_not_lost(fields: Any, status: int, notice: str, chat: Chat):
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    fields = {"headers": form, **fields} if "content" in fields else {"name": "Ada <b>", **fields}
    async with asking() as (server, _, key):
        page = await send(await chat.link(), **fields)
        assert page.status == status
        assert notice in page.said
        assert "Nothing was sent" in page.said
        if "feedback" in fields:
            assert fields["feedback"][:10_001] in page.text
            assert 'value="Ada &lt;b&gt;"' in page.text
        assert server.requests["resume"] == 0
        assert await answers_of(key) == []


@pytest.mark.parametrize(
    ("is_answered", "notice"),
    [(True, "It was approved by resume_crew"), (False, "does not wait for this answer any more")],
    ids=["answered", "stopped"],
)
async def test_a_question_closed_meanwhile_takes_no_answer(is_answered: bool, notice: str, chat: Chat):
    async with asking(script({"human": True, "output": "x"}, {"seconds": 5})) as (server, flow_run, key):
        url = await chat.link()
        run = LiveRun(crew_of(await pc.DeployedCrew.aload(key)), server.runs[0].id)
        if is_answered:
            await resume_run(run, feedback="", approve=True)
        else:
            async with server.crew().client() as client:
                await client.stop(run.kickoff_id)
            with pytest.raises(pc.CrewStoppedError):
                await flow_run
        page = await send(url, decision="reject", feedback="late")
        assert page.status == 409
        assert notice in page.said
        assert "Your feedback late" in page.said
        assert notice in (await read(url)).said
        assert server.requests["resume"] == len(await answers_of(key)) == is_answered


@pytest.mark.parametrize("show", ["full", "none"])
async def test_a_question_whose_last_step_changes_is_answered(show: str, chat: Chat):
    """With a status that shows no output, the last step is what people judge: it counts the status calls here."""
    async with asking_server(changing=True, show=show) as server:
        url = await chat.link()
        assert ("thought" in (await read(url)).text) is (show == "full")
        assert (await send(url, decision="reject", feedback="Shorter.", name="Ada")).status == 200
        assert len(server.resumes) == 1


@pytest.mark.parametrize(
    ("fault", "status", "text"),
    [
        ("resume:500", 502, "Nobody knows whether it arrived"),
        ("resume:timeout-after-accept=2", 502, "Nobody knows whether it arrived"),
        ("resume:403", 503, "Answer on the crew's page"),
        ("resume:503", 503, "was not sent. Nothing is lost"),
    ],
)
async def test_the_page_says_whether_an_answer_was_sent(fault: str, status: int, text: str, chat: Chat):
    async with asking(faults=[fault], request_timeout=1.0) as (_, _, key):
        page = await send(await chat.link(), decision="approve", feedback="fine", name="Ada")
        assert page.status == status
        assert text in page.said
        outcomes = [answer.outcome for answer in await answers_of(key)]
        arrived = [["sent"]] if "after-accept" in fault else []  # by now the wait may have seen that
        assert outcomes in [["uncertain"] * (status == 502), *arrived]
        assert status == 502 or "fine</" in page.text


async def test_a_click_beside_a_refused_one_says_so(chat: Chat):
    async with asking(faults=["resume:latency=3@1", "resume:429@1"]) as (_, flow_run, key):
        url = await chat.link()
        first = asyncio.create_task(send(url, decision="approve", name="Ada"))
        await until(lambda: answers_of(key), "the first answer is on its way")
        page = await send(url, decision="reject", feedback="Shorter.", name="Bob")
        assert page.status == 409
        assert "Nobody knows yet whether that answer arrived" in page.said
        assert "Your feedback Shorter." in page.said
        assert (await first).status == 503
        assert (await send(url, decision="approve", name="Bob")).status == 200
        assert await flow_run == "printed"


async def test_a_slow_answer_holds_up_no_page(chat: Chat, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answers, "ANSWER_WITHIN", 2.0)
    async with asking(faults=["resume:latency=4"]) as (_, flow_run, key):
        page = await send(await chat.link(), decision="approve")
        assert page.status == 502
        assert "may have arrived" in page.said
        assert await flow_run == "printed"
        assert [answer.outcome for answer in await answers_of(key)] == ["sent"]


async def test_a_status_call_that_fails_sends_nothing(chat: Chat):
    async with asking() as (server, _, _):
        url = await chat.link()
        server.faults.add("status:500")
        pages = (await read(url), await send(url, decision="approve", feedback="Well done."))
        assert "Your feedback Well done." in pages[1].said
        for page in pages:
            assert page.status == 503
            assert "The question cannot be read" in page.said
            assert "nobody knows" not in page.said
        assert server.requests["resume"] == 0


async def test_a_persons_name_is_one_short_line_without_secrets(chat: Chat):
    async with asking() as (server, _, key):
        name = f"\x1b[2JAda\r\n\u202e{server.token} {'x' * 500}"
        page = await send(await chat.link(), decision="approve", name=name)
        assert page.status == 200
        by = (await answers_of(key))[0].by
        assert "Ada" in by
        assert len(by) <= 100
        assert by.isprintable()
        assert server.token not in by + page.text


@pytest.mark.parametrize("fields", [{"show": "summary"}, {"show": "none"}, {"secret_inputs": ["topic"]}])
async def test_a_page_shows_what_the_crew_may_show(fields: dict[str, Any], chat: Chat):
    page_url = "https://app.example.com/crews/7"
    async with asking(script({"human": True, "output": "hunter2 it is"}), page_url=page_url, **fields):
        page = await read(await chat.link())
        assert "hunter2" not in page.text
        assert "It is not shown here. Look at the crew's page" in page.said
        assert f'href="{page_url}"' in page.text


async def test_a_row_of_a_batch_is_answered_where_its_ledger_is(chat: Chat, key: str, tmp_path: Path):
    with CrewServer(script({"human": True, "output": "row {{ topic }}"}, inputs=["topic"])) as server:
        await server.crew(wait=QUICK).asave(key, overwrite=True)
        options: dict[str, Any] = {"name": key, "key": "topic", "export": str(tmp_path / "out.jsonl")}
        batch = asyncio.create_task(pc.arun_batch(key, [{"topic": "tea"}], **options))
        url = await chat.link()

        async def is_found() -> bool:
            return (await read(url)).status == 200

        await until(is_found, "the batch notes that it asks, about a second later")
        assert (await send(url, decision="approve", name="Ada")).status == 200
        assert (await batch).completed == 1
        assert "It was approved by Ada" in (await read(url)).said


# In a real browser: on a phone and a desktop, light and dark, with any text of a crew

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


@pytest.mark.slow
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

    with CrewServer(HostileCrew()) as server:
        async with running(server.crew(wait=QUICK, page_url="https://app.example.com/7"), key) as flow_run:
            text = await asyncio.to_thread(answer, await chat.link())
            assert "Your answer was sent" in text or "The question has its answer" in text
            await flow_run
            assert [(review.by, review.feedback) for review in await answers_of(key)] == [("Ada <b>", "Fine.")]
            assert server.requests["resume"] == 1
    assert "evil" not in "".join(chat.texts)
