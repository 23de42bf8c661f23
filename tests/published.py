"""Checkpoints in the forms that models are published in, made of tiny float32 ones, and what they mean.

`write(source, folder, "gptq")` stores every matrix of the decoder layers but routers so (`only` chooses others), and
returns the tensors, as float32, that the folder stands for. Nothing here is fast, or shared with what is tested.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import tiny

GROUP = 8
BLOCK = (16, 24)
Parts = dict[str, torch.Tensor]  # what is added to the module's name -> tensor
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
NF4 = [
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
    0.24611230, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
]  # fmt: skip


def numbers(w: np.ndarray, bits: int, zero: int) -> tuple[np.ndarray, np.ndarray]:
    """(q from 0 to 2^bits - 1, scales (O, G) that bf16 and f16 hold) with w near (q - zero) * scale."""
    grouped = w.reshape(len(w), -1, GROUP)
    scales = np.float32(np.abs(grouped).max(-1) / 2 ** (bits - 1))
    scales = torch.tensor(scales).to(torch.bfloat16).to(torch.float16).float().numpy()
    q = np.rint(grouped / scales[..., None] + zero).clip(0, 2**bits - 1)
    return q.reshape(w.shape).astype(int), scales


def words(values: list[int], bits: int) -> list[int]:
    """Numbers end to end, from the lowest bit on, in signed words of 32 bits."""
    total = sum(v << (i * bits) for i, v in enumerate(values))
    found = [(total >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(values) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in found]


def packed_rows(rows: Any, bits: int) -> torch.Tensor:
    return torch.tensor([words([int(v) for v in row], bits) for row in rows], dtype=torch.int32)


def meaning(q: np.ndarray, zeros: np.ndarray, scales: np.ndarray, group_of: list[int]) -> np.ndarray:
    """(q - z) * s, one weight at a time; zeros and scales (O, G)."""
    found = np.zeros(q.shape, np.float32)
    for o in range(q.shape[0]):
        for i in range(q.shape[1]):
            found[o, i] = np.float32(q[o, i] - zeros[o, group_of[i]]) * np.float32(scales[o, group_of[i]])
    return found


def in_order(columns: int) -> list[int]:
    return [i // GROUP for i in range(columns)]


def zeros_like(scales: np.ndarray, draw: np.random.Generator, bits: int) -> np.ndarray:
    """Different zeros near the middle."""
    return draw.integers(2 ** (bits - 1) - 1, 2 ** (bits - 1) + 2, scales.shape)


def pack_quantized(w: np.ndarray, draw: np.random.Generator, bits: int = 4, *, shape: bool = True) -> tuple[Parts, Any]:
    q, scales = numbers(w, bits, 2 ** (bits - 1))
    parts = {".weight_packed": packed_rows(q, bits), ".weight_scale": torch.tensor(scales).to(torch.bfloat16)}
    parts |= {".weight_shape": torch.tensor(w.shape)} if shape else {}
    return parts, meaning(q, np.full(scales.shape, 2 ** (bits - 1)), scales, in_order(w.shape[1]))


def asymmetric(w: np.ndarray, draw: np.random.Generator) -> tuple[Parts, Any]:
    """Zero points down the columns, and groups that do not stand in order."""
    q, scales = numbers(w, 4, 8)
    zeros, group_of = zeros_like(scales, draw, 4), list(draw.permutation(in_order(w.shape[1])))
    parts = {
        ".weight_packed": packed_rows(q, 4),
        ".weight_scale": torch.tensor(scales),
        ".weight_zero_point": packed_rows(zeros.T, 4).T,
        ".weight_g_idx": torch.tensor(group_of, dtype=torch.int32),
        ".weight_shape": torch.tensor(w.shape),
    }
    return parts, meaning(q, zeros, scales, group_of)


def gptq(w: np.ndarray, draw: np.random.Generator, bits: int = 4, less: int = 1) -> tuple[Parts, Any]:
    """Down the inputs; zeros stored as one less; groups in the order of activations."""
    q, scales = numbers(w, bits, 2 ** (bits - 1))
    zeros, group_of = zeros_like(scales, draw, bits), list(draw.permutation(in_order(w.shape[1])))
    parts = {
        ".qweight": packed_rows(q, bits).T,
        ".qzeros": packed_rows(zeros.T - less, bits),
        ".scales": torch.tensor(scales.T).half(),
        ".g_idx": torch.tensor(group_of, dtype=torch.int32),
    }
    return parts, meaning(q, zeros, scales, group_of)


def awq(w: np.ndarray, draw: np.random.Generator) -> tuple[Parts, Any]:
    """Along the outputs, of eight in the order 0 2 4 6 1 3 5 7."""
    q, scales = numbers(w, 4, 8)
    zeros, order = zeros_like(scales, draw, 4), [0, 2, 4, 6, 1, 3, 5, 7]

    def shuffled(row: np.ndarray) -> list[int]:
        return [int(row[8 * j + k]) for j in range(len(row) // 8) for k in order]

    parts = {
        ".qweight": packed_rows([shuffled(row) for row in q.T], 4),
        ".qzeros": packed_rows([shuffled(row) for row in zeros.T], 4),
        ".scales": torch.tensor(scales.T).half(),
    }
    return parts, meaning(q, zeros, scales, in_order(w.shape[1]))


def nf4(w: np.ndarray, draw: np.random.Generator, *, nested: bool = True) -> tuple[Parts, Any]:
    """Blocks of 64 weights across rows; each block's magnitude is itself a code, of a table, in blocks of 4."""
    table, flat = np.float32(NF4), w.reshape(-1)
    blocks = -(-len(flat) // 64)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(w.shape)}
    state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": 0.25} if nested else {}
    codes, outer = draw.integers(0, 256, blocks), np.float32(draw.random(-(-blocks // 4)))
    inner = np.float32(draw.random(256))
    absmax = [
        np.float32(inner[codes[b]] * outer[b // 4]) + np.float32(0.25) if nested else np.float32(0.5 + b / 16)
        for b in range(blocks)
    ]
    chosen = [int(np.abs(table - flat[i] / absmax[i // 64]).argmin()) for i in range(len(flat))]
    found = np.float32([table[c] * absmax[i // 64] for i, c in enumerate(chosen)]).reshape(w.shape)
    both = [16 * chosen[i] + (chosen[i + 1] if i + 1 < len(chosen) else 0) for i in range(0, len(chosen), 2)]
    parts = {
        ".weight": torch.tensor(both, dtype=torch.uint8)[:, None],
        ".weight.quant_map": torch.tensor(table),
        ".weight.absmax": torch.tensor(codes, dtype=torch.uint8) if nested else torch.tensor(np.array(absmax)),
        ".weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    tables = {".weight.nested_absmax": torch.tensor(outer), ".weight.nested_quant_map": torch.tensor(inner)}
    return parts | (tables if nested else {}), found


def nvfp4(w: np.ndarray, draw: np.random.Generator, *, divides: bool = True) -> tuple[Parts, Any]:
    """The second scale divides, or, of ModelOpt's files, multiplies."""
    blocks = w.reshape(len(w), -1, 16)
    scales = torch.tensor(np.abs(blocks).max(-1) / 6 * 2.5).to(torch.float8_e4m3fn)
    codes = draw.integers(0, 16, w.shape)
    factors = scales.float().numpy()
    factors = factors / np.float32(2.5) if divides else factors * np.float32(0.4)
    found = np.zeros(w.shape, np.float32)
    for o, row in enumerate(codes):
        for i, code in enumerate(row):
            found[o, i] = np.float32(E2M1[code]) * factors[o, i // 16]
    both = torch.tensor(codes[:, 0::2] + 16 * codes[:, 1::2], dtype=torch.uint8)
    if not divides:
        return {".weight": both, ".weight_scale": scales, ".weight_scale_2": torch.tensor(0.4)}, found
    parts = {".weight_packed": both, ".weight_scale": scales, ".weight_global_scale": torch.tensor([2.5])}
    return parts | {".input_global_scale": torch.tensor([3.0])}, found


def mxfp4(w: np.ndarray, draw: np.random.Generator) -> tuple[Parts, Any]:
    """Blocks of 32 that share an exponent."""
    codes = draw.integers(0, 16, w.shape)
    exponents = draw.integers(122, 126, (len(w), w.shape[1] // 32))
    found = np.zeros(w.shape, np.float32)
    for o, row in enumerate(codes):
        for i, code in enumerate(row):
            found[o, i] = E2M1[code] * 2.0 ** (int(exponents[o, i // 32]) - 127)
    both = torch.tensor(codes[:, 0::2] + 16 * codes[:, 1::2], dtype=torch.uint8)
    return {".weight_packed": both, ".weight_scale": torch.tensor(exponents, dtype=torch.uint8)}, found


def fp8(w: np.ndarray, draw: np.random.Generator, dtype: torch.dtype = torch.float32) -> tuple[Parts, Any]:
    """Blocks of 16 x 24, the last of each axis cut short; scales beside, and one of activations."""
    rows, columns = -(-w.shape[0] // BLOCK[0]), -(-w.shape[1] // BLOCK[1])
    scales = torch.tensor(draw.random((rows, columns)) / 448 + 1 / 448).to(dtype)
    factors = np.zeros(w.shape, np.float32)
    for o in range(w.shape[0]):
        for i in range(w.shape[1]):
            factors[o, i] = scales[o // BLOCK[0], i // BLOCK[1]].float()
    codes = torch.tensor(w / factors).to(torch.float8_e4m3fn)
    parts = {".weight": codes, ".weight_scale_inv": scales, ".input_scale": torch.tensor(1.0)}
    return parts, codes.float().numpy() * factors


def fp8_rows(w: np.ndarray, draw: np.random.Generator) -> tuple[Parts, Any]:
    """A scale for every row, and scales of cached keys."""
    scales = torch.tensor(np.abs(w).max(1, keepdims=True) / 448).to(torch.bfloat16)
    codes = torch.tensor(w / scales.float().numpy()).clamp(-448, 448).to(torch.float8_e4m3fn)
    parts = {".weight": codes, ".weight_scale": scales, ".k_scale": torch.tensor([0.5])}
    return parts, codes.float().numpy() * scales.float().numpy()


def compressed(bits: int, **weights: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True} | weights
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "ignore": []}


Form = Callable[[np.ndarray, np.random.Generator], tuple[Parts, Any]]
ATTENTION_ONLY = ("mxfp4",)  # tiny experts are narrower than a block
FORMS: dict[str, tuple[Form, dict[str, Any]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "static"}),
    "fp8-bf16-scales": (
        lambda w, draw: fp8(w, draw, torch.bfloat16),
        {"quant_method": "fp8", "weight_block_size": list(BLOCK)},
    ),
    "fp8-rows": (fp8_rows, compressed(8, type="float", strategy="channel") | {"format": "float-quantized"}),
    "int4": (pack_quantized, compressed(4)),
    "int4-without-shapes": (lambda w, draw: pack_quantized(w, draw, shape=False), compressed(4)),
    "int3": (lambda w, draw: pack_quantized(w, draw, 3), compressed(3)),
    "int8": (lambda w, draw: pack_quantized(w, draw, 8), compressed(8)),
    "int4-asymmetric": (asymmetric, compressed(4, symmetric=False, actorder="group")),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}),
    "gptq-v2-8": (lambda w, draw: gptq(w, draw, 8, 0), {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}),
    "auto-round": (gptq, {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
    "nf4": (lambda w, draw: nf4(w, draw, nested=False), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "nf4-nested": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}),
    "mxfp4": (mxfp4, compressed(4, type="float", group_size=32) | {"format": "mxfp4-pack-quantized"}),
    "nvfp4-modelopt": (lambda w, draw: nvfp4(w, draw, divides=False), {"quant_method": "modelopt"}),
    "nvfp4": (nvfp4, compressed(4, type="float", group_size=16) | {"format": "nvfp4-pack-quantized"}),
}


def is_linear(name: str, values: np.ndarray) -> bool:
    """Matrices of decoder layers but routers, gates and convolutions."""
    return values.ndim == 2 and ".layers." in name and "proj" in name and name.endswith(".weight")


def write(
    source: Path, folder: Path, form: str, only: Callable[[str, np.ndarray], bool] = is_linear
) -> dict[str, np.ndarray]:
    """Stores a float32 checkpoint in a form; returns the tensors that it stands for."""
    tensors, config = tiny.read(source)
    encode, settings = FORMS[form]
    draw, stored, dense = np.random.default_rng(0), {}, {}
    for name, values in tensors.items():
        stored[name], dense[name] = torch.from_numpy(values), values
        if only(name, values) and ("attn" in name or form not in ATTENTION_ONLY):
            parts, dense[name] = encode(values, draw)
            del stored[name]
            stored |= {name.removesuffix(".weight") + part: tensor.contiguous() for part, tensor in parts.items()}
    shutil.copytree(source, folder)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return dense
