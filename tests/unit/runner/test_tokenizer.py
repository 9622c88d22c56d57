import json
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer as RawTokenizer

from runner.errors import PromptInvalid, TemplateError, TokenizerInvalid
from runner.tokenizer import Tokenizer
from tests.support.tokenizers import BOS, byte_fallback, byte_level, tokenizer_files

CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "[{{ message['role'] }}]{{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def open_tokenizer(raw: RawTokenizer, *, template_file: str | None = None, **config: object) -> Tokenizer:
    files = tokenizer_files(raw, **config)
    if template_file is not None:
        files["chat_template.jinja"] = template_file.encode()
    return Tokenizer(files.get)


def token_id(raw: RawTokenizer, text: str) -> int:
    found = raw.token_to_id(text)
    assert found is not None
    return found


def render(template: str) -> str:
    return open_tokenizer(byte_level(), chat_template=template).render_chat("hello")


def test_a_raw_prompt_gets_the_bos_of_the_post_processor_once() -> None:
    raw = byte_fallback()
    bos = raw.token_to_id(BOS)

    ids = open_tokenizer(raw, add_bos_token=True).encode("Once upon")

    assert ids == [bos, raw.token_to_id("▁Once"), raw.token_to_id("▁upon")]


def test_a_raw_prompt_gets_the_bos_that_the_configuration_asks_for() -> None:
    raw = byte_level()

    ids = open_tokenizer(raw, add_bos_token=True).encode("a")

    assert ids == [raw.token_to_id(BOS), raw.token_to_id("a")]


def test_a_bos_written_as_an_object_is_found() -> None:
    raw = byte_level()

    ids = open_tokenizer(raw, add_bos_token=True, bos_token={"content": BOS}).encode("a")

    assert ids == [raw.token_to_id(BOS), raw.token_to_id("a")]


def test_a_raw_prompt_gets_no_bos_where_nobody_asks_for_it() -> None:
    raw = byte_level()

    assert open_tokenizer(raw).encode("a") == [raw.token_to_id("a")]


def test_a_bos_that_the_prompt_itself_writes_is_not_doubled() -> None:
    raw = byte_fallback()

    ids = open_tokenizer(raw).encode(f"{BOS}Once")

    assert ids.count(token_id(raw, BOS)) == 1


def test_a_text_is_encoded_without_special_tokens_where_that_is_asked() -> None:
    raw = byte_fallback()

    ids = open_tokenizer(raw, add_bos_token=True).encode("Once", add_special_tokens=False)

    assert ids == [raw.token_to_id("▁Once")]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_a_templated_prompt_gets_no_second_bos(make: Callable[[], RawTokenizer]) -> None:
    raw = make()

    ids = open_tokenizer(raw, chat_template=CHAT, add_bos_token=True).encode_chat("hello")

    assert ids.count(token_id(raw, BOS)) == 1
    assert ids[0] == raw.token_to_id(BOS)


def test_a_template_that_writes_no_bos_gets_none() -> None:
    raw = byte_fallback()

    ids = open_tokenizer(raw, chat_template="{{ messages[0]['content'] }}", add_bos_token=True).encode_chat("Once")

    assert ids == [raw.token_to_id("▁Once")]


def test_a_system_message_stands_before_the_prompt() -> None:
    text = open_tokenizer(byte_level(), chat_template=CHAT).render_chat("hello", system="be brief")

    assert text == "<s>[system]be brief\n[user]hello\n[assistant]"


def test_the_template_file_goes_before_the_configuration() -> None:
    tokenizer = open_tokenizer(byte_level(), template_file="from the file", chat_template="from the configuration")

    assert tokenizer.render_chat("hello") == "from the file"


def test_the_default_of_several_templates_is_taken() -> None:
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]

    assert open_tokenizer(byte_level(), chat_template=templates).render_chat("hello") == "plain"


def test_blocks_are_trimmed_as_transformers_trims_them() -> None:
    assert render("{% if true %}\n  {% set x = 1 %}\nyes\n{% endif %}\n") == "yes\n"


def test_tojson_escapes_nothing_for_html() -> None:
    assert render("{{ {'a': '<é&>'} | tojson }}") == '{"a": "<é&>"}'


def test_a_store_without_a_template_names_the_way_out() -> None:
    with pytest.raises(TemplateError, match="no chat template; --raw"):
        open_tokenizer(byte_level()).render_chat("hello")


