"""A checkpoint becomes a store: what is in it, that it is whole or not there, that nothing but the source counts.

Every run starts a worker process, which imports torch; so what can be seen in one store is.
"""

import hashlib
import itertools
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from expertd.convert.checkpoint import read_checkpoint
from expertd.convert.config import QuantizeConfig
from expertd.convert.quantize import quantize_checkpoint
from expertd.convert.work import Progress
from protocol.layout import record_spans
from protocol.manifest import Manifest, Record, TensorSchemes, load_manifest
from protocol.schemes import scheme_named
from quant.reference import dequantize
from tests.support.checkpoints import write_checkpoint, write_weights

SIXTEEN_BIT = QuantizeConfig(experts="16bit", attention="16bit", head="16bit")
# Every scheme at once.
MIXED = QuantizeConfig(experts="3bit-g64", attention="2bit-g16", head="4bit-g64")
FIRST_EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1.weight"

# Greatest |error| over the matrix's greatest |weight|, from the step of a group: half a step for rounding, and as much
# again for the second level and for weights beyond a group's ends.
TOLERANCES = {"8bit-g64": 1 / 100, "4bit-g64": 1 / 7, "3bit-g64": 1 / 3, "2bit-g16": 2 / 3}


def quantize(
    checkpoint: Path, store: Path, config: QuantizeConfig = SIXTEEN_BIT, *, force: bool = False, n_jobs: int = 1
) -> Manifest:
    return quantize_checkpoint(checkpoint, store, config, force=force, n_jobs=n_jobs, on_progress=lambda _: None)


def read_record(store: Path, record: Record) -> bytes:
    with (store / record.file).open("rb") as file:
        file.seek(record.offset)
        return file.read(record.nbytes)


def parts_of(store: Path, record: Record) -> Iterator[tuple[str, str, Tensor]]:
    """Yield name, scheme and weights [rows, cols] of every part of a record."""
    data = torch.frombuffer(bytearray(read_record(store, record)), dtype=torch.uint8)
    for span in record_spans(record.layout_id, record.parts):
        part, part_bytes = span.part, data[span.offset : span.offset + span.nbytes]
        scheme = scheme_named(part.scheme)
        yield part.name, part.scheme, dequantize(part_bytes, part.rows, part.cols, scheme)


def hub_name(record_name: str, part_name: str) -> str:
    """Return the Hub's name of a part, written down here once more: the test must not ask the code it tests."""
    norms = {"input_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
    match record_name.split("."):
        case ["lm_head"]:
            return "lm_head.weight"
        case ["layers", layer, "experts", expert]:
            return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part_name}.weight"
        case ["layers", layer, "gate"]:
            return f"model.layers.{layer}.block_sparse_moe.gate.weight"
        case ["layers", layer, name] if name in norms:
            return f"model.layers.{layer}.{norms[name]}.weight"
        case ["layers", layer, name]:
            return f"model.layers.{layer}.self_attn.{name}.weight"
        case _:
            return f"model.{record_name}.weight"


def source_of(checkpoint: Path) -> dict[str, Tensor]:
    return {name: weight for path in checkpoint.glob("*.safetensors") for name, weight in load_file(path).items()}


def records_in(manifest: Manifest) -> dict[str, Record]:
    return manifest.dense | {str(key): record for key, record in manifest.experts.items()}


def weights_in(converted: "Converted") -> dict[str, tuple[str, Tensor]]:
    """Return scheme and weights of every matrix under its Hub name."""
    return {
        hub_name(name, part): (scheme, weight)
        for name, record in records_in(converted.manifest).items()
        for part, scheme, weight in parts_of(converted.store, record)
    }


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", dtype="bf16")
    (folder / "tokenizer.json").write_text('{"tokenizer": true}')
    (folder / "notes.txt").write_text("not the store's business")
    return folder


@dataclass(frozen=True, slots=True)
class Converted:
    """A store, the checkpoint that it was made of, and what was told meanwhile."""

    checkpoint: Path
    store: Path
    progress: list[Progress]

    @property
    def manifest(self) -> Manifest:
        return load_manifest((self.store / "manifest.json").read_bytes())


