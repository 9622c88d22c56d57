"""Attention over a kv_cache as it lies on a device, against the reference over the host's."""

import pytest
import torch
from torch import Tensor

from quant import layer_reference
from quant.layer import KEY_BLOCK
from runner.models.device_attention import TILE_TOKENS, attend
from runner.models.rotary import RotaryAngles

HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 4, 2, 16, 4 * KEY_BLOCK


def random_new(n_tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(n_tokens, HEADS * HEAD_DIM, generator=generator)
    keys, values = (torch.randn(n_tokens, KV_HEADS * HEAD_DIM, generator=generator) for _ in range(2))
    return queries, keys, values


def on_device(
    new: tuple[Tensor, ...], cuts: list[int], window: int | None, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the attention of the tokens, computed in pieces that end at the cuts, and the cache behind it."""
    angles = RotaryAngles(HEAD_DIM, 1e4)
    past = torch.zeros(KV_HEADS, CONTEXT, HEAD_DIM, dtype=dtype), torch.zeros(KV_HEADS, CONTEXT, HEAD_DIM, dtype=dtype)
    pieces = []
    for start, end in zip([0, *cuts], [*cuts, len(new[0])], strict=True):
        piece = tuple(tensor[start:end] for tensor in new)
        pieces.append(attend(past, start, window, angles.of(start, end), piece))
    return torch.cat(pieces), past


def by_reference(new: tuple[Tensor, ...], window: int | None) -> Tensor:
    n_blocks = CONTEXT // KEY_BLOCK
    past = torch.zeros(KV_HEADS, n_blocks, HEAD_DIM, KEY_BLOCK), torch.zeros(KV_HEADS, CONTEXT, HEAD_DIM)
    return layer_reference.attend(past, 0, window, RotaryAngles(HEAD_DIM, 1e4).of(0, len(new[0])), new)


@pytest.mark.parametrize("window", [None, 1, 7, 200])
@pytest.mark.parametrize("cuts", [[], [1], [1, 2, 3], [40], [TILE_TOKENS], [TILE_TOKENS + 1, 69]])
def test_attention_is_the_references_wherever_the_tokens_are_cut(window: int | None, cuts: list[int]) -> None:
    new = random_new(70, seed=len(cuts))

    attended, _ = on_device(new, cuts, window, torch.float32)

    torch.testing.assert_close(attended, by_reference(new, window), rtol=1e-5, atol=1e-5)


def test_a_16_bit_cache_costs_what_rounding_costs() -> None:
    new = random_new(70, seed=0)

    attended, past = on_device(new, [33], None, torch.float16)

    assert past[0].dtype == attended.dtype == torch.float16
    torch.testing.assert_close(attended.float(), by_reference(new, None), rtol=5e-3, atol=5e-3)


def test_nothing_is_written_behind_the_tokens_that_came() -> None:
    _, past = on_device(random_new(9, seed=1), [], None, torch.float32)

    assert not past[0][:, 9:].any()
    assert not past[1][:, 9:].any()
    assert past[0][:, :9].any(-1).all()
