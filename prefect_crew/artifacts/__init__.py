"""What people see of a run: Markdown, artifacts, events."""
