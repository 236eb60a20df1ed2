"""Weights of a frozen model in 8 or 4 bits, through bitsandbytes; embeddings, norms and head stay as they are."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from kdrl.errors import UserError
from kdrl.models.config import TeacherModelConfig

BITS = {"int8": 8, "int4": 4}


def check_compressed(config: TeacherModelConfig, device: str | torch.device) -> None:
    """Raise UserError for compressed weights on a CPU, or without bitsandbytes."""
    if config.load is None:
        return
    if torch.device(device).type != "cuda":
        raise UserError(
            f"load={config.load} keeps weights for CUDA kernels, and the device is {device}; leave it out, or set "
            "dtype: bfloat16 for half the memory."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"load={config.load} needs bitsandbytes: pip install bitsandbytes.")


def compression(config: TeacherModelConfig, device: str | torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told: LLM.int8 (arXiv 2208.07339) or NF4 (arXiv 2305.14314); nothing without `load`."""
    if config.load is None:
        return {}
    from transformers import BitsAndBytesConfig

    compute = getattr(torch, config.dtype)
    if config.load == "int8":
        how = BitsAndBytesConfig(load_in_8bit=True)
    else:
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": how, "device_map": {"": str(device)}}
