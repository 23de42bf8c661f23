"""Tiny checkpoints in the ways that models are stored: names, dtypes and shapes as published; numbers are random where
nobody asks what they mean.

`store(folder, target, "gptq")` writes a copy of a float32 checkpoint whose matrices, of experts and (but for those that
only experts are in) of everything else in the layers that is a projection, are stored so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import tiny
from coterie.model.layer import Model

GROUP = 8
WIDTH = 32  # of experts in blocks of 32
Parts = dict[str, torch.Tensor]


def _words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(0)).to(torch.int32)


def _scales(rows: int, columns: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.full((rows, columns), 0.01, dtype=dtype)


def fp8(w: torch.Tensor) -> Parts:
    scale = w.abs().amax().clamp(min=1e-6) / 448
    return {"": (w / scale).to(torch.float8_e4m3fn), "_scale_inv": scale.reshape(1, 1)}


def awq(w: torch.Tensor) -> Parts:
    rows, columns = w.shape
    groups = columns // GROUP
    return {"q": _words(columns, rows // 8), "z": _words(groups, rows // 8), "s": _scales(groups, rows)}


def gptq(w: torch.Tensor) -> Parts:
    rows, columns = w.shape
    return awq(w) | {"q": _words(columns // 8, rows), "g": torch.arange(columns, dtype=torch.int32) // GROUP}


def int4(w: torch.Tensor) -> Parts:
    rows, columns = w.shape
    packed = {"_packed": _words(rows, columns // 8), "_scale": _scales(rows, columns // GROUP, torch.bfloat16)}
    return packed | {"_shape": torch.tensor([rows, columns])}


def modelopt(w: torch.Tensor) -> Parts:
    """FP8 with a static scale of activations, of which transformers knows nothing."""
    found = fp8(w)
    return {"": found[""], "_scale": found["_scale_inv"].reshape(()), "i": torch.tensor(0.5)}


def unknown(w: torch.Tensor) -> Parts:
    """A coding that nobody reads."""
    return {"_secret": _words(*w.shape)}


KEYS = {"q": "qweight", "z": "qzeros", "s": "scales", "g": "g_idx", "i": "input_scale"}
COMPRESSED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
# form -> (parts of one matrix, quantization_config, whether experts alone)
FORMS: dict[str, tuple[Callable[[torch.Tensor], Parts], dict[str, Any], bool]] = {
    "fp8": (fp8, BLOCKS, False),
    "fp8 experts": (fp8, BLOCKS, True),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}, True),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True}, False),
    "int4": (
        int4,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": COMPRESSED}},
        },
        True,
    ),
    "modelopt": (modelopt, {"quant_method": "modelopt", "quant_algo": "FP8"}, False),
    "unknown": (unknown, {"quant_method": "secret"}, True),
}


def store(folder: Path, target: Path, form: str) -> Path:
    """Raises: LookupError for a checkpoint whose experts are fused, which these forms are not published of."""
    parts, settings, experts_only = FORMS[form]
    model, (tensors, config) = Model.open(folder), tiny.read(folder)
    if not all(block.experts for block in model.moe):
        raise LookupError(f"{folder}: fused experts")
    made: Parts = {}
    for name, values in tensors.items():
        tensor, role = torch.from_numpy(values), model.roles[name]
        beside = not experts_only and "_proj." in name and ".layers." in name and role in ("shared", "other")
        if name.endswith(".weight") and tensor.dim() == 2 and (role == "expert" or beside):
            stem = name.removesuffix("weight")
            made |= {stem + KEYS.get(key, "weight" + key): part for key, part in parts(tensor).items()}
        else:
            made[name] = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
    target.mkdir(parents=True)
    save_file(
        {name: t.contiguous() for name, t in made.items()}, target / "model.safetensors", metadata={"format": "pt"}
    )
    (target / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "quantization_config": settings}))
    return target


def mxfp4(folder: Path, target: Path) -> Path:
    """A tiny gpt_oss with its experts as published: blocks and scales."""
    tensors, config = tiny.read(folder)
    draw, made = np.random.default_rng(0), dict[str, np.ndarray]()
    for name, values in tensors.items():
        rows = 2 * WIDTH if "gate_up_proj" in name else tiny.HIDDEN
        if name.endswith(("gate_up_proj", "down_proj")):
            shape = (len(values), rows, 1)  # one block of 32 inputs
            made[f"{name}_blocks"] = draw.integers(0, 256, (*shape, 16), dtype=np.uint8)
            made[f"{name}_scales"] = draw.integers(118, 122, shape, dtype=np.uint8)
        else:
            made[name] = np.zeros((len(values), rows), np.float32) if name.endswith("_proj_bias") else values
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return tiny.write(target, made, config | {"intermediate_size": WIDTH, "quantization_config": settings})
