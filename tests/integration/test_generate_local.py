"""From a prompt to text, without a daemon: the engine in this process, the command in a process of its own."""

import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.config import RunnerConfig
from runner.engine import Engine
from runner.errors import ConfigInvalid, ContextFull, PromptInvalid, PromptTooLong, RunnerError, TemplateError
from runner.generate import CONTEXT, EOS, LENGTH, Generation, Prompt, Startup
from runner.perplexity import perplexity, score_windows
from tests.support.local_runner import start_runner
from tests.support.local_store import LocalStore
from tests.support.small_stores import SmallStore, make_small_store
from tests.support.tokenizers import byte_level, tokenizer_files

CHAT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
VOCAB = 258  # the tokens of byte_level()
STARTUP = Startup(imports_s=0.0, attach_s=0.0, dense_weights_s=0.0)
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    files = tokenizer_files(byte_level(), chat_template=CHAT, add_bos_token=True)
    return make_small_store(tmp_path_factory.mktemp("text"), files=files, vocab=VOCAB)


@pytest.fixture
def engine(store: SmallStore) -> Iterator[Engine]:
    with store.engine() as engine:
        yield engine


def generate(engine: Engine, prompt: Prompt, **options: object) -> Generation:
    generation = Generation(engine, prompt, RunnerConfig(**options), STARTUP)  # type: ignore[arg-type]
    for _ in generation:
        pass
    return generation


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    """Return exit status, stdout and stderr."""
    with process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out.decode(), err.decode()


