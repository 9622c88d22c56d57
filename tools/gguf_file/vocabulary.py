"""The tokenizer of a checkpoint as llama.cpp reads it: byte-level BPE of the SmolLM family. Pure.

llama.cpp knows a tokenizer's splitting of text by name only; a tokenizer that splits otherwise is refused.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from gguf import GGUFWriter, TokenType

from tools.gguf_file.errors import SourceInvalid

_MODEL = "gpt2"
_PRE_TOKENIZER = "smollm"
NO_VOCABULARY = "no_vocab"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens by id, their types, and the merges in order."""

    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    merges: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _AddedToken:
    """A token that stands beside the model's own vocabulary."""

    id: int
    content: str
    is_special: bool


def read_vocabulary(tokenizer: Mapping[str, object], vocab_size: int) -> Vocabulary:
    """Return the vocabulary of a parsed tokenizer.json, filled up to vocab_size; raise SourceInvalid."""
    _check_splitting(tokenizer.get("pre_tokenizer"))
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise SourceInvalid("tokenizer.json: its model is no BPE; llama.cpp would split text otherwise")
    ids: dict[str, int] = dict(model["vocab"])
    added = _added(tokenizer)
    ids |= {token.content: token.id for token in added}
    control = {token.content for token in added if token.is_special}
    by_id = {token_id: token for token, token_id in ids.items()}
    if len(by_id) != len(ids) or max(by_id) >= vocab_size:
        raise SourceInvalid(f"tokenizer.json: token ids are expected to be different and below {vocab_size}")
    tokens = tuple(by_id.get(token_id, f"[PAD{token_id}]") for token_id in range(vocab_size))
    return Vocabulary(
        tokens,
        tuple(_type(token, is_used=token_id in by_id, control=control) for token_id, token in enumerate(tokens)),
        tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]),
    )


def byte_vocabulary(vocab_size: int) -> Vocabulary:
    """Return a vocabulary whose id of a byte is its value, filled up to vocab_size; raise SourceInvalid.

    llama.cpp wants a merge: two zero bytes, which no text has, are one token more.
    """
    zero = _byte_character(0)
    used = (*(_byte_character(byte) for byte in range(256)), zero + zero)
    if vocab_size < len(used):
        raise SourceInvalid(f"a vocabulary of {vocab_size} tokens: at least {len(used)} are expected, one a byte")
    n_unused = vocab_size - len(used)
    tokens = (*used, *(f"[PAD{token_id}]" for token_id in range(len(used), vocab_size)))
    types = (TokenType.NORMAL,) * len(used) + (TokenType.UNUSED,) * n_unused
    return Vocabulary(tokens, types, (f"{zero} {zero}",))


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, special: Mapping[str, int]) -> None:
    """Add the tokenizer's keys; special are the ids of bos, eos, pad and unk that there are."""
    writer.add_tokenizer_model(_MODEL)
    writer.add_tokenizer_pre(_PRE_TOKENIZER)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    add_id = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "pad": writer.add_pad_token_id,
        "unk": writer.add_unk_token_id,
    }
    for name, token_id in special.items():
        add_id[name](token_id)
    writer.add_add_bos_token(False)  # noqa: FBT003  # it takes no keyword


def special_ids(vocabulary: Vocabulary, tokenizer_config: Mapping[str, object]) -> dict[str, int]:
    """Return the ids of bos, eos, pad and unk, as far as tokenizer_config.json names tokens of the vocabulary."""
    ids = {token: token_id for token_id, token in enumerate(vocabulary.tokens)}
    found = {}
    for name in ("bos", "eos", "pad", "unk"):
        token = tokenizer_config.get(f"{name}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and content in ids:
            found[name] = ids[content]
    return found


def _byte_character(byte: int) -> str:
    """Return the character that stands for a byte in byte-level BPE: itself where it is visible."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in visible:
        return chr(byte)
    return chr(0x100 + byte - sum(other < byte for other in visible))


def _check_splitting(pre_tokenizer: object) -> None:
    """Raise SourceInvalid unless digits are split one by one and then words as GPT-2 does."""
    steps = pre_tokenizer.get("pretokenizers") if isinstance(pre_tokenizer, dict) else None
    if isinstance(steps, list) and len(steps) == 2 and all(isinstance(step, dict) for step in steps):
        digits, byte_level = steps
        is_smollm = (
            (digits.get("type"), digits.get("individual_digits")) == ("Digits", True)
            and (byte_level.get("type"), byte_level.get("use_regex", True)) == ("ByteLevel", True)
            and not byte_level.get("add_prefix_space", True)
        )
        if is_smollm:
            return
    raise SourceInvalid(
        "tokenizer.json: only the splitting of the SmolLM family (each digit by itself, then GPT-2's words) is "
        "written, which is what the demo's checkpoint has"
    )


def _added(tokenizer: Mapping[str, object]) -> list[_AddedToken]:
    added = tokenizer.get("added_tokens", [])
    if not isinstance(added, list):
        raise SourceInvalid("tokenizer.json: added_tokens: a list is expected")
    return [_AddedToken(item["id"], item["content"], item["special"]) for item in added]


def _type(token: str, *, is_used: bool, control: Collection[str]) -> TokenType:
    if not is_used:
        return TokenType.UNUSED
    return TokenType.CONTROL if token in control else TokenType.NORMAL
