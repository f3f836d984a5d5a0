import pickle
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from prefect_crew.client.webhooks import BasicAuth, BearerAuth, HumanInputWebhook, StreamWebhook, Webhooks

BEARER = BearerAuth(token=SecretStr("t0ken-of-bearer"))
BASIC = BasicAuth(username="ana", password=SecretStr("p4ssword"))
ALL = Webhooks(
    task="https://hooks.example.com/task?s3cret=1",
    step="https://hooks.example.com/step",
    crew="https://user:pw@hooks.example.com/crew/s3cret",
    human_input=HumanInputWebhook(url="https://hooks.example.com/human", authentication=BASIC),
    stream=StreamWebhook(
        url="https://hooks.example.com/stream", events=["crew_kickoff_started"], realtime=True, authentication=BEARER
    ),
)
SENT: dict[str, Any] = {
    "taskWebhookUrl": "https://hooks.example.com/task?s3cret=1",
    "stepWebhookUrl": "https://hooks.example.com/step",
    "crewWebhookUrl": "https://user:pw@hooks.example.com/crew/s3cret",
    "humanInputWebhook": {
        "url": "https://hooks.example.com/human",
        "authentication": {"strategy": "basic", "username": "ana", "password": "p4ssword"},
    },
    "humanInputWebhookUrl": "https://hooks.example.com/human",
    "webhooks": {
        "events": ["crew_kickoff_started"],
        "url": "https://hooks.example.com/stream",
        "realtime": True,
        "authentication": {"strategy": "bearer", "token": "t0ken-of-bearer"},
    },
}


def test_only_a_kickoff_shows_secret_targets():
    assert ALL.to_json() == SENT
    assert Webhooks.from_json({"inputs": {}, **SENT}) == ALL == pickle.loads(pickle.dumps(ALL))
    assert set(ALL.secrets()) == {
        *(SENT[name] for name in ("taskWebhookUrl", "stepWebhookUrl", "crewWebhookUrl")),
        *(SENT[name]["url"] for name in ("humanInputWebhook", "webhooks")),
        *("p4ssword", "t0ken-of-bearer"),
    }
    shown = "".join(f"{model!r} {model}" for model in (ALL, ALL.human_input, ALL.stream, BASIC, BEARER))
    assert shown.count("https://hooks.example.com/…") > 5
    for secret in ("s3cret", "t0ken", "p4ssword", ":pw@"):
        assert secret not in shown
    assert "t0ken" not in ALL.model_dump_json() + repr(ALL.model_dump())
    with pytest.raises(ValidationError):
        ALL.task = "https://other.example.com"  # type: ignore[misc]


def test_only_what_is_given_is_sent():
    assert Webhooks().to_json() == {}
    stream = StreamWebhook(url="https://h.example.com", events=["a", "b"])
    assert Webhooks(human_input="https://h.example.com", stream=stream).to_json() == {
        "humanInputWebhook": {"url": "https://h.example.com"},
        "humanInputWebhookUrl": "https://h.example.com",
        "webhooks": {"events": ["a", "b"], "url": "https://h.example.com", "realtime": False},
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"task": "hooks.example.com/s3cret"},
        {"crew": "ftp://hooks.example.com/s3cret"},
        {"step": "https:///s3cret"},
        {"human_input": "s3cret"},
        {"stream": {"url": "https://h.example.com/s3cret", "events": []}},
        {"human_input": {"url": "https://h.example.com/", "authentication": {"token": ["s3cret"]}}},
        {"later": "https://h.example.com/s3cret"},
    ],
    ids=["no-scheme", "other-scheme", "no-host", "no-url", "no-events", "odd-token", "unknown-hook"],
)
def test_a_bad_target_is_refused_and_not_shown(wrong: dict[str, Any]):
    with pytest.raises(ValidationError) as caught:
        Webhooks.model_validate(wrong)
    assert "s3cret" not in str(caught.value)
