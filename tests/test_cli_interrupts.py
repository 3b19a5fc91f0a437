"""Ctrl-C and SIGTERM end the command within two seconds, whatever runs, without a crash or a traceback."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import command
from tests.golden_files import load_golden

# It keeps the main thread in C for minutes, as a compilation does, and lets other threads run.
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2**31 - 1)"
SECONDS = 2.0


def app(*lines: str) -> str:
    return "\n    ".join(["def app(prog_name):", *lines])


def begun(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    """The process, once it has reported its start on stderr."""
    assert process.stderr is not None and process.stderr.readline() == "begun\n"
    return process


BEGIN = "import sys; print('begun', file=sys.stderr, flush=True)"


def ended(process: subprocess.Popen[str], number: int, seconds: float = SECONDS) -> tuple[int, str, str]:
    """How the process ends after this signal; it must not take long."""
    at = time.monotonic()
    process.send_signal(number)
    found = command.finish(process)
    assert time.monotonic() - at < seconds, found
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_while_c_code_runs(number: int, code: int):
    """Printed output is written, and nothing in the command can delay the end or lose the output."""
    lines = ["try:", f"    print('kept'); {BEGIN}; {BUSY}", "except BaseException: print('caught')"]
    process = begun(command.start(app(*lines)))
    assert ended(process, number) == (code, "kept\n", "")


def test_an_exit_that_would_crash_or_hang_is_not_run():
    lines = ["import atexit, threading, time", "atexit.register(print, 'cleaned up')"]
    lines += ["threading.Thread(target=time.sleep, args=(60,)).start()", BEGIN, "time.sleep(60)"]
    assert ended(begun(command.start(app(*lines))), signal.SIGINT) == (130, "", "")


def test_a_command_that_is_done_has_succeeded():
    """The signal arrives while Python shuts down, after everything that `atexit` runs."""
    lines = ["import sys, time", "class Late:", "    def __del__(self, say=sys.stderr, sleep=time.sleep):"]
    lines += ["        print('begun', file=say, flush=True); sleep(0.3)", "sys.late = Late()"]
    assert ended(begun(command.start(app(*lines))), signal.SIGINT) == (0, "", "")


def test_a_full_pipe_does_not_delay_the_end():
    process = begun(command.start(app(BEGIN, "while True: print('x' * 1000)")))
    at = time.monotonic()
    process.send_signal(signal.SIGINT)  # the pipe is not read meanwhile
    assert process.wait(60) == 130 and time.monotonic() - at < SECONDS
    command.finish(process)


@pytest.mark.parametrize(("terminal", "expected"), [("xterm", "\x1b[?25h\n"), ("dumb", "\n")])
def test_a_terminal_gets_its_cursor_back_and_a_new_line(terminal: str, expected: str):
    ours, theirs = os.openpty()
    process = command.start(app("print('begun', flush=True)", BUSY), stderr=theirs, env={"TERM": terminal})
    os.close(theirs)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    assert ended(process, signal.SIGINT) == (130, "", None)
    assert os.read(ours, 99).decode().replace("\r\n", "\n") == expected
    os.close(ours)


def test_ignored_signals_stay_ignored():
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"  # as for a script's job in the background
    lines = [BEGIN, "import sys, time", "while not sys.stdin.readline(): time.sleep(0.01)", "print('done')"]
    program = f"{ignore}\nimport sys\nsys.argv[1] = {app(*lines)!r}\n{command._FRAME}"
    process = subprocess.Popen(
        [sys.executable, "-c", program, ""],
        cwd=command.ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    begun(process).send_signal(signal.SIGINT)
    assert process.communicate("go on\n", timeout=60) == ("done\n", "") and process.returncode == 0


UNSAVED = ["from decodax.cli import interrupts", "interrupts.unsaved(3)"]


def test_unsaved_work_gets_a_moment_to_finish():
    lines = [*UNSAVED, "import signal, time; heard = []", "signal.signal(signal.SIGINT, lambda *_: heard.append(1))"]
    lines += [BEGIN, "while not heard: time.sleep(0.01)", "time.sleep(0.3); print('saved'); interrupts.unsaved(0)"]
    process = begun(command.start(app(*lines, "raise SystemExit(130)")))
    assert ended(process, signal.SIGINT) == (130, "saved\n", "")


def test_unsaved_work_is_lost_after_that_moment_with_a_message():
    code, out, err = ended(begun(command.start(app(*UNSAVED, BEGIN, BUSY))), signal.SIGINT)
    assert (code, out) == (130, "") and re.fullmatch("stopped before the last steps were saved: .*\n", err)


def test_a_second_signal_does_not_wait_for_unsaved_work():
    process = begun(command.start(app(*UNSAVED, BEGIN, BUSY)))
    at = time.monotonic()
    process.send_signal(signal.SIGINT)
    while process.poll() is None:  # two at once may come as one
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    assert process.returncode == 130 and time.monotonic() - at < 1.0
    command.finish(process)


def test_signals_are_handled_before_anything_large_is_imported():
    code = "import sys, decodax.__main__; print({'jax', 'numpy', 'typer', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=command.ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr


def test_importing_is_interrupted_too():
    """`-X importtime` shows when it has begun."""
    arguments = [sys.executable, "-X", "importtime", "-m", "decodax", "methods"]
    process = subprocess.Popen(arguments, cwd=command.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any(line.rpartition("|")[2].strip().startswith("numpy.") for line in process.stderr)
    code, out, err = ended(process, signal.SIGINT)
    assert (code, out) == (130, "") and "Traceback" not in err


# What follows interrupts the real commands.


def environment(folder: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    # Without a compilation cache; the log shows what is compiled.
    off = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_LOG_COMPILES": "1"}
    return kept | off | {"XDG_CACHE_HOME": str(folder)} | more


def files_below(folder: Path) -> set[str]:
    return {file.name for file in folder.rglob("*") if file.is_file()}


PROMPTS = ["def f(", "class A:", "import "]
LONG = ["--max-new-tokens", "1000", "--stop-token-ids", ""]
TRAINING = ["--text", str(Path(__file__)), "--batch", "2", "--window", "64", "--short-window", "64", "-o", "{out}/part"]
COMMANDS = {
    "prefill": (["generate", PROMPTS[0]], "conversion jit(prefill_chunk)"),
    "loop compiled": (["generate", PROMPTS[0], *LONG], "conversion jit(decode)"),
    "loop, streamed": (["generate", PROMPTS[0], *LONG], "XLA compilation of jit(decode)"),
    "loop, several": (["generate", *PROMPTS, *LONG], "XLA compilation of jit(decode)"),
    "loop, JSON": (["generate", PROMPTS[0], *LONG, "--json"], "XLA compilation of jit(decode)"),
    "bench": (["bench", "--batch", "3", "--new-tokens", "500"], "conversion jit(decode)"),
    "plan": (["plan", "--topology", "gpu:h200x8", "--picture", "{out}/plan.png"], "Finished tracing"),
    "convert": (["convert", "{model}", "-o", "{out}/orbax", "--verify"], "conversion jit("),
    "training compiled": (["train", "ppd", *TRAINING], "conversion jit(step)"),
    "training": (["train", "ppd", *TRAINING], "XLA compilation of jit(step)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("case", COMMANDS)
def test_every_command_ends_in_every_phase(case: str, number: int, tmp_path: Path):
    words, phase = COMMANDS[case]
    model = load_golden("llama").folder
    arguments = [word.format(out=tmp_path / "out", model=model) for word in words]
    process = subprocess.Popen(
        [sys.executable, "-m", "decodax", *arguments],
        cwd=command.ROOT, env=environment(tmp_path / "cache"), text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    said = next((line for line in process.stderr if phase in line), None)
    assert said is not None, process.wait()
    time.sleep(0.3)  # into the phase; the exact moment does not matter
    patience = 30 if (case, number) == ("training", signal.SIGTERM) else SECONDS  # its steps are saved
    code, _, err = ended(process, number, patience)
    assert code == 128 + number and "Traceback" not in err and "terminate" not in err
    # What is left is a run to resume, or a conversion that was being compared; no auxiliary weights and no picture.
    assert not files_below(tmp_path / "out") & {"auxiliary.json", "auxiliary.safetensors", "plan.png", "loss.png"}


@pytest.mark.slow
def test_a_download_ends(tmp_path: Path):
    """The hub takes the connection, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        address = f"http://127.0.0.1:{hub.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-m", "decodax", "generate", "x", "--model", "some/model"],
            cwd=command.ROOT, env=environment(tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path)),
            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        hub.settimeout(60)
        connection, _ = hub.accept()
        with connection:
            assert ended(process, signal.SIGINT) == (130, "", "")


