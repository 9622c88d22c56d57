"""The tokenizer of the source as Hugging Face's `tokenizers` and transformers read it. Pure: data in, documents out."""

from tools.demo_checkpoint.source import Vocabulary

# ggml's token types; a control token never comes out of plain text.
_CONTROL = 3


def tokenizer_document(vocabulary: Vocabulary) -> dict[str, object]:
    """Return tokenizer.json: byte-level BPE behind a splitter that makes every digit a token of its own."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _control_token(token_id, token)
            for token_id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.token_types, strict=True))
            if kind == _CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(vocabulary.tokens)},
            "merges": [merge.split(" ", 1) for merge in vocabulary.merges],
        },
    }


def tokenizer_config_document(vocabulary: Vocabulary, context_length: int) -> dict[str, object]:
    """Return tokenizer_config.json, which carries the chat template."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": vocabulary.tokens[vocabulary.bos_id],
        "eos_token": vocabulary.tokens[vocabulary.eos_id],
        "pad_token": vocabulary.tokens[vocabulary.padding_id],
        "unk_token": vocabulary.tokens[vocabulary.unknown_id],
        "model_max_length": context_length,
        "chat_template": vocabulary.chat_template,
    }


def generation_config_document(vocabulary: Vocabulary) -> dict[str, object]:
    """Return generation_config.json: where a text begins and ends."""
    return {
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": vocabulary.eos_id,
        "pad_token_id": vocabulary.padding_id,
    }


def _control_token(token_id: int, token: str) -> dict[str, object]:
    return {
        "id": token_id,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
