"""Two agents, two tasks: one finds out, one writes.

prefect-crew serve examples/travel_crew.py:build
"""

from crewai import Agent, Crew, Process, Task
from offline_llm import OfflineLLM


def build() -> Crew:
    """Return a new crew; it takes the inputs `topic` and `audience`."""
    researcher = Agent(
        role="Travel researcher",
        goal="Find out what {audience} should know before they go",
        backstory="You have been everywhere twice, and kept notes.",
        llm=OfflineLLM(model="offline"),
    )
    writer = Agent(
        role="Guide writer",
        goal="Turn notes into a guide that fits in a pocket",
        backstory="You write for people who stand in the street and want to know where to go next.",
        llm=OfflineLLM(model="offline"),
    )
    research = Task(
        name="research",
        description="Find out what {audience} should know about {topic}: sights, food, getting around.",
        expected_output="Three notes, a line each.",
        agent=researcher,
    )
    write = Task(
        name="write",
        description="Write a day in {topic} for {audience}: morning, afternoon, evening.",
        expected_output="A guide in Markdown.",
        agent=writer,
        context=[research],
    )
    return Crew(agents=[researcher, writer], tasks=[research, write], process=Process.sequential)
