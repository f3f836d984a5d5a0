"""The crew API without a word of Prefect: client, parsing, models, errors.

Nothing is imported here, so that each module costs only those who use it.
"""
