"""The page of a pipeline: what it says of each step, in Markdown that nothing from outside can break."""

import asyncio
import re
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefect_crew import CrewStep, PipelineFailedError, arun_pipeline
from prefect_crew.blocks import crew_of
from prefect_crew.pipelines.artifact import StepView, render_pipeline
from prefect_crew.pipelines.graph import Pipeline
from prefect_crew.store.decision import Attempt
from prefect_crew.testing import CrewServerFactory
from support.chromium import Chromium
from support.past import new_attempt
from support.prefect_server import PrefectServer
from support.scripts import script
from support.seen import Seen

ARTIFACT = uuid.UUID("12345678-1234-5678-1234-567812345678")


def run_of(kickoff_id: str, artifact: uuid.UUID | None = None, attempt: Attempt | None = None) -> Any:
    return SimpleNamespace(
        kickoff_id=kickoff_id, artifact=SimpleNamespace(id=artifact), attempt=attempt, attempt_number=None
    )


def test_page_shows_each_step():
    steps = [CrewStep("research", "finder", {}), CrewStep("prices", "finder", {})]
    pipeline = Pipeline([*steps, CrewStep("write", "writer", {}, after=["research", "prices"])], {})
    earlier = new_attempt(started_at=100.0, ended_at=100.0 + 2 * 3600)
    views = {
        "research": StepView("finder", "completed", started=100.0, ended=100.1, run=run_of("abc", ARTIFACT, earlier)),
        "prices": StepView("finder", "failed", started=100.0, ended=102.5, run=run_of("a-long-id-of-a-run")),
        "write": StepView("writer", "skipped"),
    }
    assert (
        render_pipeline("report", "the key", pipeline, views, 10.0).replace("\u00a0", " ")
        == """\
## report: 1 of 3 steps completed, 1 failed

|  |  |
| --- | --- |
| Idempotency key | `the key` |
| Time | 10.0 s |

### Steps

| Step | After | State | Time | Crew | Run |
| --- | --- | --- | --- | --- | --- |
| **research** |  | ✓ completed | 2 h 00 min | finder | [abc](../artifact/12345678-1234-5678-1234-567812345678) |
| **prices** |  | ✗ failed | 2.5 s | finder | a-long-i… |
| **write** | prices, research | – not run | – | writer |  |
"""
    )


def test_odd_names_break_no_table_and_no_link():
    names = ["a | b", "```", "<script>", "two\nlines", "[x](y)"]
    steps = [CrewStep(name, "crew", {}) for name in names]
    views = {name: StepView("find|er", page_url="https://crews.example/a(1)|b") for name in names}
    text = render_pipeline("<b>", "`k`", Pipeline(steps, {}), views, 0.0, flow_run="5f0c1a2b-aaaa")
    assert "| Flow run | [5f0c1a2b](../../runs/flow-run/5f0c1a2b-aaaa) |" in text
    assert text.count("| [find\\|er](https://crews.example/a%281%29%7Cb) |") == len(names)
    table = [line for line in text.splitlines() if line.startswith("| **")]
    assert len(table) == len(names)
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 7 for line in table)
    assert "<script>" not in text.partition("### Steps")[2]
    assert "## &lt;b&gt;" in text


@pytest.mark.slow
@pytest.mark.usefixtures("instant_polling")
@pytest.mark.parametrize("ui", ["v1", "v2"], ids=["older-interface", "newer-interface"])
def test_it_renders_as_meant_and_leads_to_the_runs(
    prefect_api: PrefectServer, seen: Seen, crew_server: CrewServerFactory, chromium: Chromium, tmp_path: Path, ui: Any
):
    spec = script({"output": "{{ text }}", "seconds": 0.4}, inputs=["text"])
    crew = crew_of(crew_server(spec).crew()).called("writer")
    broken = crew_of(crew_server(script({"fail": "the press is out of ink"})).crew()).called("press")
    name = f"guide-{uuid.uuid4().hex[:6]}"
    steps = [
        CrewStep("research", crew, {"text": "on {{ topic }}"}),
        CrewStep("prices", crew, {"text": "{{ topic }} costs"}),
        CrewStep("write", crew, {"text": "{{ research.output }}, {{ prices.output }}"}),
        CrewStep("print", broken, {}, after=["write"]),
        CrewStep("send", crew, {"text": "x"}, after=["print"]),
        CrewStep("review | <b>twice<b>", crew, {"text": "{{ write.output }}!"}),
    ]
    with pytest.raises(PipelineFailedError):
        asyncio.run(arun_pipeline(steps, {"topic": "tea"}, name=name))
    (found,) = seen.artifacts(f"pipeline-{name}")
    with chromium.page(width=1440, height=1100) as page:
        page.open(prefect_api.artifact_url(found["id"], ui=ui))
        page.wait_for_text("4 of 6 steps completed, 1 failed")
        page.wait_for_text("not run")
        page.screenshot(tmp_path / f"pipeline-{ui}.png")
        text = page.text()
        assert "review | <b>twice<b>" in text
        assert "✗\u00a0failed" in text, "with a space where no line breaks"
        assert page.count("a[href*='../artifact/']") == 5
        # The older interface opens links in another tab; where this one leads counts.
        page.open(page.evaluate("document.querySelector(\"a[href*='../artifact/']\").href"))
        page.wait_for_text("Execution time")
        page.wait_for_text("on tea")
        assert f"{'/v2' if ui == 'v2' else ''}/artifacts/artifact/" in page.url
