"""From text to token ids and back, and from a conversation to a prompt: the one door to tokenizers and jinja2.

Everything here comes from the store, so from whoever made the checkpoint: the template runs in jinja2's sandbox, and
whatever it raises becomes a TemplateError. Bounded are what it writes and what one number or one replacement in it can
ask for. Not bounded are how long it runs and what it piles up step by step (with ~, set, join, or in a loop): a
checkpoint that is made to can keep this process busy or use up its memory.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

import jinja2
import tokenizers
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runner.detokenizer import Detokenizer
from runner.errors import PromptInvalid, TemplateError, TokenizerInvalid

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"

_TEMPLATE_LENGTH_MAX = 1 << 20
_PROMPT_LENGTH_MAX = 1 << 24

# What makes a text or a list as long as a number says. No model's template was seen to use them.
_PADDING_METHODS = frozenset(
    {"center", "expandtabs", "format", "format_map", "ljust", "rjust", "to_bytes", "translate", "zfill"}
)
_PADDING_FILTERS = ("batch", "center", "format", "indent", "slice", "wordwrap")
_JSON_INDENT_MAX = 16

# What a template can raise beside jinja2's own errors: the sandbox runs Python's operators on the template's values.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class Tokenizer:
    """The store's tokenizer and chat template; `side_file` gives the store's files by name."""

    def __init__(self, side_file: Callable[[str], bytes | None]) -> None:
        data = side_file(TOKENIZER_FILE)
        if data is None:
            raise TokenizerInvalid(f"the store has no {TOKENIZER_FILE}")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # noqa: BLE001  # the package raises no narrower class
            raise TokenizerInvalid(f"{TOKENIZER_FILE}: {_one_line(error)}") from None
        # A tokenizer.json may ask for padding or a cut; a prompt is what was written.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._config = _load_config(side_file(TOKENIZER_CONFIG_FILE))
        self._template = _choose_template(side_file(CHAT_TEMPLATE_FILE), self._config)
        self._bos_id = self._special_id("bos_token")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text, begun with one BOS where the tokenizer says so, or of the text alone."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # The command line hands over bytes that are no UTF-8 as half characters.
            raise PromptInvalid(f"the prompt is no text: {error.reason} at character {error.start}") from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if not add_special_tokens or self._bos_id is None:
            return ids
        if ids[:2] == [self._bos_id, self._bos_id]:
            return ids[1:]
        if self._config.get("add_bos_token") is True and ids[:1] != [self._bos_id]:
            return [self._bos_id, *ids]
        return ids

    def encode_chat(self, prompt: str, *, system: str | None = None) -> list[int]:
        """Return the ids of a conversation that waits for its answer; the template writes BOS itself."""
        return self.encode(self.render_chat(prompt, system=system), add_special_tokens=False)

    def render_chat(self, prompt: str, *, system: str | None = None) -> str:
        """Return the text of a conversation that waits for its answer; raise TemplateError."""
        if self._template is None:
            raise TemplateError("the store has no chat template; --raw continues the prompt as it is")
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        special = {name: self._special_text(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        return _render(self._template, {"messages": messages, "add_generation_prompt": True, **special})

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of those ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def detokenizer(self, context: Sequence[int] = ()) -> Detokenizer:
        """Return what turns ids into text as they come; `context` are the ids whose text they continue."""
        return Detokenizer(self.decode, context)

    def _special_id(self, name: str) -> int | None:
        text = self._special_text(name)
        token_id: int | None = self._tokenizer.token_to_id(text) if text else None
        return token_id

    def _special_text(self, name: str) -> str:
        """Return a special token as tokenizer_config.json writes it, as a text or as an object; "" if it has none."""
        value = self._config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else ""


class _BoundedSandbox(ImmutableSandboxedEnvironment):
    """A sandbox in which no number and no replacement makes one text or list longer than a prompt."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        self.filters |= {"tojson": _to_json, "replace": _replace} | dict.fromkeys(_PADDING_FILTERS, _refuse_padding)
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now, "lipsum": _refuse_padding}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401  # jinja2's signature
        """Return the result for moderate operands; raise jinja2's SecurityError for others, powers, text % values."""
        if operator == "+" and not isinstance(left, int | float):
            reach = _reach(left) + _reach(right)
        else:
            reach = _reach(left) * _reach(right) if operator == "*" else 0
        is_refused = operator == "**" or (operator == "%" and isinstance(left, str | bytes))
        if is_refused or reach > _PROMPT_LENGTH_MAX:
            raise SecurityError(f"operator {operator} on operands that no prompt needs")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # noqa: ANN401  # jinja2's signature
        """Return whether a template may use that attribute: none that pads, formats or translates."""
        is_padding = isinstance(obj, str | bytes | int) and attr in _PADDING_METHODS
        return not is_padding and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:  # noqa: ANN401  # jinja2's signature
        """Return None: str.format is an attribute like others here, and refused."""

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # jinja2's signature
        """Return what the function returns; str.replace is bounded."""
        text = getattr(function, "__self__", None)
        if isinstance(text, str) and function.__name__ == "replace":
            return _replace(text, *args, **kwargs)
        return super().call(context, function, *args, **kwargs)


