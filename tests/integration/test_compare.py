"""Two stores of one model compared: against torch's own KL divergence, and as a command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div

from expertd.convert.config import QuantizeConfig
from runner.comparison import common_tokens, compare_windows, divergence, summarize
from runner.errors import NotFinite, PromptInvalid, StoreInvalid
from runner.perplexity import perplexity, score_windows
from tests.support.small_stores import SmallStore, make_small_store
from tests.support.tokenizers import byte_fallback, byte_level, tokenizer_files

VOCAB = 300
TEXT = "once upon a time there was a gate and two experts " * 3


def stores(folder: Path) -> tuple[SmallStore, SmallStore]:
    """Return a 16-bit store and a 2-bit one of the same checkpoint."""
    files = tokenizer_files(byte_level())
    exact = make_small_store(folder / "exact", files=files, vocab=VOCAB)
    rough = make_small_store(folder / "rough", QuantizeConfig(experts="2bit-g16"), files=files, vocab=VOCAB)
    return exact, rough


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[SmallStore, SmallStore]:
    return stores(tmp_path_factory.mktemp("pair"))


def test_divergence_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(7, 50, generator=generator) * 3 for _ in range(2))

    nats = divergence(p, q)

    expected = kl_div(q.double().log_softmax(-1), p.double().log_softmax(-1), reduction="sum", log_target=True)
    assert nats == pytest.approx(float(expected), rel=1e-5)


def test_divergence_of_what_is_not_finite_is_refused() -> None:
    with pytest.raises(NotFinite):
        divergence(torch.zeros(1, 3), torch.tensor([[0.0, torch.nan, 0.0]]))


def test_a_store_does_not_differ_from_itself(pair: tuple[SmallStore, SmallStore]) -> None:
    with pair[0].engine() as a, pair[0].engine() as b:
        comparison = summarize(compare_windows(a, b, common_tokens(a, b, TEXT), 16))

    assert comparison.divergence_nats == 0
    assert comparison.top_agreement == 1
    assert comparison.reference_perplexity == comparison.other_perplexity


def test_a_rough_store_differs_and_perplexities_are_those_of_each_alone(pair: tuple[SmallStore, SmallStore]) -> None:
    with pair[0].engine() as a, pair[1].engine() as b:
        token_ids = common_tokens(a, b, TEXT)

        comparison = summarize(compare_windows(a, b, token_ids, 16))

        alone = [perplexity(list(score_windows(engine, token_ids, 16))) for engine in (a, b)]
    assert [comparison.reference_perplexity, comparison.other_perplexity] == alone
    assert comparison.n_tokens == len(token_ids) - -(-len(token_ids) // 16)
    assert comparison.divergence_nats > 1e-3
    assert 0 < comparison.top_agreement < 1


def test_stores_of_other_vocabularies_are_refused(pair: tuple[SmallStore, SmallStore], tmp_path: Path) -> None:
    larger = make_small_store(tmp_path / "larger", files=tokenizer_files(byte_level()), vocab=VOCAB + 20)

    with (
        pair[0].engine() as a,
        larger.engine() as b,
        pytest.raises(StoreInvalid, match="vocabularies of 300 and of 320"),
    ):
        common_tokens(a, b, TEXT)


def test_stores_of_other_tokenizers_are_refused(pair: tuple[SmallStore, SmallStore], tmp_path: Path) -> None:
    others = make_small_store(tmp_path / "others", files=tokenizer_files(byte_fallback()), vocab=VOCAB)

    with pair[0].engine() as a, others.engine() as b, pytest.raises(StoreInvalid, match="cut the text differently"):
        common_tokens(a, b, TEXT)


def test_a_text_of_one_token_is_refused(pair: tuple[SmallStore, SmallStore]) -> None:
    with pair[0].engine() as a, pytest.raises(PromptInvalid, match="fewer than two tokens"):
        summarize(compare_windows(a, a, [5], 16))


def test_the_command_prints_lines_or_json(pair: tuple[SmallStore, SmallStore], tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    stores_and_text = [str(pair[0].path), str(pair[1].path), "--text", str(tmp_path / "text"), "--window", "32"]

    lines, as_json = (
        subprocess.run(
            [sys.executable, "-m", "tests.support.local_runner", "compare", *stores_and_text, "--tokens", "80", *more],
            capture_output=True,
            text=True,
            check=True,
        )
        for more in ([], ["--json"])
    )

    document = json.loads(as_json.stdout)
    assert (lines.stderr, as_json.stderr) == ("", "")
    assert document["n_tokens"] == 31 + 31 + 15
    assert f"KL divergence {document['divergence_nats']:.5f} nats a token" in lines.stdout
    assert f"perplexity {document['reference_perplexity']:.4f} and {document['other_perplexity']:.4f}" in lines.stdout
