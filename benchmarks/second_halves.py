"""Our perplexity as llama-perplexity counts it: the second half of every window, with the first half before it.

`runner perplexity` scores whole windows, so that its figure is higher: the first tokens of a window have little before
them. Run as a module, on a store that a daemon holds: the store, the text, how many windows, their tokens. Prints the
perplexity.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import runner
from runner.engine import Engine
from runner.perplexity import Score, negative_log_likelihood, perplexity


def score_second_halves(engine: Engine, token_ids: Sequence[int], *, n_windows: int, window: int) -> list[Score]:
    """Return the scores of the second halves of the first n_windows whole windows, each computed by itself."""
    scores = []
    for start in range(0, n_windows * window, window):
        ids = token_ids[start : start + window]
        first = window // 2
        logits = engine.logits(ids)[first:-1]
        scores.append(Score(len(logits), negative_log_likelihood(logits, torch.tensor(ids[first + 1 :]))))
    return scores


def main(store: str, text: str, n_windows: int, window: int) -> None:
    """Print the perplexity."""
    with runner.open_engine(store, autostart=False) as engine:
        token_ids = engine.tokenizer.encode(Path(text).read_text(encoding="utf-8"), add_special_tokens=False)
        print(perplexity(score_second_halves(engine, token_ids, n_windows=n_windows, window=window)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
