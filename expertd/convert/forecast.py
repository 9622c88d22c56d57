"""What `expertd quantize --plan` says: what a checkpoint would become, from its headers alone. Pure."""

from dataclasses import dataclass, replace

from expertd.convert.checkpoint import Checkpoint
from expertd.convert.config import QuantizeConfig
from expertd.convert.errors import GroupsDoNotDivide
from expertd.convert.memory import Crew
from expertd.convert.plan import StorePlan, plan_store
from expertd.convert.words import SIXTEEN_BIT
from protocol.slot_area import least_slots, slot_area_nbytes

_SCHEMES = (SIXTEEN_BIT, "8bit-g64", "4bit-g64", "3bit-g64", "2bit-g16")
# The runner's default context, and the bytes of a number in its kv_cache.
_CONTEXT = 4096
_KV_NBYTES = 2


@dataclass(frozen=True, slots=True)
class StoreSize:
    """A store in bytes: experts and how many they are, the rest, the largest expert."""

    n_experts: int
    experts_nbytes: int
    dense_nbytes: int
    expert_nbytes: int

    @property
    def nbytes(self) -> int:
        """What a resident store takes of memory and disk."""
        return self.experts_nbytes + self.dense_nbytes


def store_size(plan: StorePlan) -> StoreSize:
    """Return the size of a planned store's records."""
    experts = [record.nbytes for record in plan.records if record.key is not None]
    dense = sum(record.nbytes for record in plan.records if record.key is None)
    return StoreSize(len(experts), sum(experts), dense, max(experts))


def tiered_nbytes(size: StoreSize, n_slots: int) -> int:
    """Return what of memory a store takes whose experts are read into so many slots; none is pinned."""
    return size.dense_nbytes + slot_area_nbytes(n_slots, size.expert_nbytes)


def forecast_text(
    place: str, checkpoint: Checkpoint, config: QuantizeConfig, *, crew: Crew, seconds: float, is_fetched: bool
) -> str:
    """Return the text for a person; `seconds` is what this machine was measured to need for the configured store."""
    model, plan = checkpoint.config, plan_store(checkpoint, config)
    shards = {checkpoint.place_of(matrix).shard for record in plan.records for matrix in record.matrices}
    n_weights = sum(part.rows * part.cols for record in plan.records for part in record.parts)
    kv_nbytes = 2 * model.n_layers * model.n_kv_heads * model.head_dim * _KV_NBYTES * _CONTEXT
    chosen = store_size(plan)
    lines = [
        f"{place}: {model.n_layers} layers of {model.n_experts} experts, {model.top_k} per token, "
        f"{n_weights / 1e9:.2f} billion weights, {_gb(plan.source_nbytes)} in {len(shards)} shard(s)",
        "",
        f"{'experts':<12}{'store':>10}{'one expert':>12}{'memory from':>13}{'half':>10}{'GPU from':>10}",
        *(_row(word, checkpoint, config) for word in _SCHEMES),
        _size_row("configured", chosen, checkpoint),
        "",
        "store: on disk, and in memory once for all runners",
        "memory from, half: of a store larger than memory (expertd start --memory) the least that must lie there "
        f"({least_slots(model.top_k, chosen.n_experts)} experts at a time), and what half of the experts take",
        "GPU from: the least that a GPU with an expert cache holds",
        f"each runner: {_gb(kv_nbytes)} for a context of {_CONTEXT} tokens, and its own buffers",
        f"time: about {_duration(seconds)} on this machine with {crew.n_jobs} worker(s), measured on one expert"
        + (", if the Hub sends as fast as that" if is_fetched else "")
        + f"; they hold at most {_gb(crew.held_nbytes)}",
    ]
    return "\n".join(lines)


def _row(word: str, checkpoint: Checkpoint, config: QuantizeConfig) -> str:
    try:
        size = store_size(plan_store(checkpoint, replace(config, experts=word, override=())))
    except GroupsDoNotDivide:
        return f"{word:<12}{'-':>10}  its groups do not divide this model's matrices"
    return _size_row(word, size, checkpoint)


def _size_row(word: str, size: StoreSize, checkpoint: Checkpoint) -> str:
    model = checkpoint.config
    gpu_nbytes = size.dense_nbytes + model.n_layers * model.top_k * size.expert_nbytes
    one = f"{size.expert_nbytes / 1e6:.1f} MB"
    n_slots = (least_slots(model.top_k, size.n_experts), size.n_experts // 2)
    least, half = (_gb(tiered_nbytes(size, n)) for n in n_slots)
    return f"{word:<12}{_gb(size.nbytes):>10}{one:>12}{least:>13}{half:>10}{_gb(gpu_nbytes):>10}"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
