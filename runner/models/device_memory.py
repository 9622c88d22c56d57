"""How much of a device's memory the model needs beside its slots. Arithmetic: nothing is allocated here.

A step's arrays are counted as if all that one layer makes were alive together; what torch's allocator loses between
them is a fixed share and a fixed rest. Letters: T tokens of a step, n of them for one expert at most.
"""

import torch

from protocol.handles import ExpertKey
from protocol.layout import record_spans
from protocol.manifest import Manifest
from quant.device_parts import DeviceExpert
from quant.triton_kernels import Products
from runner.experts.source import PREFILL_TOKENS_MIN
from runner.models.device_attention import TILE_TOKENS
from runner.models.device_mixtral import HEAD_ROWS
from runner.models.mixtral_config import MixtralConfig
from runner.store_view import StoreView

_F32 = 4
# Blocks that are larger than what was asked for, holes between them, and what cuBLAS takes for itself.
_LOST_SHARE = 8
_LOST_NBYTES = 64 << 20


def workspace_nbytes(
    store: StoreView, config: MixtralConfig, products: Products, *, n_tokens: int, context: int, kv_dtype: torch.dtype
) -> int:
    """Return what a step of so many tokens takes of the device's memory at most."""
    nbytes = step_nbytes(store, config, products, n_tokens=n_tokens, context=context, kv_dtype=kv_dtype)
    return nbytes + nbytes // _LOST_SHARE + _LOST_NBYTES


def step_nbytes(
    store: StoreView, config: MixtralConfig, products: Products, *, n_tokens: int, context: int, kv_dtype: torch.dtype
) -> int:
    """Return what a step of so many tokens asks for at most, with all that its products take."""
    attention = _attention_nbytes(config, n_tokens, context, kv_dtype)
    experts = _experts_nbytes(config, products, n_tokens)
    head = HEAD_ROWS * (config.vocab_size * _F32 + 4 * config.hidden_size * _F32)
    # Products go on in each of the three, with a scratch of their own perhaps.
    in_products = _largest_product_nbytes(store.manifest, products, max(n_tokens, HEAD_ROWS))
    return _arrays_nbytes(config, products, n_tokens) + max(attention, experts, head) + in_products


def _arrays_nbytes(config: MixtralConfig, products: Products, n_tokens: int) -> int:
    """Return what is alive all through a step: the residual stream, what is added to it, angles, the choice."""
    small = 2 * config.top_k + PREFILL_TOKENS_MIN - 1 + config.head_dim
    rounded = 2 * config.hidden_size * products.dtype.itemsize
    return n_tokens * (4 * config.hidden_size * _F32 + rounded + small * _F32)


def _attention_nbytes(config: MixtralConfig, n_tokens: int, context: int, kv_dtype: torch.dtype) -> int:
    n_q, n_kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    # Projected, turned (in halves, joined), in the cache's type, attended, rounded; normed and projected back.
    projected = n_tokens * (n_q * (4 * _F32 + 3 * kv_dtype.itemsize) + n_kv * 6 * _F32)
    residual = n_tokens * 4 * config.hidden_size * _F32
    n_rows = min(TILE_TOKENS, n_tokens) * config.n_heads
    # Scores, their softmax and the mask in the widest form that torch may choose, and keys and values in fp32.
    tile = n_rows * context * 3 * _F32 + 2 * context * n_kv * _F32
    return projected + residual + tile


def _experts_nbytes(config: MixtralConfig, products: Products, n_tokens: int) -> int:
    hidden = config.hidden_size
    contributions = n_tokens * config.top_k * hidden * _F32 * 3  # themselves, weighted, and their sum
    of_one = n_tokens * hidden * (2 * _F32 + products.dtype.itemsize)
    return contributions + of_one


def _largest_product_nbytes(manifest: Manifest, products: Products, n_tokens: int) -> int:
    """Return what products take for themselves; one expert of each layout stands for all."""
    return max(
        products.workspace_nbytes(n_tokens, _expert(manifest, key))
        for key in {(record.layout_id, record.parts): key for key, record in manifest.experts.items()}.values()
    )


def _expert(manifest: Manifest, key: ExpertKey) -> DeviceExpert:
    record = manifest.experts[key]
    on_host = torch.empty(record.nbytes, dtype=torch.uint8)  # never written, so it takes no memory
    return DeviceExpert(on_host, record_spans(record.layout_id, record.parts))
