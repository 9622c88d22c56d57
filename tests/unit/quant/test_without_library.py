"""Without the C library everything works, through torch; a library of another version is refused."""

from collections.abc import Iterator

import pytest
import torch

from protocol.schemes import Q4_G64, Scheme
from quant import kernels, library
from quant.errors import StaleLibrary
from quant.expert import LayerExperts
from quant.linear import Linear
from quant.packing import pack
from quant.reference import dequantize
from quant.solver import quantize
from quant.workspace import Workspace
from tests.unit.quant.c_library import needs_library
from tests.unit.quant.expert_records import HIDDEN, expert_of
from tests.unit.quant.matrices import ALL_SCHEMES, encoded, gaussian, name_of, relative_error


@pytest.fixture
def library_file(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Lets a test look for the library anew; afterwards the real one is looked for again."""
    library.library.cache_clear()
    yield monkeypatch
    library.library.cache_clear()


@pytest.fixture
def no_library(library_file: pytest.MonkeyPatch) -> None:
    library_file.setattr(library, "LIBRARY_FILE", "libabsent.so")


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_without_the_library_torch_multiplies(scheme: Scheme) -> None:
    # Two strips of expanded rows, a last panel that is not whole.
    part, part_bytes = encoded(2101, 512, scheme)
    x = gaussian(2, 512, std=1.0, seed=1)
    weights = dequantize(part_bytes, 2101, 512, scheme)

    y = Linear(part, part_bytes)(x)

    assert not library.has_c_library()
    assert relative_error(y, x.double() @ weights.double().t()) <= 1e-6


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize(("refine", "error_most"), [(False, 0.0875), (True, 0.0812)])
def test_without_the_library_torch_solves(*, refine: bool, error_most: float) -> None:
    weight = gaussian(70, 1024)

    matrix = quantize(weight, Q4_G64, refine=refine)

    assert not library.has_c_library()
    assert relative_error(dequantize(pack(matrix), 70, 1024, Q4_G64), weight) <= error_most


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_without_the_library_torch_unpacks(scheme: Scheme) -> None:
    part, part_bytes = encoded(45, 320, scheme)
    rows = torch.empty(7, 320)

    kernels.dequantize_rows(part_bytes, part, 5, 7, rows)

    assert torch.equal(rows, dequantize(part_bytes, 45, 320, scheme)[5:12])


@pytest.mark.usefixtures("no_library")
def test_without_the_library_torch_computes_experts() -> None:
    experts = [expert_of(scheme, seed) for seed, scheme in enumerate(ALL_SCHEMES[:3])]
    x, ids = gaussian(4, HIDDEN, std=1.0), torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1]])
    weights = torch.tensor([0.75, 0.25]).expand(4, 2).contiguous()

    with Workspace(2) as workspace:
        layer = LayerExperts(3, HIDDEN, workspace=workspace)
        for expert_id, expert in enumerate(experts):
            layer.put(expert_id, expert)
        output = layer.forward(x, ids, weights)

    outputs = torch.stack([expert.reference(x) for expert in experts])  # [E, T, H]
    expected = sum(weights[:, place, None] * outputs[ids[:, place], torch.arange(4)] for place in (0, 1))
    assert torch.allclose(output, expected, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_library")
def test_a_workspace_without_the_library_has_nothing_to_start_or_to_close() -> None:
    with Workspace(3) as workspace, workspace.awake():
        assert workspace.address is None


@needs_library
def test_a_library_of_another_version_is_refused(library_file: pytest.MonkeyPatch) -> None:
    library_file.setattr(library, "_ABI_VERSION", 999)

    with pytest.raises(StaleLibrary, match=r"version \d+, this code needs 999; install the package again"):
        library.has_c_library()
