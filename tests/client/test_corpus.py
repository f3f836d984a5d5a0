"""Every known variant of every answer, one file each: the body, and the model that it must become.

A file holds the body as `body` (JSON), `text`, `hex` (bytes) or `generate`, what the parser needs besides, and either
`expected` (all fields that differ from their defaults) or `raises`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from prefect_crew import exceptions
from prefect_crew.client._parsing import (
    parse_error,
    parse_inputs,
    parse_kickoff,
    parse_resume,
    parse_status,
    parse_stop,
    parse_webhook,
)
from prefect_crew.states import STATE_WORDS

CORPUS = Path(__file__).parent / "corpus"
RUN = "run-1"
PARSERS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "inputs": lambda body, _: parse_inputs(body),
    "kickoff": lambda body, _: parse_kickoff(body),
    "status": lambda body, _: parse_status(body, RUN),
    "resume": lambda body, _: parse_resume(body),
    "stop": lambda body, case: parse_stop(body, RUN, case.get("status_code", 200)),
    "webhook": lambda body, case: parse_webhook(case["kind"], body),
}
FILES = sorted(CORPUS.glob("*/*.json"))


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def generated(rule: dict[str, Any]) -> str:
    if "repeat" in rule:
        return rule["repeat"] * rule["times"]
    text = rule["text"] * (rule["megabytes"] * 1024**2 // len(rule["text"].encode()) + 1)
    return json.dumps({**rule["template"], rule["key"]: text}, ensure_ascii=False)


def forms(case: dict[str, Any]) -> Iterator[Any]:
    """Yield the body in each form in which it can reach the parser."""
    if "hex" in case:
        yield bytes.fromhex(case["hex"])
        return
    if "body" in case:
        text = json.dumps(case["body"])
        if not isinstance(case["body"], str):  # text is taken for JSON that is not decoded yet
            yield case["body"]
    else:
        text = case["text"] if "text" in case else generated(case["generate"])
    yield text
    yield text.encode()


def plain(model: Any) -> Any:
    """Return a model as the JSON that the corpus writes: fields at their defaults and raw bodies left out."""
    if isinstance(model, list):
        return [plain(item) for item in model]
    if not isinstance(model, BaseModel):
        return model
    fields = model.model_dump(mode="json", exclude_defaults=True, exclude={"raw": True})
    if "tasks" in fields:
        fields["tasks"] = [{key: value for key, value in task.items() if key != "raw"} for task in fields["tasks"]]
    return fields


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in PARSERS], ids=name_of)
def test_body_becomes_the_model_beside_it(path: Path):
    case = load(path)
    parse = PARSERS[path.parent.name]
    for body in forms(case):
        if "raises" in case:
            with pytest.raises(getattr(exceptions, case["raises"])) as caught:
                parse(body, case)
            assert len(str(caught.value)) < 1000
            continue
        found = parse(body, case)
        if "generate" in case:
            assert found.output == json.loads(generated(case["generate"]))["result"]
            found = found.model_copy(update={"output": None})
        assert plain(found) == case["expected"]
        if "body" in case and hasattr(found, "raw"):
            assert found.raw == case["body"]


@pytest.mark.parametrize("path", sorted(CORPUS.glob("error/*.json")), ids=name_of)
def test_error_body_becomes_the_facts_beside_it(path: Path):
    case = load(path)
    now = datetime.fromisoformat(case["now"]) if "now" in case else None
    for body in forms(case):
        if not isinstance(body, (str, bytes)):
            continue
        facts = parse_error(case["status_code"], case.get("headers", {}), body, now=now)
        found = {key: value for key, value in facts._asdict().items() if value not in (None, ()) and key != "raw"}
        text = found.pop("body")
        assert text == (body if isinstance(body, str) else body.decode("utf-8", "replace"))
        found = {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
        assert found == case["expected"]


# The tables of the API's description. The corpus must show each word and each key in use.

WORDS = {
    "pending": "PENDING QUEUED SCHEDULED CREATED RECEIVED",
    "running": "STARTED RUNNING IN_PROGRESS PROCESSING PROGRESS RETRY RETRYING RESUMED",
    "waiting": "PENDING_HUMAN_INPUT AWAITING_HUMAN_FEEDBACK AWAITING_HUMAN_INPUT WAITING_FOR_HUMAN "
    "HUMAN_INPUT_REQUESTED PAUSED",
    "completed": "SUCCESS SUCCEEDED COMPLETED COMPLETE DONE FINISHED",
    "failed": "FAILED FAILURE ERROR ERRORED TIMEOUT TIMED_OUT",
    "stopped": "REVOKED STOPPED CANCELLED CANCELED ABORTED",
    "unknown": "NOT_FOUND",
}
KEYS = {
    "inputs": "inputs inputs[].name inputs[].type inputs[].required",
    "kickoff": "kickoff_id kickoffId execution_id executionId id task_id",
    "status": "state status message result result.output result.raw result.result output raw last_executed_task "
    "last_executed_task.output result_json result.json_dict result.pydantic output_json result.tasks tasks "
    "tasks_output task_outputs tasks[].task_id tasks[].name tasks[].task_name progress progress.completed_tasks "
    "progress.total_tasks current_task last_step error error_message detail token_usage execution_time "
    "token_usage.total_tokens token_usage.prompt_tokens token_usage.completion_tokens",
    "resume": "status message kickoff_id",
    "stop": "status kickoffId detail",
    "error": "error message details details.missing_inputs detail",
}
HOOKS = {
    "task": (
        "kickoff_id task_id status output agent execution_time",
        "description name expected_output summary agent output output_json kickoff_id meta",
    ),
    "step": (
        "kickoff_id task_id agent step_type content",
        "prompt thought tool tool_input result kickoff_id meta",
    ),
    "crew": (
        "kickoff_id status result execution_time meta",
        "kickoff_id result result_json token_usage meta",
    ),
}


def keys_of(body: Any, prefix: str = "") -> set[str]:
    if isinstance(body, list):
        return set().union(*(keys_of(item, f"{prefix[:-1]}[].") for item in body))
    if not isinstance(body, dict):
        return set()
    return {f"{prefix}{key}" for key in body}.union(*(keys_of(value, f"{prefix}{key}.") for key, value in body.items()))


def bodies(folder: str) -> list[Any]:
    return [case["body"] for case in map(load, sorted(CORPUS.glob(f"{folder}/*.json"))) if "body" in case]


def test_every_state_word_of_the_table_is_known_and_has_its_file():
    table = {state: set(words.split()) for state, words in WORDS.items()}
    assert {state.value: set(words) for state, words in STATE_WORDS.items()} == table
    for state, words in table.items():
        for word in words:
            case = load(CORPUS / "status" / f"word-{word.lower().replace('_', '-')}.json")
            assert case["body"]["state"].replace(" ", "_") == word
            assert case["expected"]["state"] == state


@pytest.mark.parametrize("folder", KEYS)
def test_every_key_of_the_table_is_in_some_file(folder: str):
    used = set().union(*map(keys_of, bodies(folder)))
    assert set(KEYS[folder].split()) - used == set()


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("generation", [0, 1], ids=["first", "later"])
def test_each_generation_of_each_hook_is_in_some_file(kind: str, generation: int):
    wanted = set(HOOKS[kind][generation].split())
    assert any(isinstance(body, dict) and wanted <= set(body) for body in bodies("webhook"))


@pytest.mark.parametrize("folder", [*PARSERS, "error"])
def test_no_folder_is_empty(folder: str):
    assert len([path for path in FILES if path.parent.name == folder]) > 10


def test_no_failed_or_unknown_body_becomes_a_result():
    for path in CORPUS.glob("status/*.json"):
        case = load(path)
        if "expected" in case and case["expected"]["state"] != "completed":
            for body in forms(case):
                found = parse_status(body, RUN)
                assert (found.output, found.data) == (None, None)
                with pytest.raises(exceptions.InvalidCallError, match="not completed"):
                    found.result()
