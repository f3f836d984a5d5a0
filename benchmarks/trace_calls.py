"""How much of this package one run enters: the distinct functions, and the calls, of one `run_crew`.

Runs a crew that is done at once on the dev server, outside of a flow, against the Prefect server of PREFECT_API_URL. A
first run warms what a process does once; the second one is traced, in every thread. The dev server is not counted.

Goal: at most 110 functions. `--list` prints them by file, in the order in which they are first entered.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from figures import report

import prefect_crew
from prefect_crew import run_crew
from prefect_crew.crew import fast_polling
from prefect_crew.devserver import CrewServer

PACKAGE = Path(prefect_crew.__file__).parent
DEVSERVER = PACKAGE / "devserver"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print every function")
    listed = parser.parse_args().list
    logging.disable(logging.INFO)
    calls: Counter[CodeType] = Counter()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            calls[frame.f_code] += 1

    with CrewServer("echo") as server, fast_polling():
        crew = server.crew()
        run_crew(crew, {"text": "warm"})
        threading.setprofile(note)
        sys.setprofile(note)
        try:
            run_crew(crew, {"text": "traced"})
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    ours: dict[Path, list[CodeType]] = {}
    for code in tuple(calls):  # a thread may still note one
        path = Path(code.co_filename)
        # A lambda, a comprehension or a generator belongs to the function that it stands in.
        if PACKAGE in path.parents and DEVSERVER not in path.parents and not code.co_name.startswith("<"):
            ours.setdefault(path.relative_to(PACKAGE), []).append(code)
    for path, codes in ours.items():
        print(f"{len(codes):4} {path}")
        if listed:
            for code in codes:
                print(f"       {calls[code]:4}x {code.co_qualname}")
    functions = [code for codes in ours.values() for code in codes]
    calls_made = sum(calls[code] for code in functions)
    report("one run", functions=len(functions), files=len(ours), calls=calls_made)


if __name__ == "__main__":
    main()
