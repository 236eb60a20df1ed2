"""MAPD's prompts: a problem with the student's wrong attempt, to be explained and solved."""

import json
from pathlib import Path

import kdrl


@kdrl.register_task("wrong_traces")
def wrong_traces(path: str) -> list[dict]:
    """Rows from the wrong lines of a file of `kdrl generate`."""
    traces = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [
        {"prompt": f"{t['prompt']}\nwrong: {t['response']}\nwhy, and what is right?\n", "answer": t["answer"]}
        for t in traces
        if not t["correct"]
    ]
