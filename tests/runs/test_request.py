"""The options of a run: checked once, as one value."""

from typing import Any

import pytest
from pydantic import BaseModel, SecretStr, ValidationError

from prefect_crew import Budget, DeployedCrew, WaitPolicy
from prefect_crew.blocks import crew_of
from prefect_crew.client.inputs import Inputs
from prefect_crew.client.webhooks import Webhooks
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.runs.request import RunOptions

STATE = "3f2b8c1e-9d47-4a6b-8f0e-5c1d2a7b9e64"


class Trip(BaseModel):
    city: str


def test_options_are_kept_and_frozen():
    def review(request: Any) -> Any: ...

    given: dict[str, Any] = {
        "name": "plan", "idempotency_key": "k", "force_new": True, "wait": WaitPolicy(timeout=5), "output_type": Trip,
        "review": review, "webhooks": Webhooks(crew="https://hooks.test/mine"), "meta": {"a": 1},
    }  # fmt: skip
    options = RunOptions.of(**given, restore_from=STATE, budgets=[Budget(max_kickoffs=2)])
    assert {name: getattr(options, name) for name in given} == given
    assert options.restore_from == STATE
    assert options.budgets == (Budget(max_kickoffs=2),)
    with pytest.raises(ValidationError, match="frozen"):
        options.name = "other"
    assert RunOptions.of(**dict.fromkeys(set(given) - {"force_new"})).model_dump() == RunOptions().model_dump()


def test_no_repr_shows_what_may_hold_a_secret():
    options = RunOptions.of(meta={"login": "pass-1234"}, webhooks=Webhooks(crew="https://hooks.test/pass-1234"))
    assert "login" in repr(options)
    assert "pass-1234" not in repr(options)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("force_new", "yes", "force_new has to be True or False"),
        ("name", 3, "name has to be a text"),
        ("budgets", [3], "budgets has to be Budgets"),
        ("budgets", Budget(max_kickoffs=1), "budgets has to be Budgets"),
        ("wait", {"timeout": 5}, "wait has to be a WaitPolicy"),
        ("restore_from", 7, "restore_from has to be the kickoff id"),
        ("meta", "text", "meta has to be a mapping"),
        ("webhooks", "https://x", "webhooks has to be Web"),
        ("output_type", dict, "output_type has to be a pydantic"),
        ("output_type", list[int], "output_type has to be a pydantic"),
        ("review", "from", "review has to be 'form' or a function"),
        *(
            ("session", name, "session has to be a name of 1 to 200 characters, without braces or control characters")
            for name in (" \n", "x" * 201, "c-{{ note }}", "a\nb", 42, "half a \ud800")
        ),
    ],
)
def test_an_option_of_another_kind_is_refused(option: str, value: Any, message: str):
    with pytest.raises(ConfigurationError, match=message) as caught:
        RunOptions.of(**{option: value})
    assert str(caught.value).endswith("Nothing was started.")
    assert caught.value.__context__ is None, "the error of pydantic holds what was given"


def test_a_session_chooses_the_state_to_restore_itself():
    with pytest.raises(ConfigurationError, match="chooses the state to restore itself"):
        RunOptions.of(session="s", restore_from=STATE)
    with pytest.raises(ConfigurationError, match=r"The input 'id' names the state of a Flow, .*Leave the input"):
        crew_of(DeployedCrew(url="https://crew.test", token=SecretStr("t"), flow=True)).take(
            Inputs.of({"id": STATE}), restore_from=None, session="s"
        )
