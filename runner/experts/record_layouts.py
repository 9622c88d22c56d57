"""Which records of a store are laid out alike, so that what is made of a layout and a slot is made once. Pure."""

from protocol.handles import ExpertKey
from protocol.layout import Part, PartSpan, record_spans
from protocol.manifest import Manifest


class RecordLayouts:
    """The layouts of a store's experts, numbered from 0."""

    def __init__(self, manifest: Manifest) -> None:
        model = manifest.model
        numbers: dict[tuple[str, tuple[Part, ...]], int] = {}
        self._numbers = [
            [
                numbers.setdefault((record.layout_id, record.parts), len(numbers))
                for record in (manifest.experts[ExpertKey(layer, expert)] for expert in range(model.n_experts))
            ]
            for layer in range(model.n_layers)
        ]
        self._spans: list[tuple[PartSpan, ...]] = [record_spans(layout_id, parts) for layout_id, parts in numbers]

    def number(self, layer: int, expert: int) -> int:
        """Return which layout that expert's record has."""
        return self._numbers[layer][expert]

    def spans(self, number: int) -> tuple[PartSpan, ...]:
        """Return where the parts lie in records of that layout."""
        return self._spans[number]