def test_what_the_template_refuses_is_said_in_its_words() -> None:
    with pytest.raises(TemplateError, match=r"^chat template: only one turn$"):
        render("{{ raise_exception('only\\none turn') }}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ messages.nothing.at_all }}",
        "{{ 1 / 0 }}",
        "{{ messages[99]['content'] }}",
        "{{ 'a' + 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 'a' * 100000000000 }}",
        "{{ [0] * 1000 * 100000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ 'a'.ljust(3000000000) | length }}",
        "{{ 'a'['ljust'](3000000000) | length }}",
        "{{ ('a' | attr('ljust'))(3000000000) | length }}",
        "{{ (1).to_bytes(3000000000, 'big') | length }}",
        "{{ '%2000000000d' % 1 }}",
        "{{ '{:2000000000d}'.format(1) }}",
        "{{ '%2000000000d' | format(1) }}",
        "{{ 'a' | center(3000000000) }}",
        "{{ 'a' | indent(3000000000, true) }}",
        "{{ 'a'['format']() }}",
        "{{ 'a' | map('center', 3000000000) | join }}",
        "{% set x = 'a' * 9999 %}{{ (x | attr('replace'))('a', x) | length }}",
        "{{ [0] | batch(3000000000, 0) | list }}",
        "{{ [0] | tojson(indent=3000000000) }}",
        "{% set x = 'a' * 9999 %}{{ x.replace('a', x) | length }}",
        "{% set x = 'a' * 9999 %}{{ x | replace('a', x) | length }}",
        "{% set x = [0] * 9999999 %}{{ (x + x) | length }}",
        "{{ range(1000000000) | list }}",
        "{% for i in range(99999) %}{% for j in range(9999) %}{{ 'a' * 9999 }}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'x' %}",
        "{{ '%d' % 'x' }}",
    ],
)
def test_a_hostile_or_broken_template_is_one_clear_line(template: str) -> None:
    with pytest.raises(TemplateError, match=r"^chat template: ") as raised:
        render(template)

    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ 'a' + 'b' ~ 1 }}", "ab1"),
        ("{{ 7 % 4 }}", "3"),
        ("{{ 99999999 + 1 }}", "100000000"),
        ("{{ 100000 % 99999 }}", "1"),
        ("{{ 'abab'.replace('b', 'c') }}", "acac"),
        ("{{ 'abab'.replace('b', 'c', 1) }}", "acab"),
        ("{{ 'abab' | replace('b', 'c', 1) }}", "acab"),
        ("{{ {'format': 'x'}.format }}", "x"),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% if false %}{{ 'a' | indent(2) }}{% endif %}b", "b"),
    ],
)
def test_what_templates_of_models_use_works(template: str, text: str) -> None:
    assert render(template) == text


def test_a_template_of_another_type_is_refused() -> None:
    with pytest.raises(TemplateError, match="a text of at most"):
        open_tokenizer(byte_level(), chat_template=7)


def test_a_store_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(TokenizerInvalid, match=r"no tokenizer\.json"):
        Tokenizer(dict[str, bytes]().get)


@pytest.mark.parametrize("data", [b"{}", b"\xff", b"[1"])
def test_a_damaged_tokenizer_is_one_clear_line(data: bytes) -> None:
    with pytest.raises(TokenizerInvalid, match=r"^tokenizer\.json: ") as raised:
        Tokenizer({"tokenizer.json": data}.get)

    assert "\n" not in str(raised.value)


def test_a_damaged_configuration_is_one_clear_line() -> None:
    files = tokenizer_files(byte_level()) | {"tokenizer_config.json": b"{"}

    with pytest.raises(TokenizerInvalid, match=r"^tokenizer_config\.json: not JSON"):
        Tokenizer(files.get)


def test_padding_and_truncation_of_the_file_are_left_out() -> None:
    raw = byte_level()
    raw.enable_truncation(2)
    raw.enable_padding(length=8)

    assert len(open_tokenizer(raw).encode("hello")) == 5


def test_a_prompt_that_is_no_text_is_refused() -> None:
    with pytest.raises(PromptInvalid, match="no text"):
        open_tokenizer(byte_level()).encode("a\udcff")


def test_special_tokens_are_left_out_of_the_text() -> None:
    raw = byte_level()

    assert open_tokenizer(raw).decode([token_id(raw, BOS), token_id(raw, "a")]) == "a"


def test_a_tokenizer_config_is_not_needed() -> None:
    files = {"tokenizer.json": byte_level().to_str().encode()}

    assert Tokenizer(files.get).decode(Tokenizer(files.get).encode(json.dumps("é"))) == '"\\u00e9"'
