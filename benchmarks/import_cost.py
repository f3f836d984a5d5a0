"""What `import prefect_crew` adds to a script that already defines a Prefect flow and task.

Each figure is of a fresh interpreter; the median of several is what counts. Goal: at most 60 ms.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from figures import report

SCRIPT = """
import time
from prefect import flow, task
@flow
def greet(): ...
@task
def say(): ...
started = time.perf_counter()
import prefect_crew
print((time.perf_counter() - started) * 1000)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    times = [
        float(subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True).stdout)
        for _ in range(runs + 1)
    ][1:]
    report("import prefect_crew", ms=statistics.median(times), least_ms=min(times), most_ms=max(times))


if __name__ == "__main__":
    main()
