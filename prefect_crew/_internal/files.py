"""Files that hold inputs and results of crews: for their owner alone, whatever the process's umask."""

from __future__ import annotations

import os
from pathlib import Path

PRIVATE = 0o600


def create_private(path: Path) -> None:
    """Create an empty file that nobody but its owner may read. One that is there is left as it is.

    Raises:
        OSError: It cannot be created, or not be written to.
    """
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, PRIVATE))
