"""How long the line of docs/guides/examples.md takes, part by part, and again when everything is there already.

Needs PREFECT_API_URL: a server of its own, since it deploys everything that deployments/ has. Runs from the root of the
repository, with `prefect` and `prefect-crew` of the environment that runs it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from figures import report

ROOT = Path(__file__).parents[1]
PARTS = {
    "register the block": "prefect block register -m prefect_crew",
    "make the pool for processes": "prefect work-pool create processes --type process --overwrite",
    "make the pool for crew workers": "prefect work-pool create crews --type crew --overwrite",
    "deploy --all": "prefect --no-prompt deploy --all --prefect-file deployments/prefect.yaml",
    "set the automations up": "prefect-crew automations apply --pool processes",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    if not os.environ.get("PREFECT_API_URL"):
        raise SystemExit("Set PREFECT_API_URL to a server that may be deployed to.")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    for _ in range(runs):
        times: dict[str, float] = {}
        for part, line in PARTS.items():
            started = time.perf_counter()
            subprocess.run(line.split(), cwd=ROOT, env={**os.environ, "PATH": path}, check=True, capture_output=True)
            times[f"{part.replace(' ', '_')}_seconds"] = time.perf_counter() - started
        report("deploy all", seconds=sum(times.values()), **times)


if __name__ == "__main__":
    main()
