import subprocess
import sys

import pytest
import torch

from runner.errors import ContextFull, OutOfMemory
from runner.kv_cache import KVCache
from runner.metrics import read_memory
from runner.sequence import Sequence


def make_cache(context: int = 8, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(n_layers=2, n_kv_heads=1, context=context, head_dim=4, dtype=dtype)


def test_what_is_written_is_read_back_behind_what_was_there() -> None:
    cache = make_cache()
    first, second = torch.randn(1, 2, 4), torch.randn(1, 3, 4)
    cache.write(1, first, -first)
    cache.advance(2)
    cache.write(1, second, -second)

    keys, values = cache.read(1, 1, 5)

    assert torch.equal(keys, torch.cat((first[:, 1:], second), dim=1))
    assert torch.equal(values, -keys)


def test_a_step_that_is_not_finished_leaves_no_trace() -> None:
    cache = make_cache()
    cache.write(0, torch.ones(1, 2, 4), torch.ones(1, 2, 4))

    cache.write(0, torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))

    assert cache.length == 0
    assert cache.read(0, 0, 2)[0].sum() == 0


def test_a_sequence_longer_than_its_context_is_refused_with_the_figures() -> None:
    sequence = Sequence(make_cache(context=4))
    sequence.append([1, 2, 3])

    with pytest.raises(ContextFull, match="the context holds 4 tokens"):
        sequence.append([4, 5])

    assert sequence.pending == [1, 2, 3]


def test_a_long_context_costs_no_memory_before_it_is_used() -> None:
    before = read_memory().private_nbytes

    cache = KVCache(n_layers=32, n_kv_heads=8, context=32768, head_dim=128, dtype=torch.float16)

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
        from runner.kv_cache import KVCache
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        try:
            KVCache(n_layers=1, n_kv_heads=1, context=1 << 19, head_dim=1 << 10, dtype=torch.float32)
        except OutOfMemory as error:
            print(error)
    """

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout == (
        "a context of 524288 tokens needs 4294967296 bytes for keys and values, the system does not give them; "
        "a smaller --context may fit\n"
    )
