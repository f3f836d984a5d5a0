"""The few places that touch private API of Prefect or asyncio, each with its reason."""
