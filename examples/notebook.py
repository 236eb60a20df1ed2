"""kdrl from Python, cell by cell: editors run the `# %%` cells, and so does `python examples/notebook.py`.

Paths are relative to the repository's root.
"""

# %% A run from a recipe file, with overrides as on the command line. `output` is a new folder.
import torch

import kdrl

run = kdrl.train("examples/tiny.yaml", ["steps=2", "method=kdrl"], output="runs/notebook")
print(run.model)

# %% A recipe is also a mapping, and a Recipe object that can be looked at.
recipe = kdrl.load_recipe("examples/tiny.yaml", ["evaluate.final_problems=8"])
print(recipe.task.template, recipe.rollout)


# %% Something of one's own can be registered in a cell and named in a recipe, here a verifier.
@kdrl.register_verifier("any_digit")
def any_digit(response: str, problem: kdrl.Problem) -> bool:
    return any(c.isdigit() for c in response)


# %% Evaluate the trained model and the same problems with the new verifier.
greedy = kdrl.evaluate(run.model, "examples/tiny.yaml", problems=8)
lenient = kdrl.load_recipe("examples/tiny.yaml", ["task.verifier=any_digit"])
sampled = kdrl.evaluate(run.model, lenient, problems=8, samples=4, temperature=1.0, k=[1, 4])
print(greedy.accuracy, sampled.metrics["pass@4"], sampled.intervals["accuracy"])

# %% The loss of a `distill` term on plain logits, [..., T, V] to [..., T]: nothing but tensors.
student, teacher = torch.randn(5, 11, requires_grad=True), torch.randn(5, 11)
loss = kdrl.divergence(student, teacher, {"divergence": {"jsd": 0.5}, "support": {"topk": 4}})
loss.mean().backward()
print(loss.detach(), student.grad)
