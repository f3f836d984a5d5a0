"""`make demo` in a fresh clone, and again: seconds, with the package cache of whoever runs this.

    python benchmarks/demo.py [--warm]

It clones the last commit into a temporary folder, with a Prefect home of its own. `--warm` does all that once before,
so that whatever is downloaded is in the cache.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import report

ROOT = Path(__file__).parents[1]
FOREIGN = ("PREFECT_", "CREW_", "MAKE", "MFLAGS", "VENV", "VIRTUAL_ENV", "PYTHON")
"""What a variable starts with that a new user of the repository does not have."""


def demo() -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as name:
        clone, home = Path(name, "clone"), Path(name, "home")
        env = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
        env["PREFECT_HOME"] = str(home)
        # Not the interpreter of this environment, which is built already.
        own = str(Path(sys.executable).parent)
        env["PATH"] = os.pathsep.join(place for place in env["PATH"].split(os.pathsep) if place != own)
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        return make(clone, env), make(clone, env)


def make(clone: Path, env: dict[str, str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(["make", "demo"], cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", action="store_true", help="do it once before it is measured")
    if parser.parse_args().warm:
        demo()
    fresh, again = demo()
    report("demo", fresh_seconds=fresh, again_seconds=again)


if __name__ == "__main__":
    main()
