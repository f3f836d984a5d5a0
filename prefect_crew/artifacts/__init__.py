"""The output for people and automations about a run: Markdown, artifacts, events."""
