"""The files of a checkpoint that a store carries verbatim: configuration and tokenizer. Knows only their names."""

CONFIG_FILE = "config.json"

# Each with the length beyond which it is no such file.
SIDE_FILES_NBYTES_MAX = {
    CONFIG_FILE: 1 << 20,
    "generation_config.json": 1 << 20,
    "tokenizer.json": 64 << 20,
    "tokenizer_config.json": 16 << 20,
    "chat_template.jinja": 1 << 20,
    "special_tokens_map.json": 1 << 20,
}
