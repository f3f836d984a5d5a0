"""The corpus: every known variant of every answer of a crew's server, a table (JSONL) for each parser.

A line holds the body as `body` (JSON), `text`, `hex` (bytes) or `generate`, what else the parser needs, and either
`expected` (all fields that differ from their defaults; of a webhook its events) or `raises`.
"""

import json
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parents[1] / "client" / "corpus"


def cases(table: str) -> dict[str, dict[str, Any]]:
    """Return the cases of a table by their names."""
    lines = (CORPUS / f"{table}.jsonl").read_text(encoding="utf-8").strip().split("\n")
    return {case["name"]: case for case in map(json.loads, lines)}


def body_of(case: dict[str, Any]) -> bytes:
    """Return the body of a case as a server would send it."""
    if "hex" in case:
        return bytes.fromhex(case["hex"])
    if "body" in case:
        return json.dumps(case["body"]).encode()
    return str(case["text"] if "text" in case else _generated(case["generate"])).encode()


def _generated(rule: dict[str, Any]) -> str:
    if "repeat" in rule:
        return rule["repeat"] * rule["times"]
    text = rule["text"] * (rule["megabytes"] * 1024**2 // len(rule["text"].encode()) + 1)
    return json.dumps({**rule["template"], rule["key"]: text}, ensure_ascii=False)
