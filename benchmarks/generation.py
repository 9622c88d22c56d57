"""A second `runner generate` on a warm store: when its first token comes, where that time goes, and its speed."""

import json
from pathlib import Path

from benchmarks.figures import Figure
from benchmarks.processes import Environment

_PROMPT = "Why is the sky blue? Answer in one sentence."
_PERPLEXITY_TOKENS = 1024
_PERPLEXITY_WINDOW = 512

_FIRST_TOKEN = {
    "time_to_first_token_s": "first token after process start",
    "imports_s": "  of it interpreter and imports",
    "attach_s": "  of it attach, with reading the manifest",
    "dense_weights_s": "  of it dense weights",
    "tokenizer_s": "  of it tokenizer",
    "prefill_s": "  of it prefill",
}


def measure_generation(environment: Environment, store: Path, runs: int) -> list[Figure]:
    """Return the parts of the time to the first token, and the tokens per second of prefill and decode."""
    arguments = ("generate", "--store", str(store), "--prompt", _PROMPT, "--max-new-tokens", "32", "--json")
    with environment.daemon(store):
        environment.runner(*arguments)
        reports = [json.loads(environment.runner(*arguments)) for _ in range(runs)]
    figures = [Figure(name, "s", tuple(report[key] for report in reports)) for key, name in _FIRST_TOKEN.items()]
    for key, name in (("prefill_tokens_per_s", "prefill, 41 tokens"), ("decode_tokens_per_s", "decode, 31 tokens")):
        figures.append(Figure(name, "tok/s", tuple(report[key] for report in reports)))
    return figures


def measure_perplexity(environment: Environment, store: Path, text: Path) -> list[Figure]:
    """Return the perplexity of the beginning of a text."""
    with environment.daemon(store):
        output = environment.runner(
            "perplexity", "--store", str(store), "--text", str(text), "--json",
            "--tokens", str(_PERPLEXITY_TOKENS), "--window", str(_PERPLEXITY_WINDOW),
        )  # fmt: skip
    name = f"perplexity, first {_PERPLEXITY_TOKENS} tokens in windows of {_PERPLEXITY_WINDOW}"
    return [Figure(name, "", (json.loads(output)["perplexity"],))]