@pytest.mark.slow
def test_an_interrupted_training_resumes(tmp_path: Path):
    """Its steps are saved, and it ends like an uninterrupted one, whatever files were left."""
    whole, steps = (
        ["train", "ppd", *(word.format(out=out) for word in TRAINING), "--tokens", "2560", "--json"]
        for out in (tmp_path / "whole", tmp_path)
    )

    def start(arguments: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "decodax", *arguments],
            cwd=command.ROOT, env=environment(tmp_path / "cache"), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    code, _, err = command.finish(start(whole), 300)
    assert code == 0, err
    process = start(steps)
    assert process.stderr is not None
    next(line for line in process.stderr if "XLA compilation of jit(step)" in line)
    time.sleep(0.3)
    code, _, err = ended(process, signal.SIGINT)
    assert code == 130 and "the same command goes on" in err
    (tmp_path / "part" / ".being_written").mkdir(parents=True)
    (tmp_path / "part" / ".being_written" / "auxiliary.safetensors").write_bytes(b"half")
    code, out, err = command.finish(start(steps), 300)
    assert code == 0 and json.loads(out)["trained_tokens"] == 2560, err
    for name in ("auxiliary.safetensors", "auxiliary.json"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / "part" / name).read_bytes()
    assert files_below(tmp_path / "part") == files_below(tmp_path / "whole" / "part")
