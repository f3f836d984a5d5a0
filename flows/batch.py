"""The batch flows of this package, by a path of this folder: deployments/prefect.yaml deploys them.

Where the package is installed they need no file: deploy `prefect_crew.operations.batch_file` instead.
"""

from __future__ import annotations

from prefect_crew.operations import batch_file, watch_folder

__all__ = ["batch_file", "watch_folder"]
