"""Global concurrency limits of a Prefect server."""

import uuid

from prefect import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate


async def new_limit(slots: int) -> str:
    """Create a limit of so many slots; return its name."""
    name = f"limit-{uuid.uuid4().hex[:8]}"
    async with get_client() as client:
        await client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=slots))
    return name
