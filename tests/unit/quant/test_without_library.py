"""Without the C library everything works, through torch; a library of another version is refused."""

from collections.abc import Iterator

import pytest
import torch

from protocol.schemes import Scheme
from quant import kernels
from quant.errors import QuantError, StaleLibrary
from quant.linear import Linear
from quant.reference import dequantize
from tests.unit.quant.matrices import ALL_SCHEMES, encoded, gaussian, name_of


@pytest.fixture
def library_file(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Lets a test look for the library anew; afterwards the real one is looked for again."""
    kernels._library.cache_clear()
    yield monkeypatch
    kernels._library.cache_clear()


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_without_the_library_torch_does_the_same(library_file: pytest.MonkeyPatch, scheme: Scheme) -> None:
    library_file.setattr(kernels, "LIBRARY_FILE", "libabsent.so")
    part, part_bytes = encoded(45, 320, scheme)
    x = gaussian(2, 320, std=1.0, seed=1)
    weights, rows = dequantize(part_bytes, 45, 320, scheme), torch.empty(7, 320)

    y = Linear(part, part_bytes)(x)
    kernels.dequantize_rows(part_bytes, part, 5, 7, rows)

    assert not kernels.has_c_library()
    assert torch.equal(rows, weights[5:12])
    expected = x.double() @ weights.double().t()
    assert float((y - expected).abs().max() / expected.abs().max()) <= 1e-5


def test_multiplying_while_unpacking_needs_the_library(library_file: pytest.MonkeyPatch) -> None:
    library_file.setattr(kernels, "LIBRARY_FILE", "libabsent.so")
    part, part_bytes = encoded(8, 64, ALL_SCHEMES[0])

    with pytest.raises(QuantError, match="needs the C library"):
        kernels.multiply_rows(torch.ones(1, 64), part_bytes, part, 0, 8, y=torch.empty(1, 8))


@pytest.mark.skipif(not kernels.has_c_library(), reason="the C library was not built")
def test_a_library_of_another_version_is_refused(library_file: pytest.MonkeyPatch) -> None:
    library_file.setattr(kernels, "_ABI_VERSION", 999)

    with pytest.raises(StaleLibrary, match="version 1, this code needs 999; install the package again"):
        kernels.has_c_library()
