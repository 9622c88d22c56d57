"""From a prompt to a stream of text, and the report of what it took. Knows no command line and no files.

The thread that iterates computes; whoever stops iterating has what was generated until then in report().
"""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic

from quant.library import has_c_library
from runner.config import RunnerConfig
from runner.engine import Engine
from runner.errors import ContextFull
from runner.experts.counters import Counters, counted_since
from runner.metrics import Memory, process_age_s, read_memory

STOPPED = "stopped"
EOS = "eos"
LENGTH = "max_new_tokens"
CONTEXT = "context"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to answer: a message for the chat template, with a system message perhaps, or a text to continue (raw)."""

    text: str
    system: str | None = None
    is_raw: bool = False


@dataclass(frozen=True, slots=True)
class Startup:
    """Where the time before the prefill went, in seconds: the interpreter's start and all imports, the attachment."""

    imports_s: float
    attach_s: float
    dense_weights_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """What one generation did and took; times count from the process's start where they say so."""

    finish_reason: str
    n_prompt_tokens: int
    n_tokens: int
    seed: int | None
    time_to_first_token_s: float | None  # since the process's start
    imports_s: float
    attach_s: float
    dense_weights_s: float
    tokenizer_s: float
    prefill_s: float | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    has_c_kernels: bool
    memory: Memory
    expert_cache: Counters | None  # of this generation; None where experts are computed in place


class Generation:
    """One answer being generated: iterate over it for the pieces of its text, then ask for the report."""

    def __init__(self, engine: Engine, prompt: Prompt, settings: RunnerConfig, startup: Startup) -> None:
        self._startup = startup
        self._settings = settings
        self._engine = engine
        started = monotonic()
        tokenizer = engine.tokenizer
        self._prompt_ids = (
            tokenizer.encode(prompt.text) if prompt.is_raw else tokenizer.encode_chat(prompt.text, system=prompt.system)
        )
        # An answer begins afresh; what continues a text continues its last word too.
        self._detokenizer = tokenizer.detokenizer(self._prompt_ids if prompt.is_raw else ())
        self._tokenizer_s = monotonic() - started
        is_random = settings.temperature > 0
        self._seed = settings.seed if settings.seed is not None or not is_random else secrets.randbits(32)
        self.token_ids: list[int] = []
        self._finish_reason = STOPPED
        self._first_token_age_s: float | None = None
        self._prefill_s: float | None = None
        self._decode_s = 0.0
        self._counted_before = engine.counters

    def __iter__(self) -> Iterator[str]:
        """Yield the text as it becomes whole; what is left at the end, however it ends, comes from flush()."""
        settings = self._settings
        tokens = self._engine.generate(
            self._prompt_ids,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=self._seed,
        )
        for token_id in self._timed(tokens):
            self.token_ids.append(token_id)
            piece = self._detokenizer.push(token_id)
            if piece:
                yield piece
        last = self._detokenizer.flush()
        if last:
            yield last

    def report(self) -> Report:
        """Return what was done and what it took until now."""
        n_decoded = len(self.token_ids) - 1
        return Report(
            finish_reason=self._finish_reason,
            n_prompt_tokens=len(self._prompt_ids),
            n_tokens=len(self.token_ids),
            seed=self._seed,
            time_to_first_token_s=self._first_token_age_s,
            imports_s=self._startup.imports_s,
            attach_s=self._startup.attach_s,
            dense_weights_s=self._startup.dense_weights_s,
            tokenizer_s=self._tokenizer_s,
            prefill_s=self._prefill_s,
            prefill_tokens_per_s=len(self._prompt_ids) / self._prefill_s if self._prefill_s else None,
            decode_tokens_per_s=n_decoded / self._decode_s if n_decoded > 0 and self._decode_s else None,
            has_c_kernels=has_c_library(),
            memory=read_memory(),
            expert_cache=counted_since(self._counted_before, self._engine.counters),
        )

    def _timed(self, tokens: Iterator[int]) -> Iterator[int]:
        """Pass the tokens on; note when each came and why they ended."""
        started = monotonic()
        try:
            for token_id in tokens:
                now = monotonic()
                if self._prefill_s is None:
                    self._prefill_s = now - started
                    self._first_token_age_s = process_age_s()
                else:
                    self._decode_s += now - started
                yield token_id
                started = monotonic()
        except ContextFull:
            self._finish_reason = CONTEXT
            return
        self._finish_reason = LENGTH if len(self.token_ids) == self._settings.max_new_tokens else EOS
