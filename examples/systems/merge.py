"""Weights of several models merged into one folder: their mean (WAKD) or half the arc between two (SLERP, DNA 1.0).

python examples/systems/merge.py mean OUT RUN/final RUN/checkpoints/step-000050/student.safetensors
python examples/systems/merge.py slerp OUT FIRST SECOND

A folder stands for its model.safetensors; the first must be one, and lends configuration and tokenizer. Set
student.model to OUT.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def mean(*tensors: Tensor) -> Tensor:
    """The average, weight by weight."""
    return torch.stack([t.float() for t in tensors]).mean(0).to(tensors[0].dtype)


def slerp(one: Tensor, two: Tensor) -> Tensor:
    """The middle of the arc from one to two, both seen as one vector; their mean where they are parallel."""
    a, b = one.double().flatten(), two.double().flatten()
    angle = torch.acos(((a @ b) / (a.norm() * b.norm()).clamp(min=1e-30)).clamp(-1.0, 1.0))
    factor = 1.0 / (2.0 * torch.cos(angle / 2.0)) if 1e-6 < angle < torch.pi - 1e-6 else torch.tensor(0.5)
    return (factor * (a + b)).reshape(one.shape).to(one.dtype)


def merge(how: str, output: Path, models: list[Path]) -> None:
    """Write the merged model to a new folder."""
    weights = [load_file(path / "model.safetensors" if path.is_dir() else path) for path in models]
    shutil.copytree(models[0], output)
    combine = {"mean": mean, "slerp": slerp}[how]
    merged = {name: combine(*(w[name] for w in weights)).contiguous() for name in weights[0]}
    save_file(merged, output / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    merge(sys.argv[1], Path(sys.argv[2]), [Path(path) for path in sys.argv[3:]])
