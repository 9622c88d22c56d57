from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer

from runner.tokenizer import Tokenizer
from tests.support.tokenizers import byte_fallback, byte_level, tokenizer_files

FAMILIES = {"byte level": Tokenizer(tokenizer_files(byte_level()).get)}
FAMILIES["byte fallback"] = Tokenizer(tokenizer_files(byte_fallback()).get)


def stream(tokenizer: Tokenizer, token_ids: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    detokenizer = tokenizer.detokenizer(context)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["a 😀 b", "👨‍👩‍👧‍👦", "né日本", "😀" * 20])
def test_a_character_of_several_tokens_comes_whole(family: str, text: str) -> None:
    tokenizer = FAMILIES[family]

    pieces = stream(tokenizer, tokenizer.encode(text, add_special_tokens=False))

    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_character_cut_at_the_end_is_replaced(family: str) -> None:
    tokenizer = FAMILIES[family]
    token_ids = tokenizer.encode("a😀", add_special_tokens=False)[:-1]

    *pieces, last = stream(tokenizer, token_ids)

    assert "\ufffd" not in "".join(pieces)
    assert last.strip("\ufffd") == ""
    assert last


def test_a_text_that_goes_on_keeps_the_space_of_its_first_word() -> None:
    tokenizer = FAMILIES["byte fallback"]
    once, upon = tokenizer.encode("Once upon", add_special_tokens=False)

    assert stream(tokenizer, [upon], context=[once]) == [" upon", ""]


def test_an_answer_begins_without_a_space() -> None:
    tokenizer = FAMILIES["byte fallback"]
    once, upon = tokenizer.encode("Once upon", add_special_tokens=False)

    assert stream(tokenizer, [once, upon]) == ["Once", " upon", ""]


def test_a_special_token_between_words_takes_no_space_away() -> None:
    tokenizer = FAMILIES["byte fallback"]
    bos, once, upon = tokenizer.encode("Once upon")

    assert stream(tokenizer, [once, bos, upon]) == ["Once", "", " upon", ""]


@given(st.text(max_size=40))
def test_the_pieces_of_any_text_make_the_text(text: str) -> None:
    tokenizer = FAMILIES["byte level"]
    text = text.encode(errors="replace").decode()

    assert "".join(stream(tokenizer, tokenizer.encode(text, add_special_tokens=False))) == text


@given(st.binary(max_size=60))
def test_bytes_that_are_no_text_are_let_out_in_the_end(data: bytes) -> None:
    tokenizer = FAMILIES["byte level"]
    letters = bytes_to_letters(byte_level())

    pieces = stream(tokenizer, [letters(byte) for byte in data])

    assert all(piece.isprintable() or piece for piece in pieces if piece)
    if data:
        assert "".join(pieces)


def test_the_cost_of_a_token_does_not_grow() -> None:
    tokenizer = FAMILIES["byte level"]
    lengths: list[int] = []

    def decode(token_ids: Sequence[int]) -> str:
        lengths.append(len(token_ids))
        return tokenizer.decode(token_ids)

    from runner.detokenizer import Detokenizer

    detokenizer = Detokenizer(decode)
    invalid = bytes_to_letters(byte_level())(0xFF)
    for token_id in [*tokenizer.encode("word " * 100), *[invalid] * 500]:
        detokenizer.push(token_id)

    assert max(lengths) <= 32


def bytes_to_letters(raw: RawTokenizer) -> Callable[[int], int]:
    """Return what gives the token id of one byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}

    def token_id(byte: int) -> int:
        found = raw.token_to_id(letters[byte])
        assert found is not None
        return found

    return token_id
