"""Pipelines of crews."""
