"""Files that hold inputs and results of crews: for their owner alone, whatever the process's umask."""

from __future__ import annotations

import os
from pathlib import Path

PRIVATE = 0o600


def check_writable(path: Path) -> None:
    """See whether a file can be written, before the run whose result goes there starts. It is neither made nor changed.

    Raises:
        OSError: It cannot; the text says why.
    """
    if not path.is_dir() and not path.parent.is_dir():
        raise OSError(f"{path} cannot be written: there is no folder {path.parent}.")
    try:
        if not path.exists():
            # Only making it shows that it can be made: a file system may be read-only, a name too long.
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE))
            path.unlink()
        elif path.is_file() or path.is_dir():  # a folder cannot be opened so
            os.close(os.open(path, os.O_WRONLY))
        # Anything else, such as a named pipe, may wait for its reader when it is opened.
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}.") from None


def create_private(path: Path) -> None:
    """Create an empty file that nobody but its owner may read. One that is there is left as it is.

    Raises:
        OSError: It cannot be created, or not be written to.
    """
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, PRIVATE))