def run_redirected(store: SmallStore, redirection: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `generate` in a shell that redirects so."""
    runner = [sys.executable, "-m", "tests.support.local_runner", "generate", "--store", str(store.path)]
    return subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh", *runner, "--max-new-tokens", "2", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_greedy_tokens_are_the_most_probable_ones(engine: Engine) -> None:
    prompt = [5, 6, 7]

    answer = list(engine.generate(prompt, max_new_tokens=12))

    logits = engine.logits(prompt + answer)[len(prompt) - 1 : -1]
    assert answer == logits.argmax(-1).tolist()


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(engine: Engine) -> None:
    first, again, other = (
        list(engine.generate([5], max_new_tokens=30, temperature=1.0, seed=seed)) for seed in (1, 1, 2)
    )

    assert first == again
    assert first != other


def test_generation_ends_before_an_end_of_sequence(store: SmallStore, tmp_path: Path) -> None:
    with store.engine() as engine:
        expected = list(engine.generate([5], max_new_tokens=10))
    files = {"generation_config.json": json.dumps({"eos_token_id": [1, expected[4]]}).encode()}
    stopping = make_small_store(tmp_path, files=files | tokenizer_files(byte_level(), chat_template=CHAT), vocab=VOCAB)

    with stopping.engine() as engine:
        assert list(engine.generate([5], max_new_tokens=10)) == expected[: expected.index(expected[4])]


def test_generation_says_when_the_context_is_full(store: SmallStore) -> None:
    with store.engine(context=8) as engine:
        tokens = engine.generate([5, 6, 7], max_new_tokens=20)
        answer = [next(tokens) for _ in range(6)]

        with pytest.raises(ContextFull, match="the context holds 8 tokens"):
            next(tokens)

    # Five of six were computed upon; the last needs no room.
    assert len(answer) == 6


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], PromptInvalid, "no tokens"),
        ([VOCAB], PromptInvalid, "token id 258 is outside the vocabulary of 258"),
        ([-1], PromptInvalid, "token id -1"),
        ([5] * 257, PromptTooLong, "the prompt has 257 tokens, the context holds 256"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused(
    engine: Engine, prompt: list[int], error: type[RunnerError], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine.generate(prompt)
    with pytest.raises(error, match=message):
        engine.logits(prompt)


@pytest.mark.parametrize("prompt", [[5.0], ["5"], [None], [[5]], "5", 5, None, torch.tensor([5.0])])
def test_a_prompt_of_other_things_than_whole_numbers_is_refused(engine: Engine, prompt: Any) -> None:  # noqa: ANN401
    message = "the prompt is no sequence of whole token ids"

    with pytest.raises(PromptInvalid, match=message):
        engine.generate(prompt)
    with pytest.raises(PromptInvalid, match=message):
        engine.logits(prompt)


def test_a_prompt_may_be_a_tensor_of_whole_numbers(engine: Engine) -> None:
    ids: Any = torch.tensor([5, 6])

    assert torch.equal(engine.logits(ids), engine.logits([5, 6]))


@pytest.mark.parametrize("token_id", [VOCAB, -1])
def test_tokens_appended_to_a_sequence_are_checked_by_the_step(engine: Engine, token_id: int) -> None:
    sequence = engine.new_sequence()
    sequence.append([token_id])

    with pytest.raises(PromptInvalid, match="outside the vocabulary of 258"):
        engine.step([sequence])


@pytest.mark.parametrize("context", [0, -1])
def test_a_sequence_without_room_for_a_token_is_refused(engine: Engine, context: int) -> None:
    with pytest.raises(ConfigInvalid, match=f"context: a whole number from 1 to 16777216 is expected, {context} came"):
        engine.new_sequence(context)


def test_a_step_without_tokens_is_refused(engine: Engine) -> None:
    for sequences in ([], [engine.new_sequence()]):
        with pytest.raises(PromptInvalid, match="each with pending tokens"):
            engine.step(sequences)


def test_a_closed_engine_computes_no_more(store: SmallStore) -> None:
    engine = store.engine()
    engine.close()
    engine.close()

    with pytest.raises(RunnerError, match="the engine is closed"):
        engine.logits([5])


def test_the_pieces_make_the_text_of_the_tokens(engine: Engine) -> None:
    generation = Generation(engine, Prompt("hello"), RunnerConfig(max_new_tokens=40), STARTUP)

    text = "".join(generation)

    assert text == engine.tokenizer.decode(generation.token_ids)


def test_the_report_says_what_was_done(engine: Engine) -> None:
    report = generate(engine, Prompt("hello"), max_new_tokens=9).report()

    assert (report.finish_reason, report.n_prompt_tokens, report.n_tokens) == (LENGTH, 6, 9)
    assert report.time_to_first_token_s is not None
    assert report.prefill_s is not None
    assert 0 < report.prefill_s < report.time_to_first_token_s
    assert report.decode_tokens_per_s is not None
    assert report.memory.private_nbytes > 1 << 20


def test_the_report_names_the_seed_that_was_drawn(engine: Engine) -> None:
    first = generate(engine, Prompt("hello"), max_new_tokens=20, temperature=1.0)

    again = generate(engine, Prompt("hello"), max_new_tokens=20, temperature=1.0, seed=first.report().seed)

    assert again.token_ids == first.token_ids


def test_an_answer_that_fills_the_context_is_reported_so(store: SmallStore) -> None:
    with store.engine(context=16) as engine:
        report = generate(engine, Prompt("hello"), max_new_tokens=100).report()

    assert (report.finish_reason, report.n_tokens) == (CONTEXT, 11)


def test_a_raw_prompt_is_continued_behind_its_bos(engine: Engine) -> None:
    bos = engine.tokenizer.encode("")

    generation = generate(engine, Prompt("hello", is_raw=True), max_new_tokens=5)

    prompt_ids = bos + engine.tokenizer.encode("hello", add_special_tokens=False)
    assert generation.token_ids == list(engine.generate(prompt_ids, max_new_tokens=5))


def test_a_store_without_a_template_asks_for_raw(tmp_path: Path) -> None:
    plain = make_small_store(tmp_path, files=tokenizer_files(byte_level()), vocab=VOCAB)

    with plain.engine() as engine, pytest.raises(TemplateError, match="--raw"):
        generate(engine, Prompt("hello"))


def test_perplexity_is_the_exponential_of_the_mean_loss_of_each_window(engine: Engine) -> None:
    token_ids = torch.randint(3, VOCAB, (50,), generator=torch.Generator().manual_seed(3)).tolist()

    value = perplexity(list(score_windows(engine, token_ids, 16)))

    losses = [
        torch.nn.functional.cross_entropy(
            engine.logits(window)[:-1].double(), torch.tensor(window[1:]), reduction="sum"
        ).item()
        for window in (token_ids[0:16], token_ids[16:32], token_ids[32:48], token_ids[48:50])
    ]
    assert value == pytest.approx(math.exp(sum(losses) / (15 * 3 + 1)), rel=1e-6)


def test_a_window_of_one_token_is_left_out(engine: Engine) -> None:
    assert [score.n_tokens for score in score_windows(engine, [5] * 33, 16)] == [15, 15]


def test_the_command_streams_text_and_reports_behind_it(store: SmallStore) -> None:
    with store.engine(exact=False) as engine:
        expected = "".join(Generation(engine, Prompt("hello"), RunnerConfig(max_new_tokens=8), STARTUP))

    status, out, err = finish(start_runner("generate", store.path, "--prompt", "hello", "--max-new-tokens", "8"))

    assert (status, out) == (0, expected + "\n")
    assert "prompt 6 tokens" in err
    assert "first token" in err
    assert "memory: private" in err


def test_the_command_prints_one_json_object_where_that_is_asked(store: SmallStore) -> None:
    status, out, err = finish(
        start_runner("generate", store.path, "--prompt", "hello", "--max-new-tokens", "8", "--json")
    )

    document = json.loads(out)
    assert (status, err) == (0, "")
    assert len(document["tokens"]) == document["n_tokens"] == 8
    assert document["finish_reason"] == LENGTH
    assert {"text", "prefill_tokens_per_s", "decode_tokens_per_s", "private_nbytes", "shared_nbytes"} <= set(document)


def test_the_command_reads_its_prompt_from_stdin(store: SmallStore) -> None:
    process = start_runner("generate", store.path, "--max-new-tokens", "2", "--json", stdin=subprocess.PIPE)

    out, _ = process.communicate(b"hello\n", timeout=TIMEOUT_S)

    assert json.loads(out)["n_prompt_tokens"] == 6


def test_an_interruption_ends_the_command_with_its_report(store: SmallStore) -> None:
    process = start_runner(
        "generate", store.path, "--prompt", "hello", "--max-new-tokens", "100000", "--context", "200000"
    )
    assert process.stdout is not None
    process.stdout.read(1)

    process.send_signal(signal.SIGINT)
    status, _, err = finish(process)

    assert status == 130
    assert "ended by stopped" in err
    assert err.endswith("runner: interrupted\n")
    assert "Traceback" not in err


def test_an_interruption_that_an_import_loses_ends_the_command(store: SmallStore) -> None:
    # What torch's import runs swallows a KeyboardInterrupt here and there; this does it always.
    program = """if True:
        import runpy, signal, sys
        class Loser:
            def find_spec(self, name, path, target=None):
                if name == "torch":
                    try:
                        signal.raise_signal(signal.SIGINT)
                    except KeyboardInterrupt:
                        pass
        sys.meta_path.insert(0, Loser())
        runpy.run_module("tests.support.local_runner", run_name="__main__")
    """
    arguments = ["generate", "--store", str(store.path), "--prompt", "hello", "--max-new-tokens", "2"]

    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )

    assert (done.returncode, done.stdout, done.stderr) == (130, "", "runner: interrupted\n")


@pytest.mark.parametrize("module", ["click", "json", "runner.commands"])
def test_an_interruption_of_the_first_imports_is_one_line(module: str) -> None:
    program = f"""if True:
        import signal, sys
        class Interrupter:
            def find_spec(self, name, path, target=None):
                if name == "{module}":
                    signal.raise_signal(signal.SIGINT)
        sys.meta_path.insert(0, Interrupter())
        from runner.cli import main
        main()
    """

    done = subprocess.run(
        [sys.executable, "-c", program, "--version"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )

    assert (done.returncode, done.stdout, done.stderr) == (130, "", "runner: interrupted\n")


def test_a_closed_stdout_is_one_line(store: SmallStore) -> None:
    done = run_redirected(store, ">&-", "--prompt", "hello")

    assert (done.returncode, done.stderr) == (1, "runner: stdout is closed\n")


def test_a_closed_stdin_is_an_empty_prompt(store: SmallStore) -> None:
    done = run_redirected(store, "<&-")

    assert (done.returncode, done.stdout, done.stderr) == (1, "", "runner: the prompt is empty\n")


def test_a_closed_stderr_leaves_the_answer_as_it_is(store: SmallStore) -> None:
    silent, told = (run_redirected(store, redirection, "--prompt", "hello") for redirection in ("2>&-", ""))

    assert (silent.returncode, silent.stderr) == (0, "")
    assert silent.stdout == told.stdout != ""


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", ">&- 2>&-", "<&- >&- 2>&-"])
def test_an_error_that_nobody_can_read_is_still_a_status(store: SmallStore, redirection: str) -> None:
    done = run_redirected(store, redirection, "--prompt", "")

    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


@pytest.mark.parametrize("arguments", [["--prompt", "hello"], ["--prompt", "hello", "--json"], ["--help"]])
def test_an_output_without_room_is_one_line(store: SmallStore, arguments: list[str]) -> None:
    done = run_redirected(store, ">/dev/full", *arguments)

    assert (done.returncode, done.stderr) == (1, "runner: output: No space left on device\n")


def test_a_prompt_that_cannot_be_read_is_one_line(store: SmallStore) -> None:
    done = run_redirected(store, "0>/dev/null")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "runner: the prompt: stdin: Bad file descriptor\n"


def test_a_reader_that_leaves_ends_the_command_quietly(store: SmallStore) -> None:
    process = start_runner(
        "generate", store.path, "--prompt", "hello", "--max-new-tokens", "100000", "--context", "200000"
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)

    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    status = process.wait(TIMEOUT_S)

    assert (status, err) == (0, b"")


def test_the_perplexity_command_scores_the_text(store: SmallStore, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("once upon a time " * 4)
    arguments = ("--text", str(tmp_path / "text"), "--tokens", "40", "--window", "16", "--json")

    status, out, err = finish(start_runner("perplexity", store.path, *arguments))

    document = json.loads(out)
    assert (status, err) == (0, "")
    assert document["n_tokens_scored"] == 15 + 15 + 7
    assert document["perplexity"] > 1


def test_an_error_of_the_store_is_one_line(store: SmallStore) -> None:
    status, out, err = finish(start_runner("generate", store.path, "--prompt", "hello", "--context", "3"))

    assert (status, out) == (1, "")
    assert err == "runner: the prompt has 6 tokens, the context holds 3; a larger --context has room\n"


def test_an_answer_can_end_at_once(tmp_path: Path) -> None:
    files = tokenizer_files(byte_level(), chat_template=CHAT)
    files["generation_config.json"] = json.dumps({"eos_token_id": list(range(VOCAB))}).encode()
    ended = make_small_store(tmp_path, files=files, vocab=VOCAB)

    with Engine(LocalStore(ended.path), RunnerConfig(threads=1)) as engine:
        report = generate(engine, Prompt("hello")).report()

    assert (report.finish_reason, report.n_tokens, report.time_to_first_token_s) == (EOS, 0, None)
