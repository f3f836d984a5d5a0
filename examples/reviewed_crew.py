"""A crew with a person in it: the draft goes on only when someone has approved it.

    prefect-crew serve examples/reviewed_crew.py:build

The run waits as "Pending Human Input" until `POST /resume` answers. A rejected draft is written again with what the
person said, and the next draft waits again.
"""

from crewai import Agent, Crew, Task
from offline_llm import OfflineLLM


def build() -> Crew:
    """Return a new crew; it takes the input `topic`."""
    writer = Agent(
        role="Writer",
        goal="Write an announcement that people read to the end",
        backstory="You cut every second word.",
        llm=OfflineLLM(model="offline"),
    )
    editor = Agent(
        role="Editor",
        goal="Make it ready to send",
        backstory="You find the last mistake.",
        llm=OfflineLLM(model="offline"),
    )
    draft = Task(
        name="draft",
        description="Draft an announcement of {topic}: what, when, for whom.",
        expected_output="Three lines.",
        agent=writer,
        human_input=True,
    )
    polish = Task(
        name="polish",
        description="Write the final announcement of {topic}: subject, text.",
        expected_output="The announcement, ready to send.",
        agent=editor,
        context=[draft],
    )
    return Crew(agents=[writer, editor], tasks=[draft, polish])
