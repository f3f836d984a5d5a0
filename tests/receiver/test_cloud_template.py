"""The template for Prefect Cloud's own webhooks, rendered as Cloud documents it: Jinja, with the parsed body."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.events.schemas.events import Event

from support.corpus import cases
from support.webhooks import BODIES, SAID_BY_NOBODY

TEMPLATE = jinja2.Environment(autoescape=False).from_string(
    Path(__file__).parents[2].joinpath("deployments", "cloud-webhook.jinja").read_text(encoding="utf-8")
)
KNOWN = cases("webhook")


def rendered(body: Any) -> Event:
    return Event.model_validate(json.loads(TEMPLATE.render(method="POST", headers={}, body=body)))


@pytest.mark.parametrize("name", KNOWN)
def test_a_body_becomes_its_event(name: str):
    case = KNOWN[name]
    body, kind = case["body"] if "body" in case else case["text"], case["kind"]  # Cloud passes what is no JSON as text
    event = rendered(body)
    if not name.startswith("refused"):
        assert event.event.startswith(f"crew.webhook.{kind}")
    if name in BODIES:
        full = "stream.crew_kickoff_started" if kind == "stream" else kind
        assert (event.event, event.resource.id) == (f"crew.webhook.{full}", "prefect-crew.run.k-1")
        key = body.get("meta", {}).get("idempotency_key")
        assert event.resource.get("prefect-crew.idempotency-key") == key
        said = json.dumps(event.payload)
        assert [word for word in SAID_BY_NOBODY if word in said] == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
keys = st.sampled_from(["kickoff_id", "task_id", "status", "meta", "events", "result", "agent", "thought"])


@given(json_values | st.dictionaries(keys, json_values | st.fixed_dictionaries({"idempotency_key": json_values})))
def test_whatever_the_body_it_gives_an_event(body: Any):
    assert rendered(body).event.startswith("crew.webhook.")
