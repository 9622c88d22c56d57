"""The dense source model: a llama GGUF file, read through the `gguf` package.

Owns the reading and checking of the file; the rest of the package sees facts and arrays. Knows nothing of Mixtral.
The file is mapped: a matrix costs memory only while its caller holds it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize
from numpy.typing import NDArray

from tools.demo_checkpoint.errors import SourceError

# A Q4_1 block: fp16 step, fp16 minimum, 32 codes of 4 bits.
Q4_1_BLOCK_NBYTES = 20
Q4_1_BLOCK_WEIGHTS = 32

_READABLE = (
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.Q4_1,
    GGMLQuantizationType.Q8_0,
)


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """What the GGUF says of the dense model."""

    n_layers: int
    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    context_length: int
    rope_theta: float
    rms_norm_eps: float


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the GGUF says of the tokenizer: byte-level BPE with digits split one by one."""

    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    merges: tuple[str, ...]
    bos_id: int
    eos_id: int
    padding_id: int
    unknown_id: int
    chat_template: str


class Source:
    """One opened GGUF file. Not for several threads: none of its callers has any."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._reader = GGUFReader(path)
        # The reader checks little before it slices: a damaged file can end in any of these.
        except (OSError, ValueError, KeyError, IndexError, OverflowError) as error:
            raise SourceError(f"{path}: not a readable GGUF file ({error})") from None
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._expect("general.architecture", "llama")
        self.facts = self._read_facts()

    def weights(self, name: str) -> NDArray[np.float32]:
        """Return the named tensor dequantized to float32, a matrix as [rows, cols]; raise SourceError."""
        tensor = self._tensor(name)
        return np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32)

    def steps(self, name: str) -> NDArray[np.float32]:
        """Return the quantization step of each weight of a Q4_1 matrix, [rows, cols] float32; raise SourceError.

        The step is the fp16 at the head of each 20-byte block of 32 weights (ggml, `block_q4_1`).
        """
        tensor = self._tensor(name)
        if tensor.tensor_type != GGMLQuantizationType.Q4_1:
            raise SourceError(f"{self._path}: {name} is {tensor.tensor_type.name}, noise needs a Q4_1 tensor")
        blocks = tensor.data.reshape(tensor.data.shape[0], -1, Q4_1_BLOCK_NBYTES)  # [rows, cols / 32, 20]
        steps = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[:, :, 0]  # [rows, cols / 32]
        return np.repeat(steps.astype(np.float32), Q4_1_BLOCK_WEIGHTS, axis=1)

    def vocabulary(self) -> Vocabulary:
        """Return the tokenizer's data; raise SourceError if it is of another kind or incomplete."""
        self._expect("tokenizer.ggml.model", "gpt2")
        self._expect("tokenizer.ggml.pre", "smollm")
        vocabulary = Vocabulary(
            tokens=tuple(self._texts("tokenizer.ggml.tokens")),
            token_types=tuple(self._counts("tokenizer.ggml.token_type")),
            merges=tuple(self._texts("tokenizer.ggml.merges")),
            bos_id=self._token_id("bos"),
            eos_id=self._token_id("eos"),
            padding_id=self._token_id("padding"),
            unknown_id=self._token_id("unknown"),
            chat_template=self._text("tokenizer.chat_template"),
        )
        lengths = {len(vocabulary.tokens), len(vocabulary.token_types), self.facts.vocab_size}
        if len(lengths) > 1:
            raise SourceError(f"{self._path}: tokens, their types and vocab_size differ in number: {sorted(lengths)}")
        return vocabulary

    def _read_facts(self) -> SourceFacts:
        facts = SourceFacts(
            n_layers=self._count("llama.block_count"),
            hidden_size=self._count("llama.embedding_length"),
            intermediate_size=self._count("llama.feed_forward_length"),
            n_heads=self._count("llama.attention.head_count"),
            n_kv_heads=self._count("llama.attention.head_count_kv"),
            vocab_size=self._count("llama.vocab_size"),
            context_length=self._count("llama.context_length"),
            rope_theta=self._number("llama.rope.freq_base"),
            rms_norm_eps=self._number("llama.attention.layer_norm_rms_epsilon"),
        )
        heads_fit = 0 < facts.n_kv_heads <= facts.n_heads and facts.hidden_size % facts.n_heads == 0
        if not heads_fit:
            raise SourceError(
                f"{self._path}: {facts.n_heads} heads, {facts.n_kv_heads} kv heads, hidden size {facts.hidden_size} "
                "do not fit together"
            )
        return facts

    def _tensor(self, name: str) -> ReaderTensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise SourceError(f"{self._path}: tensor {name} is missing")
        if tensor.tensor_type not in _READABLE:
            known = ", ".join(kind.name for kind in _READABLE)
            raise SourceError(f"{self._path}: {name} is {tensor.tensor_type.name}, this tool reads {known}")
        return tensor

    def _field(self, key: str) -> object:
        field = self._reader.get_field(key)
        if field is None:
            raise SourceError(f"{self._path}: field {key} is missing")
        value: object = field.contents()
        return value

    def _expect(self, key: str, expected: str) -> None:
        value = self._text(key)
        if value != expected:
            raise SourceError(f"{self._path}: {key} is {value!r:.60}, {expected!r} is expected")

    def _count(self, key: str) -> int:
        value = self._field(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise SourceError(f"{self._path}: {key} is {value!r:.60}, a whole number above 0 is expected")
        return value

    def _token_id(self, kind: str) -> int:
        key = f"tokenizer.ggml.{kind}_token_id"
        value = self._field(key)
        if not isinstance(value, int) or not 0 <= value < self.facts.vocab_size:
            raise SourceError(f"{self._path}: {key} is {value!r:.60}, an id below {self.facts.vocab_size} is expected")
        return value

    def _number(self, key: str) -> float:
        value = self._field(key)
        if not isinstance(value, float) or not value > 0:
            raise SourceError(f"{self._path}: {key} is {value!r:.60}, a number above 0 is expected")
        # The file holds a float32: the shortest decimal that names it is what was meant (1e-05, not 9.99999974e-06).
        return float(str(np.float32(value)))

    def _text(self, key: str) -> str:
        value = self._field(key)
        if not isinstance(value, str):
            raise SourceError(f"{self._path}: {key} is no text")
        return value

    def _texts(self, key: str) -> list[str]:
        value = self._field(key)
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise SourceError(f"{self._path}: {key} is no list of texts")
        return value

    def _counts(self, key: str) -> list[int]:
        value = self._field(key)
        if not isinstance(value, list) or not all(isinstance(count, int) for count in value):
            raise SourceError(f"{self._path}: {key} is no list of whole numbers")
        return value
