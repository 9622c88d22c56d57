import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.confined import memory_group
from benchmarks.errors import CommandFailed, NothingToMeasure
from benchmarks.peer_decode import decode_with_llama

# As llama-perplexity logs, of this build: minutes, seconds, milliseconds, microseconds.
LOG = """\
0.00.030.598 I perplexity: calculating perplexity over 1 chunks, n_ctx=64, batch_size=1, n_seq=1
1.02.050.207 I perplexity: 62.02 seconds per pass - ETA 0.00 minutes
[1]253.1317,
1.02.062.419 I Final estimate: PPL = 253.1317 +/- 38.30206
"""
MIB = 1 << 20


def fake_llama(folder: Path, log: str, exit_code: int = 0) -> Path:
    program = folder / "llama-perplexity"
    arguments = folder / "arguments"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nopen({str(arguments)!r}, 'w').write(' '.join(sys.argv[1:]))\n"
        f"sys.stdout.write({log!r})\nsys.exit({exit_code})\n"
    )
    program.chmod(0o755)
    return program


def decode(program: Path) -> float:
    decoded = decode_with_llama(
        program, Path("m.gguf"), Path("t.txt"), n_tokens=64, threads=2, confined=lambda command: command
    )
    assert decoded.perplexity == 253.1317
    return decoded.elapsed_s


def test_the_time_is_that_between_the_lines_of_the_log(tmp_path: Path) -> None:
    assert decode(fake_llama(tmp_path, LOG)) == pytest.approx(62.019609)


def test_llama_computes_one_token_at_a_time_from_the_mapped_file(tmp_path: Path) -> None:
    decode(fake_llama(tmp_path, LOG))

    said = (tmp_path / "arguments").read_text()
    assert "-c 64 -b 1 -ub 1 --chunks 1" in said
    assert "--no-repack" in said
    assert "--no-warmup" in said


def test_a_program_that_is_killed_on_the_way_has_failed(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match=r"ended with 3: .*calculating"):
        decode(fake_llama(tmp_path, LOG.splitlines()[0] + "\n", exit_code=3))


def test_a_group_kills_what_takes_more_than_its_limit_and_counts_it() -> None:
    try:
        with memory_group("test") as group:
            group.limit(32 * MIB)
            done = subprocess.run(
                group.command([sys.executable, "-c", f"bytearray(b'x') * {256 * MIB}"]), check=False, timeout=60
            )

            assert done.returncode == -9
            assert group.n_kills == 1
            assert 16 * MIB < group.most_nbytes <= 32 * MIB
    except NothingToMeasure as reason:
        pytest.skip(str(reason))
