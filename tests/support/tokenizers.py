"""Small tokenizers of the two families that Mixtrals come with: a token a byte, so that characters are split."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

BOS, EOS = "<s>", "</s>"


def byte_level() -> Tokenizer:
    """Return a tokenizer as GPT-2 and SmolLM have it: bytes as visible characters, no BOS of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={text: index for index, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(BOS), AddedToken(EOS)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Return a tokenizer as Llama and Mixtral have it: words with ▁ for the space, bytes for what is unknown."""
    words = ["▁Once", "▁upon", "▁a", "▁time", "▁", "<unk>"]
    vocab = {text: index for index, text in enumerate([f"<0x{byte:02X}>" for byte in range(256)] + words)}
    letters = sorted(set("".join(words)) - {"▁"})
    vocab |= {letter: len(vocab) + index for index, letter in enumerate(letters)}
    # Every word is merged from its letters, left to right.
    merges = []
    for word in words[:4]:
        for end in range(1, len(word)):
            pair = (word[:end], word[end])
            vocab.setdefault(word[: end + 1], len(vocab))
            if pair not in merges:
                merges.append(pair)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>")  # noqa: S106  # a model's token
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(BOS), AddedToken(EOS)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer, **config: object) -> dict[str, bytes]:
    """Return the files of a store: the tokenizer's own, and its configuration with those keys."""
    special: dict[str, object] = {"bos_token": BOS, "eos_token": EOS}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(special | config).encode(),
    }
