"""The flow that removes old records, by a path of this folder: deployments/prefect.yaml deploys it on a schedule."""

from __future__ import annotations

from prefect_crew.operations import prune_records

__all__ = ["prune_records"]
