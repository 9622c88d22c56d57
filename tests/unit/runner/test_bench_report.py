import json
from dataclasses import replace

from runner.bench import Bench, BenchPlan, Speed
from runner.metrics import Memory
from runner.report import bench_figures, bench_lines

BENCH = Bench(
    plan=BenchPlan(prompt_tokens=128, context_tokens=512, decode_tokens=32, runs=3, seed=7),
    prefill=Speed((80.0, 90.0, 100.0)),
    decode=Speed((4.0, 6.0, 5.0)),
    outside_s=(0.002, 0.0031, 0.004),
    n_threads=2,
    is_exact=False,
    kernels="avx2",
    memory=Memory(private_nbytes=190_000_000, shared_nbytes=445_000_000),
    expert_cache=None,
)


def test_a_person_reads_medians_with_their_range_and_what_was_used() -> None:
    text = "\n".join(bench_lines(BENCH))

    assert "prefill of 128 tokens: 90.00 tok/s (least 80.00, greatest 100.00, 3 runs)" in text
    assert "decode of 32 tokens behind 512: 5.00 tok/s (least 4.00, greatest 6.00, 3 runs)" in text
    assert "of a token 3.10 ms outside of matrix products" in text
    assert "2 threads, avx2 kernels · memory: private 190 MB, shared 445 MB" in text


def test_the_lines_say_what_makes_a_run_slower() -> None:
    text = "\n".join(bench_lines(replace(BENCH, is_exact=True, kernels=None)))

    assert "2 threads, no C kernels, exact" in text


def test_a_program_reads_every_sample_and_what_was_asked() -> None:
    figures = json.loads(json.dumps(bench_figures(BENCH), allow_nan=False))

    assert figures["decode_tokens_per_s"] == 5.0
    assert figures["decode_outside_products_s"] == 0.0031
    assert figures["decode_tokens_per_s_samples"] == [4.0, 6.0, 5.0]
    assert (figures["context_tokens"], figures["runs"], figures["seed"]) == (512, 3, 7)
    assert (figures["threads"], figures["exact"], figures["kernels"]) == (2, False, "avx2")
    assert figures["private_nbytes"] == 190_000_000


def test_what_was_not_measured_is_null_and_has_no_line() -> None:
    bench = replace(BENCH, prefill=None)

    assert bench_figures(bench)["prefill_tokens_per_s"] is None
    assert bench_figures(bench)["prefill_tokens_per_s_samples"] is None
    assert not any("prefill" in line for line in bench_lines(bench))
