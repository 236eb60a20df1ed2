"""A task of one's own: a function that returns problems.

kdrl train examples/tiny.yaml plugins=examples/own_task.py \
  'task={name: products, settings: {largest: 12}, template: "{a}*{b}=", holdout: {development: 0.1, test: 0.1}}' \
  'student.tokenizer.characters="0123456789*="' 'teacher.tokenizer.characters="0123456789*="' --output runs/own-task

The rows are split by text, shuffled anew every epoch and resumed like those of a data file; columns are free, with
`prompt` (or `template`), `answer` and perhaps `solution` read by name. A list of kdrl.Problem is as good.
"""

import kdrl


@kdrl.register_task("products")
def products(largest: int = 9) -> list[dict]:
    """Every product of two numbers up to `largest`."""
    numbers = range(largest + 1)
    return [{"a": a, "b": b, "answer": str(a * b)} for a in numbers for b in numbers]
