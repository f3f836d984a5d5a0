"""What Prefect's templating of prefect.yaml does to idempotency keys: the fact that the docs and the file's comment
rest on."""

from __future__ import annotations

import pytest
from prefect.utilities.annotations import NotSet
from prefect.utilities.templating import apply_values


@pytest.mark.parametrize(
    "key",
    ["{{ scheduled_start:%Y-%m-%d }}", "daily-{{ scheduled_start:%Y-%m-%dT%H }}", "{{scheduled_start:%j}}"],
)
def test_a_key_with_a_format_is_left_alone(key: str):
    assert apply_values({"idempotency_key": key}, {}) == {"idempotency_key": key}


def test_a_key_without_a_format_loses_the_time():
    assert apply_values({"idempotency_key": "daily-{{ scheduled_start }}"}, {}) == {"idempotency_key": "daily-"}
    assert apply_values("{{ scheduled_start }}", {}) is NotSet


def test_a_template_of_a_pipeline_survives_in_parentheses_only():
    steps = [{"inputs": {"topic": "{{ (topic) }}", "notes": "on {{ (research.output) }}"}}]
    assert apply_values({"steps": steps}, {}) == {"steps": steps}
    assert apply_values("on {{ research.output }}", {}) == "on "
