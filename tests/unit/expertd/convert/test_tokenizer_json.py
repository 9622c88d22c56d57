"""A sentencepiece model turned into a tokenizer.json gives the same ids: the real libraries are asked on both sides."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from expertd.convert.errors import MalformedCheckpoint
from expertd.convert.sentencepiece_model import Kind, read_sentencepiece_model
from expertd.convert.side_files import read_side_files
from expertd.convert.tokenizer_json import tokenizer_json
from tests.support.sentencepiece_models import ids_of, train_model

TEXTS = [line for line in (Path(__file__).parents[4] / "README.md").read_text().splitlines() if line.strip()] * 4
SAMPLES = [
    "Why is the sky blue?",
    " leading and trailing ",
    "two  spaces,   three, \t a tab\nand a line",
    "1234567890 3.14159",
    "Grüße aus Köln, 東京 и Москва 🙂🙃",
    "def f(x):\n    return x + 1\n",
    "",
    "a",
    " ",
    "expertd quantize mistralai/Mixtral-8x7B-Instruct-v0.1",
]


@pytest.fixture(scope="module")
def model_file() -> bytes:
    return train_model(TEXTS)


def converted(model_file: bytes, **config: object) -> Tokenizer:
    return Tokenizer.from_buffer(tokenizer_json(read_sentencepiece_model(model_file), config, {}))


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


@pytest.mark.parametrize("text", [*SAMPLES, *TEXTS[:40]])
def test_text_has_the_ids_that_the_real_library_gives_it(model_file: bytes, text: str) -> None:
    assert ids(converted(model_file), text) == ids_of(model_file, text)


def test_any_text_has_the_ids_that_the_real_library_gives_it(model_file: bytes) -> None:
    tokenizer = converted(model_file)

    # Control characters end text for neither, but special tokens written out are tokens for one of them alone.
    @given(st.text(st.characters(codec="utf-8", exclude_characters="<\0▁"), max_size=40))
    def agree(text: str) -> None:
        assert ids(tokenizer, text) == ids_of(model_file, text)

    agree()


@pytest.mark.parametrize("text", [text for text in SAMPLES if text])
def test_ids_become_the_text_again(model_file: bytes, text: str) -> None:
    tokenizer = converted(model_file)

    assert tokenizer.decode(ids(tokenizer, text)) == text


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    ],
)
def test_what_a_model_does_to_text_first_is_done(options: dict[str, object]) -> None:
    model_file = train_model(TEXTS, **options)
    tokenizer = converted(model_file)

    for text in [*SAMPLES, "ﬁne ① Ｆｕｌｌ"]:
        assert ids(tokenizer, text) == ids_of(model_file, text), text


def test_a_text_begins_with_bos_and_ends_with_eos_where_the_configuration_says_so(model_file: bytes) -> None:
    by_default = converted(model_file).encode("a").ids
    without = converted(model_file, add_bos_token=False).encode("a").ids
    with_both = converted(model_file, add_eos_token=True).encode("a").ids

    assert by_default == [1, *without]
    assert with_both == [1, *without, 2]


def test_without_legacy_a_space_is_put_before_the_whole_text_alone(model_file: bytes) -> None:
    legacy, not_legacy = converted(model_file), converted(model_file, legacy=False)

    assert ids(not_legacy, "a b") == ids(legacy, "a b") == ids_of(model_file, "a b")
    assert ids(not_legacy, "a</s>b") != ids(legacy, "a</s>b")


def test_pieces_that_users_defined_are_one_token_wherever_they_stand() -> None:
    model_file = train_model(TEXTS, user_defined_symbols=["<tool>", "[INST]"])

    # At a text's beginning the real library puts a space before the piece, the tokenizers of all models do not.
    for text in ("call<tool>now", "then [INST] hello [INST]"):
        assert ids(converted(model_file, legacy=False), text) == ids_of(model_file, text)


def test_tokens_that_a_fine_tune_added_are_single_and_special_where_it_says_so(model_file: bytes) -> None:
    model = read_sentencepiece_model(model_file)
    n = len(model.pieces)
    config = {"eos_token": "<|im_end|>"}

    tokenizer = Tokenizer.from_buffer(tokenizer_json(model, config, {"<|im_start|>": n, "<|im_end|>": n + 1}))

    assert ids(tokenizer, "<|im_start|>") == [n]
    assert tokenizer.decode([n, n + 1], skip_special_tokens=True) == "<|im_start|>"


def test_a_decoder_of_added_tokens_goes_before_the_list(model_file: bytes) -> None:
    model = read_sentencepiece_model(model_file)
    n = len(model.pieces)
    config = {"added_tokens_decoder": {str(n): {"content": "<|end|>", "special": True, "lstrip": True}}}

    document = json.loads(tokenizer_json(model, config, {"<|end|>": n}))

    assert document["added_tokens"][-1] == {
        "id": n,
        "content": "<|end|>",
        "single_word": False,
        "lstrip": True,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def test_every_kind_of_piece_is_read(model_file: bytes) -> None:
    model = read_sentencepiece_model(model_file)

    kinds = [piece.kind for piece in model.pieces]

    assert kinds[:3] == [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL]
    assert kinds.count(Kind.BYTE) == 256
    assert [piece.text for piece in model.pieces[:4]] == ["<unk>", "<s>", "</s>", "<0x00>"]


def test_a_model_of_another_algorithm_is_refused_with_the_remedy() -> None:
    model_file = train_model(TEXTS, model_type="unigram", vocab_size=500)

    with pytest.raises(MalformedCheckpoint) as refusal:
        converted(model_file)

    assert str(refusal.value) == (
        "tokenizer.model: a UNIGRAM model; byte-pair ones are read, put the model's tokenizer.json beside it"
    )


def refusal_of(data: bytes) -> str | None:
    try:
        read_sentencepiece_model(data)
    except MalformedCheckpoint as error:
        return str(error)
    return None


@given(st.binary(max_size=200))
def test_junk_is_refused_in_a_line(data: bytes) -> None:
    line = refusal_of(b"\n" + data)

    assert line is None or (line.startswith("tokenizer.model: no sentencepiece model (") and "\n" not in line)


def test_a_file_that_is_cut_is_refused_or_has_fewer_pieces(model_file: bytes) -> None:
    lines = [refusal_of(model_file[:end]) for end in range(400)]

    assert lines[0] == "tokenizer.model: no sentencepiece model (it has no pieces)"
    assert sum(line is not None for line in lines) > 350


def side_files(files: dict[str, bytes]) -> dict[str, bytes]:
    return read_side_files(frozenset(files), lambda name, _: files[name])


def test_a_checkpoint_with_a_model_alone_gets_the_files_that_runners_read(model_file: bytes) -> None:
    files = side_files({"config.json": b"{}", "tokenizer.model": model_file})

    assert list(files) == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    assert json.loads(files["tokenizer_config.json"]) == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert Tokenizer.from_buffer(files["tokenizer.json"]).encode("a").ids[0] == 1


def test_a_checkpoints_own_tokenizer_json_goes_before_its_model(model_file: bytes) -> None:
    files = side_files({"config.json": b"{}", "tokenizer.json": b"{}", "tokenizer.model": model_file})

    assert files == {"config.json": b"{}", "tokenizer.json": b"{}"}
