"""Small sentencepiece models, trained by the real library: what a Mixtral's tokenizer.model is like."""

import io
from collections.abc import Iterable
from typing import Any

import sentencepiece


def train_model(texts: Iterable[str], **options: Any) -> bytes:  # noqa: ANN401  # the library's own
    """Return a model file as Mixtral's is made: byte pairs, bytes for what is unknown, text as it is."""
    out = io.BytesIO()
    defaults: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 700,
        "byte_fallback": True,
        "character_coverage": 0.9995,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=out, **defaults | options)
    return out.getvalue()


def ids_of(model: bytes, text: str) -> list[int]:
    """Return the ids that the real library gives a text."""
    ids: list[int] = sentencepiece.SentencePieceProcessor(model_proto=model).encode(text)
    return ids
