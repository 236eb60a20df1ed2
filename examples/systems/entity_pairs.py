"""EntiGraph's prompts: one for every pair of the entities of every document."""

import json
from itertools import combinations
from pathlib import Path

import kdrl


@kdrl.register_task("entity_pairs")
def entity_pairs(path: str) -> list[dict]:
    """Rows from JSON lines with `text` and a list `entities`."""
    documents = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [
        {"prompt": f"{d['text']}\nhow do {a} and {b} relate?\n", "answer": f"{a}, {b}"}
        for d in documents
        for a, b in combinations(d["entities"], 2)
    ]


def written(response, problem):
    """Any text counts: there is no verdict on it."""
    return bool(response)
