"""A crew over the rows of each file that comes into a folder. Deploy it with an interval, such as five minutes.

The name of a batch is made of the file's name and its content. So a file that is still there at the next look is
continued, and the same file starts no run twice. Two looks may overlap: the second one leaves a file to the first.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger

from prefect_crew import BatchBusyError, BatchReport, CrewError, DatasetError, FlowRunCancelledError, arun_batch


@flow(flow_run_name="{folder}")
async def watch_folder(
    crew: str,
    folder: str,
    export_folder: str,
    pattern: str = "*.csv",
    unchanged_seconds: float = 30.0,
    options: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Run a batch over each new file, and move each file that is done to the subfolder `done`.

    A file that has no rows or cannot be read is moved to the subfolder `refused`. A file whose batch fails stays, and
    so does a file of which rows go on: the next look continues with them. This flow fails at the end where one failed.

    Args:
        crew: The name of the crew's block, as under Blocks.
        folder: Where new files come in.
        export_folder: The folder for the exports: one file for each file that came in.
        pattern: Which files.
        unchanged_seconds: Seconds for which a file must not have changed: until then it may still be written.
        options: More of run_batch's options, such as {"max_in_flight": 500}.
    """
    log, reports, failures = get_run_logger(), list[dict[str, Any]](), list[str]()
    for path in new_files(Path(folder), pattern, unchanged_seconds):
        try:
            name = batch_name(path)
            lines = str(Path(export_folder) / f"{name}.jsonl")
            report: BatchReport = await arun_batch(crew, path, name=name, export=lines, **(options or {}))
        except (BatchBusyError, FileNotFoundError) as error:
            log.info("%s: another look has it or has moved it. %s", path.name, error)
        except FlowRunCancelledError:
            raise  # a person has cancelled this flow run
        except CrewError as error:
            if not path.exists():
                log.info("%s: another look has run it.", path.name)
            elif isinstance(error, DatasetError) and not error.begun:
                log.warning("%s It is moved to the folder refused.", error)
                move(path, "refused")
            else:
                log.error("%s: %s", path.name, error)  # noqa: TRY400  the message says it all
                failures.append(f"{path.name} ({type(error).__name__})")
        else:
            reports.append(report.as_dict())
            # A row that was refused, or has timed out, is continued by another call. A failed row has its line.
            if report.stopped is None and report.skipped == report.bad_count and not report.unfinished:
                move(path, "done")
            else:
                log.warning("%s The next look continues with it.", report)
    if failures:
        names = ", ".join(failures)
        raise RuntimeError(f"{names} failed, the other files were run. The next look continues with the failed ones.")
    return reports


def new_files(folder: Path, pattern: str, unchanged_seconds: float) -> list[Path]:
    """Return the files that have not changed for so long, the oldest first; none of those that were moved."""
    files = [
        (path.stat().st_mtime, path)
        for path in folder.glob(pattern)
        if path.is_file() and {"done", "refused"}.isdisjoint(path.relative_to(folder).parts[:-1])
    ]
    return [path for changed, path in sorted(files) if time.time() - changed >= unchanged_seconds]


def batch_name(path: Path) -> str:
    """Return a name that only this file with this content has. Braces would make a template of it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    plain = "".join(letter if letter.isprintable() and letter not in "{}" else "_" for letter in path.name)
    return f"{plain[:30]}-{hashlib.sha256(path.name.encode()).hexdigest()[:6]}-{digest}"


def move(path: Path, subfolder: str) -> None:
    """Move a file to a subfolder of its folder, under a name that is free there."""
    target = path.parent / subfolder / path.name
    target.parent.mkdir(exist_ok=True)
    while target.exists():
        target = target.with_name(f"{target.stem}-again{target.suffix}")
    with suppress(FileNotFoundError):  # another look has moved it
        path.rename(target)