def convert(checkpoint: Path, store: Path, config: QuantizeConfig) -> Converted:
    told: list[Progress] = []
    quantize_checkpoint(checkpoint, store, config, force=False, n_jobs=1, on_progress=told.append)
    return Converted(checkpoint, store, told)


@pytest.fixture(scope="module")
def mixed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """A store with every scheme."""
    return convert(checkpoint, tmp_path_factory.mktemp("stores") / "mixed", MIXED)


@pytest.fixture(scope="module")
def sixteen_bit(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """A 16-bit store of a tied checkpoint with weights of every type, one of them too large for fp16."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("source") / "c", exact_in_16_bits=True, tied=True)
    tensors = source_of(checkpoint)
    for name, weight in tensors.items():
        if "self_attn" in name:
            tensors[name] = weight.bfloat16()
        if "layernorm" in name:
            tensors[name] = weight.half()
    tensors[FIRST_EXPERT][0, 0] = 2.0**17
    write_weights(checkpoint, tensors)
    config = replace(SIXTEEN_BIT, head="8bit-g64")
    return convert(checkpoint, tmp_path_factory.mktemp("stores") / "sixteen", config)


def test_the_manifest_describes_the_model(mixed: Converted) -> None:
    manifest = mixed.manifest

    facts, schemes = manifest.model, manifest.schemes

    assert (facts.architecture, facts.n_layers, facts.n_experts, facts.top_k) == ("mixtral", 2, 4, 2)
    assert (facts.hidden_size, facts.intermediate_size) == (64, 128)
    assert (facts.activation, facts.gate_function, facts.gate_normalization) == ("silu", "softmax", "top_k")
    assert (schemes.experts, schemes.attention, schemes.head, schemes.other) == (
        "3bit-g64",
        "2bit-g16",
        "4bit-g64",
        "bf16",
    )
    assert manifest.solver == "shortcut, refined"


def test_every_record_has_its_checksum(mixed: Converted) -> None:
    records = records_in(mixed.manifest)

    checksums = {name: xxhash.xxh3_128_hexdigest(read_record(mixed.store, record)) for name, record in records.items()}

    assert checksums == {name: record.xxh3_128 for name, record in records.items()}


def test_every_weight_is_the_sources_within_its_schemes_error(mixed: Converted) -> None:
    source = source_of(mixed.checkpoint)

    weights = weights_in(mixed)

    assert weights.keys() == source.keys()
    for name, (scheme, weight) in weights.items():
        expected = source[name].float().reshape(weight.shape)
        error = float((weight - expected).abs().max() / expected.abs().max())
        assert error <= TOLERANCES.get(scheme, 0.0), (name, scheme)


def test_the_manifest_says_what_every_weight_lost(mixed: Converted, sixteen_bit: Converted) -> None:
    for converted in (mixed, sixteen_bit):
        source = source_of(converted.checkpoint)

        errors = {
            hub_name(name, part.name): error
            for name, record in records_in(converted.manifest).items()
            for part, error in zip(record.parts, converted.manifest.weight_errors[name], strict=True)
        }

        assert errors.keys() == source.keys()
        for name, (_, weight) in weights_in(converted).items():
            expected = source[name].float().reshape(weight.shape)
            assert errors[name] == pytest.approx(float((weight - expected).norm() / expected.norm()), rel=1e-3), name


def test_the_stock_library_reads_the_files(mixed: Converted) -> None:
    read: dict[str, Tensor] = {}

    for path in mixed.store.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            read |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping

    records = records_in(mixed.manifest)
    assert read.keys() == records.keys()
    for name, record in records.items():
        assert read[name].dtype == torch.uint8
        assert bytes(read[name].tolist()) == read_record(mixed.store, record)


def test_side_files_are_copied_verbatim_and_nothing_else_is(mixed: Converted) -> None:
    files = {file.name: (file.nbytes, file.sha256) for file in mixed.manifest.files}

    copies = {name: (mixed.store / name).read_bytes() for name in files}

    assert copies == {name: (mixed.checkpoint / name).read_bytes() for name in ("config.json", "tokenizer.json")}
    assert files == {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in copies.items()}
    assert names_in(mixed.store) == [
        "config.json",
        "dense.safetensors",
        "experts-00001.safetensors",
        "manifest.json",
        "tokenizer.json",
    ]


def test_progress_counts_every_byte_of_the_checkpoints_weights(mixed: Converted) -> None:
    source = source_of(mixed.checkpoint)

    told = mixed.progress

    total_nbytes = sum(weight.nbytes for weight in source.values())
    assert {progress.total_nbytes for progress in told} == {total_nbytes}
    assert all(a.done_nbytes < b.done_nbytes for a, b in itertools.pairwise(told))
    assert told[-1].done_nbytes == total_nbytes
    assert sorted(progress.tensor for progress in told) == sorted(source)


def test_a_16_bit_store_is_exact(sixteen_bit: Converted) -> None:
    source = source_of(sixteen_bit.checkpoint)

    weights = weights_in(sixteen_bit)

    assert weights.keys() == source.keys()
    for name, (_, weight) in weights.items():
        assert torch.equal(weight, source[name].float().reshape(weight.shape)), name


def test_in_16_bits_types_are_kept_and_f32_becomes_fp16_unless_that_cannot_hold_it(sixteen_bit: Converted) -> None:
    source = source_of(sixteen_bit.checkpoint)

    schemes = {name: scheme for name, (scheme, _) in weights_in(sixteen_bit).items()}

    expected = {name: "bf16" if weight.dtype == torch.bfloat16 else "fp16" for name, weight in source.items()}
    assert schemes == expected | {FIRST_EXPERT: "bf16"}


def test_a_tied_checkpoint_becomes_a_store_without_a_head(sixteen_bit: Converted) -> None:
    manifest = sixteen_bit.manifest

    assert "lm_head" not in manifest.dense
    assert manifest.schemes == TensorSchemes(experts="fp16", attention="bf16", head="fp16", other="fp16")


def test_the_store_does_not_depend_on_the_number_of_workers(mixed: Converted, tmp_path: Path) -> None:
    quantize(mixed.checkpoint, tmp_path / "store", MIXED, n_jobs=3)

    assert names_in(tmp_path / "store") == names_in(mixed.store)
    for name in names_in(mixed.store):
        assert (tmp_path / "store" / name).read_bytes() == (mixed.store / name).read_bytes()


def test_the_store_does_not_depend_on_how_the_checkpoint_is_split(mixed: Converted, tmp_path: Path) -> None:
    split = shutil.copytree(mixed.checkpoint, tmp_path / "split")
    write_weights(split, source_of(mixed.checkpoint), n_shards=3)

    manifest = quantize(split, tmp_path / "store", MIXED)

    assert manifest.digest == mixed.manifest.digest


def test_one_changed_weight_changes_the_digest(mixed: Converted, tmp_path: Path) -> None:
    changed = shutil.copytree(mixed.checkpoint, tmp_path / "changed")
    tensors = source_of(mixed.checkpoint)
    tensors["model.norm.weight"][3] *= 1.01
    write_weights(changed, tensors)

    manifest = quantize(changed, tmp_path / "store", MIXED)

    assert manifest.digest != mixed.manifest.digest
    assert manifest.experts == mixed.manifest.experts


@pytest.mark.parametrize("shard_size", ["1GB", "200KB"])
def test_a_checkpoint_as_transformers_saves_it_is_read(tmp_path: Path, shard_size: str) -> None:
    with warnings.catch_warnings():
        # What transformers imports warns of its own deprecations.
        warnings.simplefilter("ignore", DeprecationWarning)
        from transformers import MixtralConfig, MixtralForCausalLM

        config = MixtralConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            vocab_size=96,
        )
        MixtralForCausalLM(config).save_pretrained(tmp_path, max_shard_size=shard_size)

    checkpoint = read_checkpoint(tmp_path)
    sizes = checkpoint.config

    assert (sizes.hidden_size, sizes.intermediate_size, sizes.vocab_size) == (64, 128, 96)
    assert (sizes.n_layers, sizes.n_heads, sizes.n_kv_heads, sizes.head_dim) == (2, 4, 2, 16)
    assert (sizes.n_experts, sizes.top_k, sizes.is_tied) == (4, 2, False)
