"""The Python interface: an open store, ready to compute. Owns the model, the tokenizer and the attachment to the store.

One engine is used from one thread. Whatever is attached is detached by close(), which the `with` statement calls.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from operator import index
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from protocol.fault_points import FaultPoint, reached
from quant.workspace import Workspace
from runner.config import RunnerConfig
from runner.devices import choose_device
from runner.devices.cpu import set_threads
from runner.errors import PromptInvalid, PromptTooLong, RunnerError, StoreInvalid
from runner.experts.counters import Counters
from runner.models.computation import Computation
from runner.models.mixtral import LayerObserver, Piece, Routing
from runner.models.mixtral_config import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    MixtralConfig,
    check_experts,
    read_mixtral_config,
)
from runner.models.model import Model
from runner.models.opening import CachePlan, open_model
from runner.rounds import plan_rounds
from runner.sampling import Sampling, sample
from runner.sequence import Sequence
from runner.store_view import StoreView
from runner.tokenizer import Tokenizer


def open_engine(
    store: str | Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    exact: bool = False,
    context: int = 4096,
    prefill_chunk: int = 512,
    autostart: bool = True,
    cache_experts: int | None = None,
    device_memory: int | None = None,
    prefetch_depth: int = 1,
    prefetch_experts: int = 2,
) -> "Engine":
    """Attach to a store through expertd and return the engine that computes with it; raise RunnerError.

    store           the directory that `expertd quantize` wrote
    device          "auto", "cpu", "cuda", "cuda:1", or "link:12GB/s": a stand-in accelerator behind such a link
    threads         None: one for each physical core this process may use. torch's thread count is the process's.
    exact           activations and kv_cache in fp32: the float reference's results, two to four times slower
    context         the most tokens a sequence may have
    prefill_chunk   how many tokens are computed at once
    autostart       start expertd if none runs; it stays, with the store in memory
    cache_experts   on an accelerator: how many experts of each layer it keeps
    device_memory   instead of that: how many bytes may be used there
    prefetch_depth, prefetch_experts    how many layers ahead, and how many experts of each, are foreseen

        with runner.open_engine("mixtral-4bit") as engine:
            prompt = engine.tokenizer.encode("Once upon a time")
            for token_id in engine.generate(prompt, max_new_tokens=20): ...
    """
    settings = RunnerConfig(
        device=device,
        threads=threads,
        exact=exact,
        context=context,
        prefill_chunk=prefill_chunk,
        autostart=autostart,
        cache_experts=cache_experts,
        device_memory=device_memory,
        prefetch_depth=prefetch_depth,
        prefetch_experts=prefetch_experts,
    )
    return open_configured(Path(store), settings)


def open_configured(store_dir: Path, settings: RunnerConfig, cache_plan: CachePlan | None = None) -> "Engine":
    """Attach to a store with those options and return its engine; raise RunnerError."""
    choose_device(settings.device)
    from runner.client import attach

    with ExitStack() as guard:
        attachment = guard.enter_context(ExitStack())
        store = attachment.enter_context(attach(store_dir, settings))
        engine = Engine(store, settings, attachment, cache_plan, tend=store.tend)
        guard.pop_all()
    return engine


class Engine:
    """A model over an attached store. `attachment` is closed with the engine, `tend` told the time before each step."""

    def __init__(
        self,
        store: StoreView,
        settings: RunnerConfig,
        attachment: ExitStack | None = None,
        cache_plan: CachePlan | None = None,
        *,
        tend: Callable[[float], None] = lambda _now: None,
    ) -> None:
        device = choose_device(settings.device)
        self.settings = settings
        self._tend = tend
        self.n_threads = set_threads(settings.threads)
        self._store: StoreView | None = store
        started = monotonic()
        self.config = _read_config(store)
        check_experts(store.manifest, self.config)
        with ExitStack() as opening:
            self._workspace = opening.enter_context(Workspace(self.n_threads))
            computation = Computation(store, self.config, settings, device, self._workspace)
            opened = open_model(computation, opening, cache_plan)
            computing = opening.pop_all()
        self._model: Model | None = opened.model
        self._new_kv_cache = opened.new_kv_cache
        self._cache = opened.cache
        self.planned_nbytes = opened.planned_nbytes
        self.dense_weights_s = monotonic() - started
        self._owned = ExitStack()
        if attachment is not None:
            self._owned.enter_context(attachment)
        # Closed before the attachment: what computes may still read the store.
        self._owned.enter_context(computing)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model and detach from the store; a closed engine computes no more."""
        self._model = None
        self._cache = None
        self._store = None
        self._owned.close()

    @property
    def store(self) -> StoreView:
        """The attached store; raise RunnerError if the engine is closed."""
        if self._store is None:
            raise RunnerError("the engine is closed")
        return self._store

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The store's tokenizer; raise TokenizerInvalid."""
        return Tokenizer(self.store.side_file)

    def new_sequence(self, context: int | None = None) -> Sequence:
        """Return an empty sequence with room for `context` tokens, or for as many as the engine's options say.

        Raise ConfigInvalid for a context that cannot be, OutOfMemory for one that does not fit.
        """
        settings = self.settings if context is None else replace(self.settings, context=context)
        return Sequence(self._new_kv_cache(settings.context))

    def step(self, sequences: Iterable[Sequence]) -> Tensor:
        """Compute each sequence's pending tokens, at least one; return the logits behind the last, fp32 [n, vocab]."""
        return torch.cat([logits[-1:] for logits in self._compute(list(sequences), all_logits=False)])

    def logits(self, token_ids: Iterable[int]) -> Tensor:
        """Return the logits behind every token of a sequence of its own, fp32 [T, vocab]; raise RunnerError."""
        sequence = self._prompted(token_ids, fits=True)
        return self._compute([sequence], all_logits=True)[0]

    def generate(
        self,
        token_ids: Iterable[int],
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[int]:
        """Return an iterator over the ids of the tokens that follow; it ends before an end-of-sequence token.

        Temperature 0 is greedy; seed None draws differently each time. Raise RunnerError for a prompt or an option
        that cannot be; iterating raises ContextFull behind the last token that had room.
        """
        checked = RunnerConfig(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
        sampling = Sampling(checked.temperature, checked.top_k, checked.top_p)
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return self._continue(self._prompted(token_ids), max_new_tokens, sampling, generator)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Keep the threads awake between steps that follow each other closely; a generation does so by itself."""
        with self._workspace.awake():
            yield

    @property
    def products_s(self) -> float:
        """The seconds spent in matrix products on the CPU so far; what else a step takes is outside of them."""
        return self._workspace.products_s

    @property
    def counters(self) -> Counters | None:
        """What the expert cache counted until now; None where experts are computed in place."""
        return None if self._cache is None else self._cache.counters

    @property
    def gates(self) -> list[Callable[[Tensor], Tensor]]:
        """Each layer's gate with its norm: states, fp32 [T, H] → logits, fp32 [T, n_experts]."""
        return [partial(self._opened_model().gate_logits, layer) for layer in range(self.config.n_layers)]

    @contextmanager
    def observed_by(self, observer: LayerObserver) -> Iterator[None]:
        """Let the observer see every layer of every step inside the `with`."""
        model = self._opened_model()
        model.observer = observer
        try:
            yield
        finally:
            model.observer = None

    @contextmanager
    def routed_by(self, routing: Routing) -> Iterator[None]:
        """Let a recorded routing choose, and guess, in the gates' place inside the `with`."""
        model = self._opened_model()
        ahead = model.ahead
        model.routing, model.ahead = routing, None if ahead is None else routing
        try:
            yield
        finally:
            model.routing, model.ahead = None, ahead

    def _continue(
        self, sequence: Sequence, max_new_tokens: int, sampling: Sampling, generator: torch.Generator
    ) -> Iterator[int]:
        with self.awake():
            for n_tokens in range(1, max_new_tokens + 1):
                token_id = sample(self.step([sequence])[0], sampling, generator)
                reached(FaultPoint.RUNNER_TOKEN_CHOSEN)
                if token_id in self.config.eos_token_ids:
                    return
                yield token_id
                if n_tokens < max_new_tokens:
                    sequence.append([token_id])

    def _prompted(self, token_ids: Iterable[int], *, fits: bool = False) -> Sequence:
        """Return a new sequence with those tokens pending, its kv_cache no longer than them if it `fits`."""
        prompt = self._checked(token_ids)
        if not prompt:
            raise PromptInvalid("the prompt has no tokens")
        if len(prompt) > self.settings.context:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens, the context holds {self.settings.context}; "
                "a larger --context has room"
            )
        sequence = self.new_sequence(len(prompt) if fits else None)
        sequence.append(prompt)
        return sequence

    def _checked(self, token_ids: Iterable[int]) -> list[int]:
        """Return those ids, also where numpy's or torch's whole numbers came; raise PromptInvalid for any others."""
        try:
            checked = [index(token_id) for token_id in token_ids]
        except (TypeError, ValueError) as error:
            raise PromptInvalid(f"the prompt is no sequence of whole token ids: {error}") from None
        for token_id in checked:
            if not 0 <= token_id < self.config.vocab_size:
                raise PromptInvalid(f"token id {token_id} is outside the vocabulary of {self.config.vocab_size}")
        return checked

    def _compute(self, sequences: list[Sequence], *, all_logits: bool) -> list[Tensor]:
        """Compute all pending tokens; return each sequence's logits: of its last token, or of all, [n, vocab]."""
        if not sequences or not all(sequence.pending for sequence in sequences):
            raise PromptInvalid("a step takes one or more sequences, each with pending tokens")
        for sequence in sequences:
            sequence.pending = self._checked(sequence.pending)
        computed: list[list[Tensor]] = [[] for _ in sequences]
        for takes in plan_rounds([len(sequence.pending) for sequence in sequences], self.settings.prefill_chunk):
            pieces = [
                Piece(sequences[take.sequence].kv_cache, sequences[take.sequence].pending[: take.n_tokens])
                for take in takes
            ]
            n_wanted = [take.n_tokens if all_logits else int(take.is_last) for take in takes]
            logits = self._forward(pieces, n_wanted)
            for take, part in zip(takes, logits, strict=True):
                del sequences[take.sequence].pending[: take.n_tokens]
                computed[take.sequence].append(part)
        return [torch.cat(parts) for parts in computed]

    def _forward(self, pieces: list[Piece], n_wanted: list[int]) -> tuple[Tensor, ...]:
        """Compute the pieces; return the logits behind the last n_wanted tokens of each."""
        model = self._opened_model()
        self._tend(monotonic())
        wanted: list[int] = []
        end = 0
        for piece, n in zip(pieces, n_wanted, strict=True):
            end += len(piece.token_ids)
            wanted += range(end - n, end)
        with torch.no_grad():
            return torch.split_with_sizes(model.forward(pieces, wanted), n_wanted)

    def _opened_model(self) -> Model:
        if self._model is None:
            raise RunnerError("the engine is closed")
        return self._model


def _read_config(store: StoreView) -> MixtralConfig:
    config_file = store.side_file(CONFIG_FILE)
    if config_file is None:
        raise StoreInvalid(f"the store has no {CONFIG_FILE}")
    return read_mixtral_config(config_file, store.side_file(GENERATION_CONFIG_FILE), store.manifest.model)
