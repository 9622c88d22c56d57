"""A Mixtral as the published per-expert HQQ checkpoints have it: quantized by the hqq package, second level as the
reference system's, codes packed in either order. Says which weights it stands for.
"""

import json
import warnings
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.checkpoints import write_checkpoint

OrderName = Literal["grouped", "rows"]


def write_hqq_checkpoint(
    folder: Path, *, nbits: int, order: OrderName, has_second_level: bool = True
) -> dict[str, Tensor]:
    """Write it, experts of `nbits` and attention of 4; return each matrix's weights, f32, by its Hub name."""
    sizes = {"hidden": 128, "intermediate": 256, "n_layers": 1, "n_heads": 4, "n_kv_heads": 4, "n_experts": 2}
    write_checkpoint(folder, **sizes)  # type: ignore[arg-type]
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files: dict[str, dict[str, Tensor]] = {"trunk.safetensors": {}}
    weight_map: dict[str, str] = {}
    for name, weight in weights.items():
        base = name.removesuffix(".weight")
        expert, _, matrix = base.rpartition(".")
        if ".experts." in name:
            _, _, number = expert.rpartition(".")
            file, inner = f"expert-{int(number):03}.safetensors", matrix
            sizing = (nbits, 16, 128) if nbits == 2 else (nbits, 64, 128)
        else:
            file, inner, sizing = "trunk.safetensors", base, (4, 64, 256)
        tensors = {"weight": weight.half()}
        weights[name] = weight.half().float()
        if ".experts." in name or "self_attn" in name:
            tensors, weights[name] = _quantized(weight, sizing, order, has_second_level=has_second_level)
        files.setdefault(file, {}).update({f"{inner}.{key}": tensor for key, tensor in tensors.items()})
        weight_map |= {f"{base}.{key}": file for key in tensors}
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weights


def _quantized(
    weight: Tensor, sizing: tuple[int, int, int], order: OrderName, *, has_second_level: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of a matrix and the weights they stand for; `sizing` is bits, group and scales' group."""
    with warnings.catch_warnings():
        # What hqq imports warns of its own deprecations.
        warnings.simplefilter("ignore", DeprecationWarning)
        from hqq.core.quantize import Quantizer
    nbits, group_size, scale_group = sizing
    codes, meta = Quantizer.quantize(
        weight, nbits=nbits, group_size=group_size, axis=0, bitpack=False, round_zero=nbits == 4, device="cpu"
    )
    tensors = {"W_q": _packed(codes.to(torch.uint8), nbits, weight, order)}
    scale, zero = meta["scale"].view(-1), meta["zero"].view(-1)
    if has_second_level:
        scale_tensors, scale = _second_level(scale.view(scale_group, -1), "scale", per_column=True)
        zero_tensors, zero = _second_level(zero.view(1, -1), "zero", per_column=False)
        tensors |= scale_tensors | zero_tensors
    else:
        tensors |= {"meta.scale": scale.half(), "meta.zero": zero.half()}
        scale, zero = scale.half().float(), zero.half().float()
    return tensors, ((codes.float() - zero) * scale).view(weight.shape)


def _second_level(values: Tensor, word: str, *, per_column: bool) -> tuple[dict[str, Tensor], Tensor]:
    low, high = (values.amin(0), values.amax(0)) if per_column else (values.min(), values.max())
    scale = ((high - low) / 255).clamp(min=1e-8).half()
    zero = (-low / scale.float()).half()
    codes = (values / scale.float() + zero.float()).round().clamp(0, 255).to(torch.uint8)
    tensors = {
        f"meta.{word}_q": codes,
        f"meta.meta_{word}.scale": scale.view(1, -1),
        f"meta.meta_{word}.zero": zero.view(1, -1),
    }
    return tensors, ((codes.float() - zero.float()) * scale.float()).view(-1)


def _packed(codes: Tensor, nbits: int, weight: Tensor, order: OrderName) -> Tensor:
    if order == "grouped":
        from hqq.core.bitpack import BitPack

        pack = {2: BitPack.pack_2bit_u8, 3: BitPack.pack_3bit_32, 4: BitPack.pack_4bit_u8}[nbits]
        packed: Tensor = pack(codes)
        return packed.contiguous()
    rows = codes.reshape(weight.shape)
    if nbits == 4:
        return rows[0::2] << 4 | rows[1::2]
    if nbits == 2:
        return rows[0::4] << 6 | rows[1::4] << 4 | rows[2::4] << 2 | rows[3::4]
    filled = torch.zeros(-(-rows.shape[0] // 10) * 10, rows.shape[1], dtype=torch.int32)
    filled[: rows.shape[0]] = rows
    return sum((filled[at::10] << 27 - 3 * at for at in range(1, 10)), filled[0::10] << 27)
