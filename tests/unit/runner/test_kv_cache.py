import subprocess
import sys

import pytest
import torch

from runner.errors import ContextFull, OutOfMemory
from runner.kv_cache import KVCache, reserve_kv_cache
from runner.metrics import read_memory
from runner.sequence import Sequence


def make_cache(context: int = 8, dtype: torch.dtype = torch.float32) -> KVCache:
    return reserve_kv_cache(n_layers=2, n_kv_heads=1, context=context, head_dim=4, dtype=dtype)


def test_a_context_that_is_no_whole_number_of_blocks_has_room_for_all_its_tokens() -> None:
    cache = make_cache(context=33)

    assert cache.values.shape == (2, 1, 64, 4)
    assert cache.keys.shape == (2, 1, 2, 4, 32)
    assert cache.context == 33


def test_tokens_count_once_every_layer_has_them() -> None:
    cache = make_cache(context=8)

    cache.advance(5)

    assert cache.length == 5
    cache.check_room(3)
    with pytest.raises(ContextFull, match="5 are there, 4 more were asked for"):
        cache.check_room(4)


def test_a_sequence_longer_than_its_context_is_refused_with_the_figures() -> None:
    sequence = Sequence(make_cache(context=4))
    sequence.append([1, 2, 3])

    with pytest.raises(ContextFull, match="the context holds 4 tokens"):
        sequence.append([4, 5])

    assert sequence.pending == [1, 2, 3]


def test_a_long_context_costs_no_memory_before_it_is_used() -> None:
    before = read_memory().private_nbytes

    cache = reserve_kv_cache(n_layers=32, n_kv_heads=8, context=32768, head_dim=128, dtype=torch.float16)

    # 4 GiB are reserved.
    assert cache.context == 32768
    assert read_memory().private_nbytes - before < 64 << 20


def test_a_context_beyond_the_memory_of_the_machine_is_refused_with_the_figures() -> None:
    with pytest.raises(OutOfMemory, match=r"a context of 1099511627776 tokens needs 70368744177664 bytes .*--context"):
        make_cache(context=1 << 40)


def test_a_context_that_the_system_does_not_give_is_refused_with_the_figures() -> None:
    program = """if True:
        import resource, torch
        from runner.errors import OutOfMemory
        from runner.kv_cache import reserve_kv_cache
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        try:
            reserve_kv_cache(n_layers=1, n_kv_heads=1, context=1 << 19, head_dim=1 << 10, dtype=torch.float32)
        except OutOfMemory as error:
            print(error)
    """

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout == (
        "a context of 524288 tokens needs 4294967296 bytes for keys and values, the system does not give them; "
        "a smaller --context may fit\n"
    )