def _reach(operand: object) -> float:
    """Return by how much an operand multiplies another: a number by its value, a text or list by its length."""
    if isinstance(operand, int | float):
        return max(1.0, abs(operand))
    return float(max(1, len(operand))) if isinstance(operand, str | bytes | list | tuple) else 1.0


def _replace(text: object, old: str, new: str, count: int | None = None) -> str:
    """Return the text with `new` for `old`, also as jinja2's filter of that name; raise SecurityError if too long."""
    source = str(text)
    if source.count(old) * len(new) > _PROMPT_LENGTH_MAX:
        raise SecurityError(f"replace writes more than {_PROMPT_LENGTH_MAX} characters")
    return source.replace(old, new, -1 if count is None else count)


def _refuse_padding(*_: object, **__: object) -> str:
    raise SecurityError("a filter or function that pads, fills or formats: no prompt needs it")


def _render(source: str, values: dict[str, object]) -> str:
    try:
        return "".join(_bounded(_BoundedSandbox().from_string(source).generate(values)))
    except _TEMPLATE_FAULTS as error:
        raise TemplateError(f"chat template: {_one_line(error)}") from None


def _bounded(pieces: Iterator[str]) -> Iterator[str]:
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > _PROMPT_LENGTH_MAX:
            raise TemplateError(f"chat template: it writes more than {_PROMPT_LENGTH_MAX} characters")
        yield piece


def _refuse(message: str) -> str:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _to_json(value: object, indent: int | None = None) -> str:
    if isinstance(indent, int) and indent > _JSON_INDENT_MAX:
        raise SecurityError(f"tojson indents by at most {_JSON_INDENT_MAX}")
    # Not jinja2's own tojson, which escapes <, > and & for HTML: a prompt is no HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _load_config(data: bytes | None) -> dict[str, object]:
    if data is None:
        return {}
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TokenizerInvalid(f"{TOKENIZER_CONFIG_FILE}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise TokenizerInvalid(f"{TOKENIZER_CONFIG_FILE}: an object is expected, {type(config).__name__} came")
    return config


def _choose_template(file: bytes | None, config: dict[str, object]) -> str | None:
    """Return the chat template: of its own file, else of tokenizer_config.json (one, or the default of several)."""
    source: object = config.get("chat_template")
    if file is not None:
        source = file.decode(errors="replace")
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    if source is not None and (not isinstance(source, str) or len(source) > _TEMPLATE_LENGTH_MAX):
        raise TemplateError(f"chat template: a text of at most {_TEMPLATE_LENGTH_MAX} characters is expected")
    return source


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
