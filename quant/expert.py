"""One expert computed from its record: w2 · (silu(w1 · x) * (w3 · x)), the SwiGLU of Mixtral.

Owns no memory but a workspace, which experts of one thread share: the record belongs to whoever mapped it.
"""

from torch import Tensor
from torch.nn.functional import silu

from protocol.layout import PartSpan
from quant.errors import BadShape
from quant.linear import Linear
from quant.workspace import Workspace

GATE, DOWN, UP = "w1", "w2", "w3"


class Expert:
    """The three matrices of one expert: w1 (gate) and w3 (up) [I, H], w2 (down) [H, I]."""

    def __init__(self, record: Tensor, spans: tuple[PartSpan, ...], *, workspace: Workspace | None = None) -> None:
        workspace = workspace or Workspace()
        linears = {
            span.part.name: Linear(span.part, record[span.offset : span.offset + span.nbytes], workspace=workspace)
            for span in spans
        }
        if set(linears) != {GATE, DOWN, UP} or len(spans) != 3:
            raise BadShape(f"an expert has the parts w1, w2 and w3; {', '.join(linears)} came")
        self._gate, self._down, self._up = linears[GATE], linears[DOWN], linears[UP]
        self._check_shapes()

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Return the expert's output, f32 [T, H], of hidden_states f32 [T, H]; raise BadShape."""
        inner = silu(self._gate(hidden_states)).mul_(self._up(hidden_states))  # [T, I]
        return self._down(inner)

    def _check_shapes(self) -> None:
        gate, down, up = self._gate.part, self._down.part, self._up.part
        if (gate.rows, gate.cols) != (up.rows, up.cols) or (gate.rows, gate.cols) != (down.cols, down.rows):
            shapes = ", ".join(f"{part.name} [{part.rows}, {part.cols}]" for part in (gate, down, up))
            raise BadShape(f"w1 and w3 [I, H] and w2 [H, I] are expected, {shapes} came")
