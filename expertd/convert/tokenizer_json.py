"""A sentencepiece model as the tokenizer.json that runners read: the same ids for the same text.

Byte-pair models, which all Mixtrals have. Their file lists pieces with scores; tokenizer.json wants pairs to merge in
order: every way to put a piece together from two others, the piece with the highest score first.
"""

import base64
import json
from collections.abc import Iterator, Mapping

from expertd.convert.errors import MalformedCheckpoint
from expertd.convert.sentencepiece_model import MODEL_FILE, Algorithm, Kind, Piece, SentencepieceModel

TOKENIZER_FILE = "tokenizer.json"

_SPACE = "▁"
_REMEDY = f"put the model's {TOKENIZER_FILE} beside it"
_IDS_MAX = 1 << 20
# Names under which a tokenizer's configuration says which tokens are special.
_SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token")

_Json = dict[str, object]


def tokenizer_json(model: SentencepieceModel, config: Mapping[str, object], added: Mapping[str, object]) -> bytes:
    """Return the file; raise MalformedCheckpoint for a model that is no byte-pair one.

    `config` is the checkpoint's tokenizer_config.json, `added` its added_tokens.json: token to id.
    """
    if model.algorithm != Algorithm.BPE:
        raise MalformedCheckpoint(f"{MODEL_FILE}: a {model.algorithm.name} model; byte-pair ones are read, {_REMEDY}")
    for piece in model.pieces:
        if piece.kind == Kind.USER_DEFINED and _SPACE in piece.text:
            raise MalformedCheckpoint(f"{MODEL_FILE}: piece {piece.text!r:.60} holds a space of its own; {_REMEDY}")
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(model, config, added),
        "normalizer": {"type": "Sequence", "normalizers": list(_normalizers(model, config))},
        "pre_tokenizer": _pre_tokenizer(model, config),
        "post_processor": _post_processor(model, config),
        "decoder": {"type": "Sequence", "decoders": list(_decoders(model))},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[model.unk_id].text,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece.text: index for index, piece in enumerate(model.pieces)},
            "merges": list(_merges(model.pieces)),
        },
    }
    return json.dumps(document, ensure_ascii=False).encode()


def default_config(model: SentencepieceModel) -> bytes:
    """Return a tokenizer_config.json for a checkpoint that has none: which tokens begin and end a text."""
    named = {"bos_token": model.bos_id, "eos_token": model.eos_id, "unk_token": model.unk_id}
    return json.dumps({key: text for key, index in named.items() if (text := _text(model, index))}).encode()


def _merges(pieces: tuple[Piece, ...]) -> Iterator[tuple[str, str]]:
    ids = {piece.text: index for index, piece in enumerate(pieces) if piece.kind in {Kind.NORMAL, Kind.UNUSED}}
    for index in sorted(ids.values(), key=lambda index: (-pieces[index].score, index)):
        text = pieces[index].text
        cuts = [(text[:at], text[at:]) for at in range(1, len(text))]
        pairs = [pair for pair in cuts if pair[0] in ids and pair[1] in ids]
        yield from sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))


def _normalizers(model: SentencepieceModel, config: Mapping[str, object]) -> Iterator[_Json]:
    if model.charsmap:
        yield {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.charsmap).decode()}
    if model.removes_extra_spaces:
        yield {"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""}
        yield {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    if _is_legacy(config):
        if model.adds_prefix:
            yield {"type": "Prepend", "prepend": _SPACE}
        yield {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}


def _pre_tokenizer(model: SentencepieceModel, config: Mapping[str, object]) -> _Json | None:
    if _is_legacy(config):
        return None
    scheme = "first" if model.adds_prefix else "never"
    return {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": scheme, "split": False}


def _decoders(model: SentencepieceModel) -> Iterator[_Json]:
    yield {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    yield {"type": "ByteFallback"}
    yield {"type": "Fuse"}
    if model.adds_prefix:
        yield {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _post_processor(model: SentencepieceModel, config: Mapping[str, object]) -> _Json:
    """Return the template that begins a text with BOS, unless the configuration says not to."""
    bos, eos = _text(model, model.bos_id), _text(model, model.eos_id)
    before = [bos] if bos and config.get("add_bos_token", True) is not False else []
    after = [eos] if eos and config.get("add_eos_token", False) is True else []
    ids = {bos: model.bos_id, eos: model.eos_id}

    def template(*sequences: str) -> list[_Json]:
        items: list[_Json] = []
        for type_id, name in enumerate(sequences):
            items += [{"SpecialToken": {"id": text, "type_id": type_id}} for text in before]
            items.append({"Sequence": {"id": name, "type_id": type_id}})
            items += [{"SpecialToken": {"id": text, "type_id": type_id}} for text in after]
        return items

    special = {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in (*before, *after)}
    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("A", "B"),
        "special_tokens": special,
    }


def _added_tokens(model: SentencepieceModel, config: Mapping[str, object], added: Mapping[str, object]) -> list[_Json]:
    """Return the tokens that are never put together from others: by id, the model's own and those added to it."""
    tokens: dict[int, _Json] = {}
    for index, piece in enumerate(model.pieces):
        if piece.kind in {Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED}:
            tokens[index] = _token(index, piece.text, is_special=piece.kind != Kind.USER_DEFINED)
    special = _special_texts(config)
    for text, value in added.items():
        tokens[_id(value)] = _token(_id(value), text, is_special=text in special)
    decoder = config.get("added_tokens_decoder")
    for key, item in decoder.items() if isinstance(decoder, dict) else ():
        if not isinstance(item, dict) or not isinstance(item.get("content"), str) or not key.isdecimal():
            raise MalformedCheckpoint(f"tokenizer_config.json: added_tokens_decoder: {key!r:.60}: a token is expected")
        flags = {flag: item[flag] for flag in ("lstrip", "rstrip", "single_word") if isinstance(item.get(flag), bool)}
        is_special = item.get("special") is True
        tokens[_id(int(key))] = _token(int(key), item["content"], is_special=is_special) | flags
    return [tokens[index] for index in sorted(tokens)]


def _token(index: int, text: str, *, is_special: bool) -> _Json:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text} | flags | {"special": is_special}


def _id(value: object) -> int:
    if type(value) is not int or not 0 <= value < _IDS_MAX:
        raise MalformedCheckpoint(f"added_tokens.json: a token's id is expected, {value!r:.60} came")
    return value


def _special_texts(config: Mapping[str, object]) -> set[str]:
    others = config.get("additional_special_tokens")
    values = [config.get(key) for key in _SPECIAL_KEYS] + (others if isinstance(others, list) else [])
    texts = [value.get("content") if isinstance(value, dict) else value for value in values]
    return {text for text in texts if isinstance(text, str)}


def _text(model: SentencepieceModel, index: int) -> str:
    return model.pieces[index].text if 0 <= index < len(model.pieces) else ""


def _is_legacy(config: Mapping[str, object]) -> bool:
    """Return whether a space is put before every stretch of text between special tokens, as Mixtral's own file does."""
    return config.get("legacy") is not False
