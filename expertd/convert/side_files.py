"""The files of a checkpoint that a store carries: configuration and tokenizer, verbatim; a sentencepiece model becomes
the tokenizer.json that runners read. Knows no weights.
"""

from collections.abc import Callable
from typing import Final

from expertd.convert.json_file import parse_object
from expertd.convert.sentencepiece_model import MODEL_FILE, read_sentencepiece_model
from expertd.convert.tokenizer_json import TOKENIZER_FILE, default_config, tokenizer_json

CONFIG_FILE = "config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

# Each with the length beyond which it is no such file.
SIDE_FILES_NBYTES_MAX = {
    CONFIG_FILE: 1 << 20,
    "generation_config.json": 1 << 20,
    TOKENIZER_FILE: 64 << 20,
    TOKENIZER_CONFIG_FILE: 16 << 20,
    "chat_template.jinja": 1 << 20,
    "special_tokens_map.json": 1 << 20,
}
_ADDED_TOKENS_FILE: Final = "added_tokens.json"
_MODEL_NBYTES_MAX: Final = 64 << 20
_ADDED_TOKENS_NBYTES_MAX: Final = 1 << 20


def read_side_files(names: frozenset[str], read: Callable[[str, int], bytes]) -> dict[str, bytes]:
    """Return the side files of a store; `read` gives a file of a checkpoint. Raise MalformedCheckpoint."""
    files = {name: read(name, nbytes_max) for name, nbytes_max in SIDE_FILES_NBYTES_MAX.items() if name in names}
    if TOKENIZER_FILE not in files and MODEL_FILE in names:
        added = read(_ADDED_TOKENS_FILE, _ADDED_TOKENS_NBYTES_MAX) if _ADDED_TOKENS_FILE in names else b"{}"
        files |= _from_sentencepiece(read(MODEL_FILE, _MODEL_NBYTES_MAX), files.get(TOKENIZER_CONFIG_FILE), added)
    return {name: files[name] for name in SIDE_FILES_NBYTES_MAX if name in files}


def _from_sentencepiece(model_file: bytes, config_file: bytes | None, added_file: bytes) -> dict[str, bytes]:
    model = read_sentencepiece_model(model_file)
    config_file = default_config(model) if config_file is None else config_file
    config = parse_object(config_file, TOKENIZER_CONFIG_FILE)
    added = parse_object(added_file, _ADDED_TOKENS_FILE)
    return {TOKENIZER_FILE: tokenizer_json(model, config, added), TOKENIZER_CONFIG_FILE: config_file}
