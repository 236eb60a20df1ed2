"""The state of a torch optimizer as safetensors tensors and plain JSON, exact to the bit and without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from kdrl.errors import UserError

# What the machine, not the run, decides: kept as the optimizer at hand has it.
_IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable"}


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of an optimizer as (tensors for safetensors, plain JSON), keyed by parameter name.

    `names` is dict(model.named_parameters()). Tensors are called `parameter|key`, e.g. `lm_head.weight|exp_avg`; the
    JSON holds the groups with their options and every state that is not a tensor. Exact to the bit.
    """
    name_of = {parameter: name for name, parameter in names.items()}
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        name = name_of[parameter]
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{name}|{key}"] = value
            else:
                values.setdefault(name, {})[key] = value
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        options: dict[str, Any] = {}
        for key, value in group.items():
            if isinstance(value, Tensor):  # a learning rate may be one
                tensors[f"|{index}|{key}"] = value
            elif key != "params":
                options[key] = list(value) if isinstance(value, tuple) else value
        groups.append({"parameters": [name_of[p] for p in group["params"]], "options": options})
    return tensors, {"optimizer": type(optimizer).__name__, "groups": groups, "values": values}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Put back what `flatten_optimizer` gave; raises UserError when optimizer, groups or parameters differ.

    Not through `load_state_dict`, which casts float32 moments to the dtype of a bfloat16 parameter. A tensor that
    several parameters shared, as the code book of 8-bit moments, is shared again.
    """
    name_of = {parameter: name for name, parameter in names.items()}
    _same("optimizer", [state["optimizer"]], [type(optimizer).__name__])
    _same(
        "list of trained parameters (group, name)",
        [(index, name) for index, group in enumerate(state["groups"]) for name in group["parameters"]],
        [(index, name_of[p]) for index, group in enumerate(optimizer.param_groups) for p in group["params"]],
    )
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, state["groups"], strict=True)):
        options = {k: v for k, v in saved["options"].items() if k not in _IMPLEMENTATION}
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in options.items()})
        prefix = f"|{index}|"
        group.update({n.removeprefix(prefix): t.clone() for n, t in tensors.items() if n.startswith(prefix)})
    on_device = {p: bool(g.get("capturable") or g.get("fused")) for g in optimizer.param_groups for p in g["params"]}
    optimizer.state.clear()
    for name, items in state["values"].items():
        optimizer.state[names[name]] = dict(items)
    copies: dict[int, Tensor] = {}
    for full, tensor in tensors.items():
        name, key = full.rsplit("|", 1)
        if name in names:
            parameter = names[name]
            device = parameter.device if key != "step" or on_device[parameter] else torch.device("cpu")
            if id(tensor) not in copies:
                paged = _paged(optimizer, parameter, tensor)
                copies[id(tensor)] = tensor.to(device, copy=True) if paged is None else paged
            optimizer.state.setdefault(parameter, {})[key] = copies[id(tensor)]


def _paged(optimizer: Any, parameter: Tensor, tensor: Tensor) -> Tensor | None:
    """A copy in paged memory, of moments that the optimizer keeps there."""
    if not getattr(optimizer, "is_paged", False) or tensor.shape != parameter.shape:
        return None
    return optimizer.get_state_buffer(parameter, dtype=tensor.dtype).copy_(tensor)


def _same(what: str, saved: list[Any], here: list[Any]) -> None:
    """Raises UserError naming the first place where two lists differ."""
    for was, now in zip_longest(saved, here, fillvalue="nothing"):
        if was != now:
            raise UserError(
                f"the checkpoint was saved with another {what} than this run has: {was!r} there, {now!r} here. "
                "Resume with the recipe that the run was started with."
            )
