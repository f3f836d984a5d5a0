"""What a batch may do: options, the retry rule."""

from __future__ import annotations

import re
from typing import Any

import pytest

from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.outcomes import LOST, MISFIT, STOPPED_WITH_BATCH, RetryRule, RowEnd
from prefect_crew.batches.rows import RowJob
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.records.model import RecordPhase, RunRecord, utcnow

JOB = RowJob(0, 1, "k", {}, "d")

# Options


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_in_flight": 0}, id="nothing in flight"),
        pytest.param({"max_in_flight": 1.5}, id="half a run"),
        pytest.param({"max_in_flight": True}, id="a switch"),
        pytest.param({"kickoffs_per_second": 0}, id="no kickoffs"),
        pytest.param({"kickoffs_per_second": float("nan")}, id="not a number"),
        pytest.param({"on_failure": "halt"}, id="unknown policy"),
        pytest.param({"on_failure": 0}, id="no failures"),
        pytest.param({"on_failure": None}, id="no policy"),
        pytest.param({"wait": "x"}, id="wait"),
        pytest.param({"output_type": dict}, id="type of the output"),
        pytest.param({"meta": "x"}, id="meta"),
        pytest.param({"webhooks": "x"}, id="webhooks"),
        pytest.param({"on_failure": 2.5}, id="half a row"),
        pytest.param({"on_failure": True}, id="policy as a switch"),
        pytest.param({"on_cancel": "wait"}, id="unknown cancelling"),
        pytest.param({"order": "random"}, id="unknown order"),
        pytest.param({"retries": -1}, id="less than no retries"),
        pytest.param({"retries": {"CrewFailedError": "2"}}, id="retries as text"),
        pytest.param({"retries": {"KickoffUncertainError": 1}}, id="retry of the uncertain"),
        pytest.param({"retry_failed": "key"}, id="a text for keys"),
        pytest.param({"breaker": 0}, id="a breaker that is always open"),
        pytest.param({"rows": "5"}, id="rows are no range"),
        pytest.param({"rows": ":"}, id="a range without ends"),
        pytest.param({"rows": "7:7"}, id="an empty range"),
        pytest.param({"rows": "-5:"}, id="a range from the end"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]):
    with pytest.raises(ConfigurationError, match=re.escape(next(iter(options)))):
        BatchOptions(**options)


@pytest.mark.parametrize(
    ("policy", "failed", "ended", "stops"),
    [
        pytest.param("continue", 99, 100, False, id="continue"),
        pytest.param("stop", 0, 100, False, id="stop without a failure"),
        pytest.param("stop", 1, 1, True, id="stop"),
        pytest.param(3, 2, 100, False, id="below the number"),
        pytest.param(3, 3, 3, True, id="at the number"),
        pytest.param(0.1, 5, 10, False, id="share of too few"),
        pytest.param(0.1, 2, 20, False, id="at the share"),
        pytest.param(0.1, 3, 20, True, id="above the share"),
        pytest.param(1.0, 1, 50, True, id="one as a float is a number"),
    ],
)
def test_when_a_policy_stops(policy: Any, failed: int, ended: int, stops: bool):
    assert (BatchOptions(on_failure=policy).stop_when(failed, ended) is not None) is stops


def test_keys_to_retry_are_looked_up_and_not_searched():
    for given in (["a", "b"], ("a", "b"), {"a", "b"}):
        assert BatchOptions(retry_failed=given).retry_failed == frozenset({"a", "b"})
        assert isinstance(BatchOptions(retry_failed=given).retry_failed, frozenset)
    assert BatchOptions(retry_failed=True).retry_failed is True


# Retries


def end(kind: str | None, state: str = "failed", *, found: bool = False, reason: str | None = None) -> RowEnd:
    now = utcnow()
    record = RunRecord(
        idempotency_key="batch/b/k",
        attempt=1,
        phase=RecordPhase.ENDED,
        crew="c",
        crew_url="u",
        inputs_digest="d",
        owner="o",
        claimed_at=now,
        reason=reason,
    )
    return RowEnd(JOB, state, record, "why", kind, found=found)


FAILED = end("CrewFailedError")


@pytest.mark.parametrize(
    ("rule", "ended", "count", "before", "again"),
    [
        pytest.param(RetryRule(), FAILED, 1, 0, False, id="off by default"),
        pytest.param(RetryRule(2), FAILED, 2, 0, True, id="second retry"),
        pytest.param(RetryRule(2), FAILED, 3, 0, False, id="no third"),
        pytest.param(RetryRule(9), FAILED, 3, 0, False, id="never beyond the crew's limit"),
        pytest.param(RetryRule(1), FAILED, 1, 1, True, id="one that an earlier call still owed"),
        pytest.param(RetryRule({"CrewFailedError": 1}), FAILED, 1, 0, True, id="by class"),
        pytest.param(RetryRule({"CrewStoppedError": 1}), FAILED, 1, 0, False, id="another class"),
        pytest.param(RetryRule(1), end("OutputTypeError", MISFIT), 1, 0, True, id="misfit"),
        pytest.param(RetryRule(1), end("CrewLostError", LOST), 1, 0, False, id="lost is no number's business"),
        pytest.param(RetryRule({"CrewLostError": 1}), end("CrewLostError", LOST), 1, 0, True, id="lost by class"),
        pytest.param(RetryRule(2), end("CrewTimeoutError", "timed-out"), 1, 0, False, id="timed out: it may run on"),
        pytest.param(RetryRule(2), end("KickoffUncertainError", "uncertain"), 1, 0, False, id="uncertain"),
        pytest.param(RetryRule(2), end("InvalidInputsError", "not-started"), 0, 0, False, id="refused"),
        pytest.param(RetryRule(0, True), FAILED, 1, 1, True, id="failed in an earlier call"),
        pytest.param(RetryRule(0, True), FAILED, 2, 1, False, id="once a call"),
        pytest.param(RetryRule(0, True), end("CrewLostError", LOST), 1, 1, False, id="lost is not among all failed"),
        pytest.param(RetryRule(0, {"k"}), end("CrewLostError", LOST), 1, 1, True, id="lost by its key"),
        pytest.param(RetryRule(0, {"other"}), FAILED, 1, 1, False, id="another key"),
        pytest.param(
            RetryRule(),
            end("CrewStoppedError", "stopped", found=True, reason=STOPPED_WITH_BATCH),
            1,
            1,
            True,
            id="stopped with the batch",
        ),
    ],
)
def test_when_a_row_is_bought_again(rule: RetryRule, ended: RowEnd, count: int, before: int, again: bool):
    assert rule.again(ended, count=count, before=before, most=3) is again
