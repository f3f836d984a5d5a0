"""What Prefect's client and contexts lack: a logger of one line for each message."""

import logging

import pytest

from prefect_crew._internal.prefect_api import OneLine, run_logger

HOSTILE = "run 1\n12:00:00 | ERROR | forged\r\x1b]0;title\x07\x1b[2J\x9b2J\u202egpj.exe\u2028next\x85line"


class Costly:
    def __str__(self) -> str:
        raise AssertionError("formatted for nothing")


def test_a_message_is_one_line_whatever_is_in_it(caplog: pytest.LogCaptureFixture):
    logger = OneLine(logging.getLogger("prefect_crew.test"), {})
    with caplog.at_level(logging.INFO):
        logger.warning("Crew %s waits: %s (100%%)", HOSTILE, ValueError(HOSTILE))
        logger.info(f"{HOSTILE} 100%")
        logger.error("%r and %d", HOSTILE, 3)
        run_logger().info("plain")
        logger.debug("%s", Costly())
    texts = [record.getMessage() for record in caplog.records]
    assert [text.isprintable() for text in texts] == [True] * 4
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "ERROR", "INFO"]
    assert texts[0].startswith("Crew run 1 12:00:00 | ERROR | forged")
    assert texts[0].endswith("(100%)")
    assert texts[1].endswith("100%")
    assert {record.filename for record in caplog.records} == {"test_prefect_api.py"}
