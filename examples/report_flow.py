"""A flow in two steps: the first runs a crew, the second makes a report of what it found.

prefect-crew serve examples/report_flow.py:ReportFlow
"""

from crewai import Agent, Crew, Task
from crewai.flow.flow import Flow, listen, start
from offline_llm import OfflineLLM
from pydantic import BaseModel, Field


class ReportState(BaseModel):
    """What the flow knows. Its fields are the flow's inputs.

    CrewAI makes the state before the inputs come, so that each field needs a default. `required` is how the crew
    server learns that a run makes no sense without it.
    """

    topic: str = Field(default="", description="What the report is about.", json_schema_extra={"required": True})
    sections: int = Field(default=2, description="How many sections it has, at most three.")
    notes: str = ""


class Report(BaseModel):
    title: str
    sections: list[str]
    words: int


class ReportFlow(Flow[ReportState]):
    """Researches a topic and returns a Report."""

    @start()
    def research(self) -> str:
        analyst = Agent(
            role="Analyst",
            goal="Find out what matters about {topic}",
            backstory="You read everything and say little.",
            llm=OfflineLLM(model="offline"),
        )
        look = Task(
            name="look",
            description="Find out what matters about {topic}: past, present, future.",
            expected_output="Three notes, a line each.",
            agent=analyst,
        )
        crew = Crew(agents=[analyst], tasks=[look])
        self.state.notes = crew.kickoff(inputs={"topic": self.state.topic}).raw
        return self.state.notes

    @listen(research)
    def report(self, notes: str) -> Report:
        found = [line.removeprefix("- ") for line in notes.splitlines() if line.startswith("- ")]
        return Report(
            title=f"Report on {self.state.topic}", sections=found[: self.state.sections], words=len(notes.split())
        )
