from dataclasses import replace

from runner.experts.counters import Counters
from runner.generate import EOS, Report
from runner.metrics import Memory
from runner.report import report_figures, report_lines

REPORT = Report(
    finish_reason=EOS,
    n_prompt_tokens=41,
    n_tokens=99,
    seed=None,
    time_to_first_token_s=3.0,
    imports_s=2.0,
    attach_s=0.1,
    dense_weights_s=0.01,
    tokenizer_s=0.2,
    prefill_s=0.5,
    prefill_tokens_per_s=82.0,
    decode_tokens_per_s=12.5,
    has_c_kernels=True,
    memory=Memory(private_nbytes=190_000_000, shared_nbytes=445_000_000),
    expert_cache=None,
)
COUNTERS = Counters(
    hits=30,
    misses=10,
    evictions=8,
    prefetches_issued=9,
    prefetches_used=6,
    prefetches_late=2,
    prefetches_cancelled=2,
    prefetches_wasted=1,
    copied_nbytes=15_000_000,
    waited_s=0.25,
)


def test_a_report_says_speed_memory_and_where_the_time_went() -> None:
    text = "\n".join(report_lines(REPORT))

    assert "prompt 41 tokens, 82.0 tok/s" in text
    assert "answer 99 tokens, 12.5 tok/s" in text
    assert "private 190 MB, shared 445 MB" in text
    assert "first token 3.00 s" in text
    assert "no C kernels" not in text


def test_a_report_without_c_kernels_says_what_is_slower_and_the_remedy() -> None:
    text = "\n".join(report_lines(replace(REPORT, has_c_kernels=False)))

    assert "no C kernels" in text
    assert "install one" in text


def test_the_figures_of_a_report_are_one_flat_object() -> None:
    figures = report_figures(REPORT)

    assert figures["private_nbytes"] == 190_000_000
    assert figures["has_c_kernels"] is True
    assert not any(isinstance(value, dict) for value in figures.values())


def test_a_cache_is_reported_to_people_and_programs() -> None:
    report = replace(REPORT, expert_cache=COUNTERS)

    lines, figures = report_lines(report), report_figures(report)

    assert "expert cache: hit ratio 0.750, 10 misses · copied 15 MB, waited 0.25 s" in lines
    assert "prefetches: 9 issued, 6 used (2 late), 2 cancelled, 1 wasted" in lines
    assert (figures["expert_cache_hit_ratio"], figures["expert_cache_copied_nbytes"]) == (0.75, 15_000_000)
    assert not any(isinstance(value, dict) for value in figures.values())


def test_without_a_cache_none_is_reported() -> None:
    assert not any("cache" in line for line in report_lines(REPORT))
    assert not any("cache" in name for name in report_figures(REPORT))
