"""The life of one run: kickoff, wait, stop, reviews."""
