"""A flow with a person in it: what they say decides which way it goes.

    prefect-crew serve examples/reviewed_flow.py:ReviewedFlow

Without a `provider`, `@human_feedback` asks whoever serves the flow: a terminal, or with the crew server the person
who answers through `POST /resume`.
"""

from crewai import Agent
from crewai.flow.flow import Flow, listen, or_, start
from crewai.flow.human_feedback import human_feedback
from offline_llm import OfflineLLM
from pydantic import BaseModel, Field


class LetterState(BaseModel):
    """What the flow knows; `topic` is its input."""

    topic: str = Field(default="", description="What the letter is about.", json_schema_extra={"required": True})
    wishes: list[str] = []


class ReviewedFlow(Flow[LetterState]):
    """Writes a letter until it is approved."""

    @start()
    def begin(self) -> str:
        return self.state.topic

    @listen(or_("begin", "revise"))
    @human_feedback(
        message="Shall this letter be sent?",
        emit=["approved", "rejected"],
        llm=OfflineLLM(model="offline"),
    )
    def write(self) -> str:
        writer = Agent(
            role="Letter writer",
            goal="Write letters that get an answer",
            backstory="You have written to everyone.",
            llm=OfflineLLM(model="offline"),
        )
        asked = [f"Write a letter about {self.state.topic}: opening, request, thanks."]
        asked += [f"User feedback: {wish}" for wish in self.state.wishes]
        return writer.kickoff("\n".join(asked)).raw

    @listen("rejected")
    def revise(self) -> None:
        self.state.wishes.append(self.last_human_feedback.feedback)

    @listen("approved")
    def send(self) -> dict[str, str]:
        return {"letter": self.last_human_feedback.output, "status": "sent"}
