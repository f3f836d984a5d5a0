"""Mistakes: both checkers refuse each line with `# wrong`, pyright alone those with `# pyright`, and no other."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

import prefect_crew as pc


class Trip(BaseModel):
    city: str


def topic_of(row: str) -> Mapping[str, Any]:
    return {"topic": row}


crew = pc.DeployedCrew(url="https://my-crew.crewai.com", token="…")
pc.run_crew(crew, {"topic": "Lisbon"}, idempotency="daily")  # wrong
print(pc.run_crew(crew, output_type=Trip).data.town)  # wrong
pc.run_crew(crew, kickoff_options={"retry": 5})  # wrong
pc.get_result("daily", output=Trip)  # wrong
pc.kickoff_crew.with_options(retry=5)  # wrong
pc.run_batch(crew, "a.csv", name="a", export="a.jsonl", inputs=topic_of)  # wrong
pc.run_batch(crew, "a.csv", name="a", export="a.jsonl", key=lambda row: row.topic)  # pyright
pc.plan_batch(crew, "a.csv", retry=5)  # wrong
pc.CrewStep("write", crew, {"notes": lambda context: context.research})  # pyright
pc.CrewStep("write", crew, {}, output_type=5)  # wrong
pc.run_pipeline([], key="daily")  # wrong
crew.trigger({"topic": "Lisbon"}, key="daily")  # wrong
crew.trigger().resume("Shorter.", aprove=False)  # wrong
