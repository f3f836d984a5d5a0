"""Research, then a draft that a person reads before it counts: asked in a form on the flow run's own page.

Until a person answers, the flow run is Paused, and its Resume button opens the form. `prefect-crew reviews ls` lists
what waits, and answers as well. A rejected draft is written again with the feedback, and asked about again.
"""

from __future__ import annotations

from prefect import flow

from prefect_crew import CrewStep, WaitPolicy, arun_pipeline


@flow(flow_run_name="reviewed report on {topic}")
async def reviewed_report(
    topic: str,
    audience: str = "everyone",
    research: str = "research",
    draft: str = "draft",
    days_to_answer: float = 2.0,
    max_rounds: int = 5,
    idempotency_key: str | None = None,
) -> str:
    """Research a topic, draft a report, have a person approve it, and return the approved report.

    Args:
        topic: What the report is about.
        audience: Whom it is for.
        research: The block of the crew that takes a topic.
        draft: The block of the crew that takes a topic, an audience and notes, and asks a person about its draft.
        days_to_answer: How long people may take in all. Then the draft is rejected, once, and they have as long again.
        max_rounds: How often the draft may be asked about.
        idempotency_key: The identity of the whole report, such as report-{scheduled_start:%Y-%m-%d}. Empty:
            each flow run is one.
    """
    policy = WaitPolicy(
        human_timeout=days_to_answer * 86_400,
        on_human_timeout="reject",
        human_message="No one has read this in time. Make it shorter.",
        max_rounds=max_rounds,
    )
    steps = [
        CrewStep("research", research, {"topic": "{{ topic }}"}),
        CrewStep(
            "draft",
            draft,
            {"topic": "{{ topic }}", "audience": "{{ audience }}", "notes": "{{ research.output }}"},
            wait=policy,
            review="form",
        ),
    ]
    result = await arun_pipeline(
        steps, {"topic": topic, "audience": audience}, name="reviewed report", idempotency_key=idempotency_key
    )
    return result["draft"].output
