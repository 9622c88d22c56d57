"""What quantizing takes: processor time of one matrix of Mixtral's size beside the hqq package, and a conversion whole.

The matrix is gaussian, in bf16. Both solve it on one thread. How many of the package's codes are ours, and what is lost
of it, is told in the same run. The conversion is `expertd quantize` of a layer of full-size experts, from reading to
the finished store, start of the processes included; a whole Mixtral-8x7B is projected from its bytes.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.errors import NothingToMeasure
from benchmarks.figures import Figure, ratios
from benchmarks.processes import Environment
from benchmarks.settings import Settings
from protocol.layout import Part
from protocol.schemes import Scheme, scheme_named
from quant.encode import encode_part
from quant.packing import pack
from quant.second_level import FloatGroups
from quant.solver import quantize, solve
from quant.solver_hqq import solve_with_package
from quant.weight_error import weight_error

ROWS, COLS = 14336, 4096
_N_EXPERTS = 4
_STD = 0.02
_SMALL_STD = 0.0005
# All matrices of a Mixtral-8x7B in bf16.
_MIXTRAL_NBYTES = 93_405_585_408

_Result = TypeVar("_Result")


def measure_solver(settings: Settings) -> list[Figure]:
    """Return the time and the error of every scheme, ours and the package's."""
    torch.set_num_threads(1)
    weight = _gaussian(ROWS, COLS, seed=0)
    return [figure for name in settings.schemes for figure in _measure_scheme(settings, scheme_named(name), weight)]


def measure_conversion(environment: Environment, settings: Settings) -> list[Figure]:
    """Return the time of `expertd quantize` on full-size matrices, and a whole Mixtral's by its bytes."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="quantizing-", dir=settings.folder) as folder:
        checkpoint = Path(folder) / "checkpoint"
        nbytes = _write_checkpoint(checkpoint)
        config = Path(folder) / "config.toml"
        for name in settings.schemes:
            config.write_text(f'experts = "{name}"\n')
            seconds = []
            for _ in range(settings.rounds):
                started = time.monotonic()
                environment.expertd(
                    "quantize", str(checkpoint), str(Path(folder) / "store"), "--config", str(config), "--force",
                    "--jobs", str(settings.threads),
                )  # fmt: skip
                seconds.append(time.monotonic() - started)
            what = f"{name}, {settings.threads} processes: {3 * _N_EXPERTS} matrices of {ROWS} x {COLS}"
            figures.append(
                Figure(f"{what} and {(nbytes - _experts_nbytes()) / 1e9:.2f} GB beside", "s", tuple(seconds))
            )
            projected = tuple(value / nbytes * _MIXTRAL_NBYTES / 60 for value in seconds)
            figures.append(
                Figure(f"{name}, {settings.threads} processes: a whole Mixtral-8x7B, projected", "min", projected)
            )
    return figures


def _measure_scheme(settings: Settings, scheme: Scheme, weight: Tensor) -> Iterator[Figure]:
    try:
        expected, package_s = _timed(lambda: solve_with_package(weight, scheme))
    except ImportError:
        raise NothingToMeasure("solver: the hqq package is needed: pip install 'expertd[hqq]'") from None
    plain, plain_s = zip(*(_timed(lambda: solve(weight, scheme)) for _ in range(settings.rounds)), strict=True)
    refined, refined_s = zip(*(_timed(lambda: quantize(weight, scheme)) for _ in range(settings.rounds)), strict=True)
    _, packing_s = zip(*(_timed(lambda: pack(refined[0])) for _ in range(settings.rounds)), strict=True)
    name = scheme.name
    yield Figure(f"{name}: hqq package", "CPU-s", (package_s,))
    yield Figure(f"{name}: ours, not refined", "CPU-s", plain_s)
    yield Figure(f"{name}: ours, refined", "CPU-s", refined_s)
    yield Figure(f"{name}: packing", "CPU-s", packing_s)
    yield Figure(f"{name}: not refined / package", "", ratios(plain_s, (package_s,) * settings.rounds))
    yield Figure(f"{name}: refined / package", "", ratios(refined_s, (package_s,) * settings.rounds))
    yield Figure(f"{name}: codes that are the package's", "", (_equal_share(plain[0], expected),))
    yield Figure(f"{name}: error of the package, no second level", "", (_error(_restored(expected), weight),))
    yield Figure(f"{name}: error as stored, not refined", "", (_stored_error(weight, scheme, refine=False),))
    yield Figure(f"{name}: error as stored, refined", "", (_stored_error(weight, scheme, refine=True),))
    yield from _second_level_cost(scheme)


def _second_level_cost(scheme: Scheme) -> Iterator[Figure]:
    """Yield what 8-bit scales and bases add to the error of HQQ's own floats, for the smallest weights."""
    weight = _gaussian(1024, COLS, seed=1, std=_SMALL_STD)
    floats = _error(_restored(solve(weight, scheme)), weight)
    stored = _stored_error(weight, scheme, refine=False)
    yield Figure(f"{scheme.name}: second level's cost at weights of {_SMALL_STD}", "%", (100 * (stored / floats - 1),))


