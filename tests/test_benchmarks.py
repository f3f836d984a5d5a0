"""The benchmarks run: all of them, with tiny numbers. What they measure then means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = {
    *("late", "rows-10k", "rows-1k", "rows-100k", "ledger", "ranges", "webhooks", "polling", "one-run", "concurrent"),
    *("pipeline", "memory", "real-crews", "demo"),
}


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.crewai
@pytest.mark.timeout(1500)
def test_every_part_measures_what_its_goals_are_about(tmp_path: Path):
    kept = tmp_path / "small.json"
    command = [sys.executable, "benchmarks/run.py", "--small", "--to", str(kept)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1480)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads(kept.read_text())
    assert set(results["parts"]) == PARTS
    for name, part in results["parts"].items():
        assert "failed" not in part, name
        assert part["runs"], name
        assert any(row["goal"] is not None for row in part["rows"]), name
        for row in part["rows"]:
            assert row["value"] >= 0 or "longer" in row["figure"], row
            assert f"| {row['work']} | {row['figure']} |" in done.stdout


def test_the_page_of_figures_has_a_place_for_the_table():
    page = (ROOT / "docs" / "explanation" / "performance.md").read_text()
    begin, end = "<!-- figures: benchmarks/run.py --table -->", "<!-- end of figures -->"
    assert page.count(begin) == page.count(end) == 1
    assert page.index(begin) < page.index(end)
