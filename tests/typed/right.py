"""A user's program: mypy and pyright accept it in strict mode. Nobody runs it."""

from typing import assert_type

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFutureList
from pydantic import BaseModel, JsonValue

import prefect_crew as pc


class Trip(BaseModel):
    city: str


def answer(request: pc.ReviewRequest) -> pc.Review:
    return pc.Review(approve=request.round < 3, feedback=request.output or "")


crew = pc.DeployedCrew(url="https://my-crew.crewai.com", token="…", max_attempts=2, budgets=[pc.Budget(max_kickoffs=9)])


@flow
def plan(topic: str) -> None:
    kickoff_id: str = pc.kickoff_crew.with_options(retries=5, tags=["dear"])(crew, {"topic": topic}, name="research")
    futures: PrefectFutureList[str] = pc.kickoff_crew.map([crew, "travel"], [{"topic": "Lisbon"}, {"topic": "Porto"}])
    stopped: State[pc.StopAnswer] = pc.stop_crew(crew, kickoff_id, wait_for=futures, return_state=True)
    print(pc.wait_for_crew.submit(crew, pc.kickoff_crew.submit(crew), output_type=Trip, wait_for=[stopped]).result())


@flow
async def aplan(topic: str) -> Trip:
    kickoff_id = await pc.kickoff_crew("travel", {"topic": topic}, budgets=[pc.Budget(max_cost=20, estimate_cost=1)])
    result: pc.CrewResult[Trip] = await pc.wait_for_crew("travel", kickoff_id, output_type=Trip, review="form")
    again = await pc.aget_result("daily", output_type=Trip)
    run = await crew.atrigger({"topic": topic}, idempotency_key="daily")
    assert_type(await run.astop(), pc.StopAnswer)
    return Trip(city=f"{result.data.city} {again.data.city}")


def main() -> None:
    trip = pc.run_crew(crew, {"topic": "Lisbon"}, output_type=Trip, review=answer, wait=pc.WaitPolicy(timeout=600))
    assert_type(trip.data, Trip)
    text = pc.run_crew(
        pc.DeployedCrew.from_env(show="none"), kickoff_options={"retries": 5}, wait_options={"tags": ["a"]}
    )
    assert_type(text.data, JsonValue)
    assert_type(pc.get_result("daily", crew=crew, output_type=Trip).data.city, str)
    run = pc.DeployedCrew.load("travel").trigger({"topic": "Lisbon"})
    run.wait_for_completion()
    assert_type(run.fetch_result().output, str)
    assert_type(run.resume("Shorter.", approve=False), pc.ResumeAnswer)
    report = pc.run_batch(crew, "leads.csv", name="leads", export="leads.jsonl", key=lambda row: row["id"])
    planned = pc.plan_batch(crew, [{"a": 1}], inputs=lambda row: {"topic": row["a"]}, rows="0:5")
    pc.run_batch(crew, [{"a": 1}], name="b", export="b.jsonl", inputs={"topic": lambda row: row["a"], "year": 2026})
    steps = [
        pc.CrewStep("research", "research", {"topic": "{{ topic }}"}, output_type=Trip),
        pc.CrewStep("write", crew, {"notes": lambda context: context["research"].output.upper()}, after=["research"]),
    ]
    print(trip.data.city, report.ok, planned.rows, pc.run_pipeline(steps, {"topic": "Lisbon"})["write"].output)
