"""CrewAI code that the tests serve: what goes wrong, and what the examples do not show."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from crewai import Agent, Crew, Task
from crewai.flow import HumanFeedbackPending
from crewai.flow.flow import Flow, FlowState, and_, listen, start
from crewai.flow.human_feedback import human_feedback
from crewai.flow.persistence import persist
from crewai.project import CrewBase, agent, crew, task
from crewai.tools import tool
from offline_llm import OfflineLLM
from pydantic import BaseModel

CALLS: Counter[str] = Counter()
"""Model calls, by the name of the model."""


class CountingLLM(OfflineLLM):
    def _respond(self, *args: Any) -> Any:
        CALLS[self.model] += 1
        return super()._respond(*args)


class ReactLLM(OfflineLLM):
    """Uses the tool `weather` once, then answers with what it found."""

    def reply(self, prompt: str) -> str:
        if "Observation" in prompt.split("Action Input", 2)[-1] and "21 degrees" in prompt:
            return "Thought: I know enough.\nFinal Answer: It is 21 degrees."
        return 'Thought: I should look.\nAction: weather\nAction Input: {"place": "Lisbon"}'


def worker(role: str, llm: OfflineLLM | None = None, **more: Any) -> Agent:
    return Agent(role=role, goal="Work", backstory="Works.", llm=llm or OfflineLLM(model="offline"), **more)


def crew_of(*tasks: Task) -> Crew:
    return Crew(agents=[one.agent for one in tasks], tasks=list(tasks))


def job(name: str | None, description: str, agent: Agent, **more: Any) -> Task:
    return Task(name=name, description=description, expected_output="A line.", agent=agent, **more)


def failing() -> Crew:
    optimist = worker("Optimist", CountingLLM(model="failing", error="no luck"))
    return crew_of(job("try", "Write about {topic}.", optimist))


def slow() -> Crew:
    llm = [CountingLLM(model="slow", seconds=0.3) for _ in range(6)]
    return crew_of(*(job(f"part {n}", f"Write part {n}.", worker(f"Writer {n}", one)) for n, one in enumerate(llm)))


def with_tool() -> Crew:
    @tool("weather")
    def weather(place: str) -> str:
        """Say how warm it is at a place."""
        return f"21 degrees in {place}"

    return crew_of(job("look", "Say how warm it is.", worker("Scout", ReactLLM(model="react"), tools=[weather])))


class Plan(BaseModel):
    title: str
    stops: list[str]


def structured() -> Crew:
    return crew_of(job("plan", "Write a plan: first, second.", worker("Planner"), output_pydantic=Plan))


def parallel() -> Crew:
    left = job("left", "Write about the left.", worker("Left"), async_execution=True)
    right = job("right", "Write about the right.", worker("Right"), async_execution=True)
    return crew_of(left, right, job("both", "Write about both.", worker("Both"), context=[left, right]))


def nameless() -> Crew:
    long = "Write about {topic} in a way that nobody has written about it before, and then once more."
    return crew_of(job(None, long, worker("Writer"), human_input=True))


def with_json_in_prompt() -> Crew:
    return crew_of(job("json", 'Write {topic} as {"key": "value"}.', worker("Writer")))


@CrewBase
class Classic:
    """The shape that `crewai create crew` makes, without its YAML files."""

    agents: list[Any]
    tasks: list[Any]
    agents_config: ClassVar[dict[str, Any]] = {}
    tasks_config: ClassVar[dict[str, Any]] = {}

    @agent
    def writer(self) -> Agent:
        return worker("Writer")

    @task
    def write(self) -> Task:
        return job(None, "Write about {topic}.", self.writer())

    @crew
    def crew(self) -> Crew:
        return Crew(agents=self.agents, tasks=self.tasks)


_SAME = crew_of(job("same", "Write about {topic}.", worker("Writer")))


def same() -> Crew:
    return _SAME


def broken() -> Crew:
    raise RuntimeError("the recipe is lost")


def nothing() -> None:
    return None


class Wide(Flow):
    """Two methods at the same time, each with an agent of its own, and a state that is a dictionary."""

    @start()
    def left(self) -> str:
        return worker("Left").kickoff(f"Write about {self.state['topic']}.").raw

    @start()
    async def right(self) -> str:
        answer = await worker("Right").kickoff_async(f"Write about {self.state['topic']}.")
        return answer.raw

    @listen(and_(left, right))  # what ends last is the flow's result
    def last(self) -> list[str]:
        return ["a", "b"]


class Failing(Flow):
    @start()
    def begin(self) -> str:
        return "begun"

    @listen(begin)
    def go_on(self) -> None:
        raise RuntimeError("the flow ran dry")


class Slow(Flow):
    @start()
    def one(self) -> None:
        OfflineLLM(model="offline", seconds=0.3).call("wait")

    @listen(one)
    def two(self) -> None:
        CALLS["slow flow"] += 1
        OfflineLLM(model="offline", seconds=0.3).call("wait")

    @listen(two)
    def three(self) -> None:
        CALLS["slow flow"] += 1


class Elsewhere:
    """A provider of the flow's own, which hands the question on and lets go of the flow."""

    def request_feedback(self, context: Any, flow: Any) -> str:
        raise HumanFeedbackPending(context=context)


class Paused(Flow):
    @start()
    @human_feedback(message="Good?", provider=Elsewhere())
    def show(self) -> str:
        return "a letter"


class Asking(Flow):
    @start()
    def greet(self) -> str:
        return f"Hello, {self.ask('What is your name?')}!"


class LeavingLLM(OfflineLLM):
    def reply(self, prompt: str) -> str:
        raise SystemExit


def leaves() -> Crew:
    return crew_of(job("leave", "Leave.", worker("Leaver", LeavingLLM(model="leaving"))))


class Counted(FlowState):
    count: int = 0


@persist()
class Counting(Flow[Counted]):
    """Counts its runs in a state that it keeps."""

    @start()
    def go_on(self) -> dict[str, Any]:
        self.state.count += 1
        return {"id": self.state.id, "count": self.state.count}
