"""From token ids to text as it comes: whole characters only, at a cost per token that does not grow.

Knows no tokenizer but its decode function.

The text of a token depends on its neighbours (a character may be several tokens, a word piece loses its space at the
start), so what is new is what the last tokens decode to beyond what those before them did.
"""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
# An unfinished character is at most three bytes; a run this long without a whole one is no text, and is let out.
_HELD_TOKENS_MAX = 16


class Detokenizer:
    """The text of one growing sequence. `context` are the ids before it, where it continues their text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._shown = list(context)[-_HELD_TOKENS_MAX:]  # the last ids whose text is out
        self._held: list[int] = []  # ids whose text is not

    def push(self, token_id: int) -> str:
        """Take one more token and return the text that became whole by it, perhaps none."""
        self._held.append(token_id)
        text = self._new_text()
        if text.endswith(_REPLACEMENT) and len(self._held) < _HELD_TOKENS_MAX:
            return ""
        return self._let_out(text)

    def flush(self) -> str:
        """Return what is still held back: at the end, an unfinished character is a replacement character."""
        return self._let_out(self._new_text()) if self._held else ""

    def _new_text(self) -> str:
        shown = self._decode(self._shown) if self._shown else ""
        return self._decode(self._shown + self._held)[len(shown) :]

    def _let_out(self, text: str) -> str:
        # Tokens without text (special ones) are forgotten, so that the next still sees its neighbour's.
        if text:
            self._shown = self._held
        self._held = []
        return text
