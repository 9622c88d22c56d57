"""Our side of `larger`: a text's tokens computed one at a time, timed, and how well they were predicted.

Run as a module, on a store that a daemon holds: the store, the text, how many tokens, threads, and whether a token is a
byte. Says "ready", waits for a line, decodes, prints JSON, waits for the end of its input so that its memory can be
read. Perplexity is that of the second half, as llama-perplexity counts it.
"""

import json
import sys
import time
from pathlib import Path

import torch

import runner
from runner.engine import Engine
from runner.perplexity import Score, negative_log_likelihood, perplexity


def decode(engine: Engine, token_ids: list[int]) -> tuple[float, float]:
    """Return the seconds of all steps, and the perplexity of the second half."""
    sequence = engine.new_sequence(len(token_ids))
    logits = []
    with engine.awake():
        started = time.perf_counter()
        for token_id in token_ids:
            sequence.append([token_id])
            logits.append(engine.step([sequence]))
        elapsed_s = time.perf_counter() - started
    first = len(token_ids) // 2
    scored = torch.cat(logits[first:-1])
    score = Score(len(scored), negative_log_likelihood(scored, torch.tensor(token_ids[first + 1 :])))
    return elapsed_s, perplexity([score])


def main(store: str, text: str, n_tokens: int, threads: int, *, is_byte_a_token: bool) -> None:
    """Decode when told to, and say what came of it."""
    data = Path(text).read_bytes()
    with runner.open_engine(store, autostart=False, threads=threads) as engine:
        ids = list(data) if is_byte_a_token else engine.tokenizer.encode(data.decode(), add_special_tokens=False)
        print("ready", flush=True)
        sys.stdin.readline()
        elapsed_s, predicted = decode(engine, ids[:n_tokens])
        counters = engine.counters
        found = {
            "n_tokens": len(ids[:n_tokens]),
            "elapsed_s": elapsed_s,
            "perplexity": predicted,
            "products_s": engine.products_s,
            "waited_s": None if counters is None else counters.waited_s,
        }
        print(json.dumps(found), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), is_byte_a_token=sys.argv[5] == "bytes")
