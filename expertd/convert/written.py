"""What a manifest says of the records that were written. Pure."""

import hashlib
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

from expertd.convert.checkpoint import Checkpoint
from expertd.convert.config import QuantizeConfig
from expertd.convert.mixtral import TensorClass, model_facts
from expertd.convert.plan import PlannedRecord, StorePlan
from expertd.convert.worker_messages import RecordDone
from protocol.layout import R8
from protocol.manifest import Manifest, Record, SideFile, TensorSchemes


@dataclass(frozen=True, slots=True)
class WrittenRecord:
    """What the manifest says of a record that is written: its entry, and ||w - ŵ|| / ||w|| of each of its parts."""

    record: Record
    weight_errors: tuple[float, ...]


def added_error(manifest: Manifest) -> float:
    """Return ||w - ŵ|| / ||w|| of the experts, w as the checkpoint has it: the root of the mean square of all."""
    errors = [lost for key in manifest.experts for lost in manifest.weight_errors[str(key)]]
    return math.sqrt(sum(lost**2 for lost in errors) / len(errors))


def written(planned: PlannedRecord, done: RecordDone) -> WrittenRecord:
    """Return what the manifest says of a planned record that is done."""
    parts = tuple(replace(part, scheme=scheme) for part, scheme in zip(planned.parts, done.schemes, strict=True))
    record = Record(R8, parts, planned.file, planned.offset, planned.nbytes, done.xxh3_128)
    return WrittenRecord(record, done.weight_errors)


def store_manifest(
    plan: StorePlan, written: dict[str, WrittenRecord], source: Checkpoint, config: QuantizeConfig
) -> Manifest:
    """Return the manifest in the plan's order, whatever order the records were finished in."""
    records = {name: entry.record for name, entry in written.items()}
    return Manifest(
        model=model_facts(source.config),
        schemes=_schemes(plan, records),
        solver=config.solver_text,
        experts={planned.key: records[planned.name] for planned in plan.records if planned.key is not None},
        dense={planned.name: records[planned.name] for planned in plan.records if planned.key is None},
        files=tuple(
            SideFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in source.side_files.items()
        ),
        weight_errors={planned.name: written[planned.name].weight_errors for planned in plan.records},
    )


def _schemes(plan: StorePlan, records: dict[str, Record]) -> TensorSchemes:
    """Return the scheme that most of each class have, the first of several; a tied head is the embedding."""
    counts: dict[TensorClass, Counter[str]] = defaultdict(Counter)
    for planned in plan.records:
        counts[planned.tensor_class][records[planned.name].parts[0].scheme] += 1
    most = {tensor_class: count.most_common(1)[0][0] for tensor_class, count in counts.items()}
    return TensorSchemes(
        experts=most["experts"],
        attention=most["attention"],
        head=most.get("head", most["other"]),
        other=most["other"],
    )
