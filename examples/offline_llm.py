"""A model that needs no network and no key: it makes its answers from the prompt, the same one each time.

It stands in for a real model in the examples and in tests: replace `OfflineLLM(model="offline")` by
`LLM(model="…")` from crewai, and the crew is the same. Make one object per agent and per crew, inside the factory:
a model counts its tokens over its whole life, so that a shared one adds up other agents' and other runs' tokens.
"""

import asyncio
import copy
import re
import time
import zlib
from typing import Any

from crewai.events.types.llm_events import LLMCallType
from crewai.llms.base_llm import BaseLLM, llm_call_context

_TASK = re.compile(r"Current Task:\s*(.*?)\s*(?:\n\nThis is the expected criteria|\n\nProvide your|\Z)", re.DOTALL)
_CONTEXT = re.compile(r"This is the context you're working with:\s*(.*?)\s*(?:\n\nProvide your|\Z)", re.DOTALL)
_FEEDBACK = re.compile(r"^User feedback: (.*)$", re.MULTILINE)
_HUMAN = re.compile(r"^Feedback: (.*)$", re.MULTILINE)
_VERB = re.compile(r"^(?:draft|find out|list|research|summari[sz]e|write)\s+", re.IGNORECASE)

_ADVICE = (
    "start early, and leave room for what turns up",
    "ask the people who live there: they know the quiet hours",
    "book the one thing that matters, and improvise the rest",
    "two good stops beat five hurried ones",
    "go on foot where you can, and by tram where you cannot",
    "keep the plan short enough to remember",
)


class OfflineLLM(BaseLLM):
    """A model made of rules.

    A task such as "Write a guide to Lisbon: morning, evening." is answered with a heading and one line for each point
    after the colon. What earlier tasks found is quoted, and what a person asked for is taken up. A structured answer
    (`output_pydantic`, `response_model`) is filled from the same parts.

    Attributes:
        seconds: How long each call takes.
        error: Text that each call fails with, to see a crew fail.
    """

    seconds: float = 0.0
    error: str | None = None

    def call(
        self,
        messages: str | list[Any],
        tools: list[dict[str, Any]] | None = None,
        callbacks: list[Any] | None = None,
        available_functions: dict[str, Any] | None = None,
        from_task: Any = None,
        from_agent: Any = None,
        response_model: type[Any] | None = None,
    ) -> Any:
        time.sleep(self.seconds)
        return self._respond(messages, from_task, from_agent, response_model)

    async def acall(
        self,
        messages: str | list[Any],
        tools: list[dict[str, Any]] | None = None,
        callbacks: list[Any] | None = None,
        available_functions: dict[str, Any] | None = None,
        from_task: Any = None,
        from_agent: Any = None,
        response_model: type[Any] | None = None,
    ) -> Any:
        await asyncio.sleep(self.seconds)
        return self._respond(messages, from_task, from_agent, response_model)

    def supports_function_calling(self) -> bool:
        return False

    def supports_stop_words(self) -> bool:
        return False

    def get_context_window_size(self) -> int:
        return 1_000_000

    def get_input_tokens_count(self, messages: str | list[Any], tools: Any = None, response_model: Any = None) -> int:
        return len(_text(messages).split())

    def reply(self, prompt: str) -> str:
        """Return the answer to a prompt. Override it to make the model say something else."""
        parts = _Parts(prompt)
        lines = [f"## {parts.subject}", ""]
        if parts.points:
            lines += [f"- **{point}**: {_advice(parts.subject, n)}." for n, point in enumerate(parts.points)]
        else:
            lines.append(f"{_advice(parts.subject, 0).capitalize()}.")
        if parts.notes:
            lines += ["", "Built on these notes:", "", *(f"> {line}" for line in parts.notes.splitlines())]
        if parts.feedback:
            lines += ["", "Changed as asked:", "", *(f"- {wish}" for wish in parts.feedback)]
        return "\n".join(lines)

    def _respond(self, messages: str | list[Any], task: Any, agent: Any, response_model: type[Any] | None) -> Any:
        prompt = _text(messages)
        with llm_call_context():
            self._emit_call_started_event(messages, from_task=task, from_agent=agent)
            if self.error is not None:
                self._emit_call_failed_event(self.error, from_task=task, from_agent=agent)
                raise RuntimeError(self.error)
            answer: Any = self.reply(prompt)
            if response_model is not None:
                answer = response_model.model_validate(_fill(response_model.model_json_schema(), _Parts(prompt)))
            said = answer if isinstance(answer, str) else answer.model_dump_json()
            usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(said.split())}
            # Crews read the model's own count, flows the event: CrewAI's models report both.
            self._track_token_usage_internal(usage)
            self._emit_call_completed_event(said, LLMCallType.LLM_CALL, from_task=task, from_agent=agent, usage=usage)
        return answer


class _Parts:
    """What a prompt asks for."""

    def __init__(self, prompt: str) -> None:
        asked = found.group(1) if (found := _TASK.search(prompt)) else prompt.strip().split("\n\n")[-1]
        sentence = re.split(r"(?<=[.?!])\s|\n", asked.strip(), maxsplit=1)[0].rstrip(".?! ")
        subject, _, points = sentence.partition(":")
        subject = _VERB.sub("", subject.strip()) or "Answer"
        self.subject = subject[0].upper() + subject[1:]
        self.points = [point.strip().capitalize() for point in re.split(r",| and ", points) if point.strip()]
        self.notes = found.group(1) if (found := _CONTEXT.search(prompt)) else ""
        self.feedback = [wish.strip() for wish in _FEEDBACK.findall(prompt)]
        self.said = " ".join(_HUMAN.findall(prompt)).casefold()

    def narrowed(self, number: int, point: str) -> "_Parts":
        """Return the parts with one point as the subject."""
        part = copy.copy(self)
        part.subject, part.points = f"{point}: {_advice(self.subject, number)}", []
        return part


def _text(messages: str | list[Any]) -> str:
    if isinstance(messages, str):
        return messages
    return "\n\n".join(str(message.get("content") or "") for message in messages)


def _advice(subject: str, number: int) -> str:
    return _ADVICE[(zlib.crc32(subject.encode()) + number) % len(_ADVICE)]


def _fill(schema: dict[str, Any], parts: _Parts, root: dict[str, Any] | None = None) -> Any:
    """Return a value that fits a JSON schema as pydantic writes it."""
    root = root or schema
    if "$ref" in schema:
        return _fill(root["$defs"][schema["$ref"].rpartition("/")[2]], parts, root)
    if options := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
        return next((option for option in options if _stem(option) in parts.said), options[0])
    if branches := schema.get("anyOf") or schema.get("allOf"):
        return _fill(branches[0], parts, root)
    kind = schema.get("type")
    if kind == "object":
        return {name: _fill(part, parts, root) for name, part in schema.get("properties", {}).items()}
    if kind == "array":
        items = enumerate(parts.points or [parts.subject])
        return [_fill(schema.get("items", {}), parts.narrowed(number, point), root) for number, point in items]
    if kind in ("integer", "number"):
        return len(parts.points)
    if kind == "boolean":
        return True
    return parts.subject


def _stem(option: Any) -> str:
    """Return what "approved" and "approve" have in common."""
    return str(option).casefold()[:6]
