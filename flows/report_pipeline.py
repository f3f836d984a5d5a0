"""Research, write, review: three crews that feed each other, twice. Once as steps, once by hand in plain Python.

Either way a retry of the flow run starts no run twice: each crew's run is found by a key made of the flow run, the
step's name and its inputs. By hand that asks one thing of your own tasks between crews: the same answer on a retry. One
that asks the clock or the web gives the next crew other inputs, which is another run; persist its result.
"""

from __future__ import annotations

from prefect import flow, task
from prefect.artifacts import acreate_markdown_artifact

from prefect_crew import CrewStep, arun_crew, arun_pipeline


@flow(flow_run_name="report on {topic}")
async def report_pipeline(
    topic: str,
    audience: str = "everyone",
    research: str = "research",
    write: str = "write",
    review: str = "review",
    idempotency_key: str | None = None,
) -> str:
    """Research a topic, write a report, have it reviewed, and return the reviewed report.

    Args:
        topic: What the report is about.
        audience: Whom it is for.
        research: The block of the crew that takes a topic.
        write: The block of the crew that takes a topic, an audience and notes.
        review: The block of the crew that takes an audience and a draft.
        idempotency_key: The identity of the whole report, such as report-{scheduled_start:%Y-%m-%d}. Empty:
            each flow run is one.
    """
    steps = [
        CrewStep("research", research, {"topic": "{{ topic }}"}),
        CrewStep(
            "write", write, {"topic": "{{ topic }}", "audience": "{{ audience }}", "notes": "{{ research.output }}"}
        ),
        CrewStep("review", review, {"audience": "{{ audience }}", "draft": "{{ write.output }}"}),
    ]
    result = await arun_pipeline(
        steps, {"topic": topic, "audience": audience}, name="report", idempotency_key=idempotency_key
    )
    return result["review"].output


@task
def key_points(notes: str, at_most: int = 5) -> str:
    """Keep the lines of the notes that are points: your own code between two crews."""
    points = [line for line in notes.splitlines() if line.lstrip().startswith(("-", "*"))]
    return "\n".join(points[:at_most]) or notes


@flow(flow_run_name="report on {topic}, by hand")
async def report_by_hand(
    topic: str,
    audience: str = "everyone",
    research: str = "research",
    write: str = "write",
    review: str = "review",
) -> str:
    """Do the same in plain Python, with a task of one's own in between and a page for the result.

    Args:
        topic: What the report is about.
        audience: Whom it is for.
        research: The block of the crew that takes a topic.
        write: The block of the crew that takes a topic, an audience and notes.
        review: The block of the crew that takes an audience and a draft.
    """
    found = await arun_crew(research, {"topic": topic}, name="research")
    points = key_points(found.output)
    draft = await arun_crew(write, {"topic": topic, "audience": audience, "notes": points}, name="write")
    final = await arun_crew(review, {"audience": audience, "draft": draft.output}, name="review")
    await acreate_markdown_artifact(final.output, key="report", description=f"Report on {topic}")
    return final.output