def _timed(compute: Callable[[], _Result]) -> tuple[_Result, float]:
    started = time.process_time()
    return compute(), time.process_time() - started


def _equal_share(groups: FloatGroups, expected: FloatGroups) -> float:
    return float((groups.codes == expected.codes).double().mean())


def _restored(groups: FloatGroups) -> Tensor:
    codes = groups.codes.view(*groups.scale.shape, -1).float()
    return codes.sub_(groups.zero[..., None]).mul_(groups.scale[..., None]).view_as(groups.codes)


def _error(restored: Tensor, weight: Tensor) -> float:
    # In float64: of so many weights float32 loses the third digit.
    lost, total = (torch.linalg.vector_norm(w, dtype=torch.float64) for w in (restored - weight.float(), weight))
    return float(lost / total)


def _stored_error(weight: Tensor, scheme: Scheme, *, refine: bool) -> float:
    part = Part("w1", weight.shape[0], weight.shape[1], scheme.name)
    return weight_error(weight, part, encode_part(weight, part, refine=refine))


def _gaussian(rows: int, cols: int, *, seed: int, std: float = _STD) -> Tensor:
    return (torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * std).bfloat16()


def _experts_nbytes() -> int:
    return 3 * _N_EXPERTS * ROWS * COLS * 2


def _write_checkpoint(folder: Path) -> int:
    """Write a Mixtral of one layer with a few experts of full size; return the bytes of its weights."""
    folder.mkdir()
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": COLS,
        "intermediate_size": ROWS, "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_local_experts": _N_EXPERTS, "num_experts_per_tok": 2, "vocab_size": 512, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0"
    shapes = {f"{layer}.self_attn.{name}_proj.weight": (COLS, COLS) for name in "qo"}
    shapes |= {f"{layer}.self_attn.{name}_proj.weight": (COLS // 4, COLS) for name in "kv"}
    shapes |= {"model.embed_tokens.weight": (512, COLS), "lm_head.weight": (512, COLS)}
    shapes[f"{layer}.block_sparse_moe.gate.weight"] = (_N_EXPERTS, COLS)
    for expert in range(_N_EXPERTS):
        experts = f"{layer}.block_sparse_moe.experts.{expert}"
        shapes |= {f"{experts}.w{n}.weight": (COLS, ROWS) if n == 2 else (ROWS, COLS) for n in (1, 2, 3)}
    tensors = {name: _gaussian(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    norms = ("model.norm.weight", f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight")
    tensors |= {name: torch.ones(COLS, dtype=torch.bfloat16) for name in norms}
    save_file(tensors, folder / "model.safetensors")
    return sum(tensor.numel() * 2 for tensor in tensors.values())
