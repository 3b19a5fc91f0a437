"""The script for a GPU's first minutes records whatever a check does, keeps its time, and catches wrong values."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _bench_kernel_cases as kernel_cases
from benchmarks import _gpu_checks, _gpu_runner, gpu_first_minutes
from benchmarks._gpu_cases import CASES, REPEATED, TIMED, ValueCase, poisoned
from benchmarks._gpu_checks import compare, error_bounds, in_float32, read_limits, run_poisoned
from benchmarks._gpu_runner import ROOT, Check, line, run_checks, summary
from decodax.kernels_pallas import KERNELS

PASSES = 'import sys; open(sys.argv[1], \'w\').write(\'{"passed": true, "line": "fine"}\')'
HANGS = "import time; print('started', flush=True); time.sleep(100)"


def python(name, code, limit_s=30.0, **more):
    return Check(name, (sys.executable, "-c", code), limit_s, **more)


def run(tmp_path, *checks, seconds=60.0, jobs=1):
    path = tmp_path / "minutes.json"
    records = run_checks(checks, path, head={"small": True}, seconds=seconds, jobs=jobs)
    assert json.loads(path.read_text()) == {"small": True, "records": records}
    return {record["name"]: record for record in records}


def test_whatever_a_check_does_is_recorded_and_the_others_run(tmp_path, capsys):
    says_no = PASSES.replace("true", "false")
    refuses = PASSES.replace("fine", 'no\\", \\"refused\\": \\"no')
    found = run(
        tmp_path,
        python("raises", "print('here'); raise RuntimeError('a wrong barrier')"),
        python("hangs", HANGS, 0.5),
        python("is killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        python("says no", says_no),
        python("says nothing", ""),
        python("refuses", refuses),
        python("needs what hung", PASSES, needs="hangs"),
        python("needs what said no", PASSES, needs="says no"),
        python("left out", PASSES, skip="not installed"),
        python("may hang", HANGS, 0.5, may_time_out=True),
        python("passes", PASSES),
    )
    statuses = {name: record["status"] for name, record in found.items()}
    assert statuses == {
        "raises": "raised",
        "hangs": "timed out",
        "is killed": "killed",
        "says no": "failed",
        "says nothing": "failed",
        "refuses": "refused",
        "needs what hung": "skipped",
        "needs what said no": "passed",
        "left out": "skipped",
        "may hang": "no time left",
        "passes": "passed",
    }
    assert found["raises"]["last_lines"][-1] == "RuntimeError: a wrong barrier"
    assert found["hangs"]["last_lines"] == ["started"] and found["hangs"]["seconds"] < 20
    assert found["is killed"]["line"] == "by SIGKILL"
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(found) and "a wrong barrier" in printed[0]
    assert summary(list(found.values())).startswith("1 raised, 1 timed out, 1 killed, 2 failed, 1 refused")


def test_what_a_hanging_check_started_is_ended_too(tmp_path):
    note = tmp_path / "process"
    code = f"import subprocess; p = subprocess.Popen(['sleep', '100']); open({str(note)!r}, 'w').write(str(p.pid))"
    run(tmp_path, python("hangs", f"{code}; {HANGS}", 2.0))
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int(note.read_text()), 0)
            time.sleep(0.05)


def test_a_spent_budget_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(_gpu_runner, "LEAST_SECONDS", 1.0)
    found = run(tmp_path, python("long", HANGS), python("next", PASSES, needs="long"), seconds=2.0)
    assert [record["status"] for record in found.values()] == ["no time left", "no time left"]
    assert found["long"]["last_lines"] == ["started"]  # it was cut off by the budget, not by its own limit


def test_checks_run_beside_each_other_unless_alone(tmp_path):
    """Two that wait for each other pass; one that runs alone sees neither, though it comes between others."""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")

    def meet(own, other):
        return (
            f"import os, sys, time; open({own!r}, 'w').close()\n"
            f"while not os.path.exists({other!r}): time.sleep(0.02)\n"
            f"time.sleep(0.5); os.remove({own!r}); {PASSES}"
        )

    alone = f"import os; assert not os.path.exists({one!r}) and not os.path.exists({two!r}); {PASSES}"
    checks = [python("one", meet(one, two)), python("two", meet(two, one)), python("alone", alone, alone=True)]
    found = run(tmp_path, *checks, jobs=2)
    assert {record["status"] for record in found.values()} == {"passed"}


def test_the_file_can_be_read_at_any_time_and_a_stopped_run_ends_its_checks(tmp_path):
    path, note = tmp_path / "minutes.json", tmp_path / "process"
    hangs = f"import os; open({str(note)!r}, 'w').write(str(os.getpid())); {HANGS}"
    code = (
        "import sys; from pathlib import Path; from benchmarks._gpu_runner import Check, end_on_sigterm, run_checks\n"
        "end_on_sigterm()\n"
        f"codes = [{PASSES!r}, {hangs!r}]\n"
        "checks = [Check(str(i), (sys.executable, '-c', code), 60.0) for i, code in enumerate(codes)]\n"
        f"run_checks(checks, Path({str(path)!r}), head={{}}, seconds=60.0)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    start = time.monotonic()
    while not (note.exists() and note.read_text()) and time.monotonic() - start < 30:
        if path.exists():
            json.loads(path.read_text())
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert [record["status"] for record in json.loads(path.read_text())["records"]] == ["passed"]
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int(note.read_text()), 0)
            time.sleep(0.05)


def test_the_process_that_runs_the_checks_takes_no_device():
    code = (
        "import sys, benchmarks._gpu_runner; assert 'jax' not in sys.modules\n"
        "from pathlib import Path; from benchmarks.gpu_first_minutes import Options, plan\n"
        "assert plan(Options(Path('x')), ['mla_decode'])\n"
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_non_finite_numbers_are_written_by_name(tmp_path):
    infinite = "import sys; from benchmarks._json_file import write_json_file; from pathlib import Path\n"
    infinite += "write_json_file(Path(sys.argv[1]), {'passed': True, 'worst': [float('inf'), float('nan'), 1.5]})"
    assert run(tmp_path, python("infinite", infinite))["infinite"]["worst"] == ["inf", "nan", 1.5]


def test_the_plan_goes_from_cheap_to_dear_and_has_every_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_first_minutes.shutil, "which", lambda *_, **__: "/x/compute-sanitizer")
    options = gpu_first_minutes.Options(tmp_path / "minutes.json")
    checks = gpu_first_minutes.plan(options, list(KERNELS))
    names = [check.name for check in checks]
    assert len(set(names)) == len(names) and names[:2] == ["versions", "speeds"]
    steps = list(dict.fromkeys(name.split(":")[0] for name in names[2:]))
    assert steps == ["compiled", "values", "repeats", "memcheck", "times", "racecheck"]
    for step in ("compiled", "values", "repeats", "times"):
        assert {kernel for kernel in KERNELS if any(name.startswith(f"{step}: {kernel}") for name in names)} == {
            *KERNELS
        }
    assert {check.needs for check in checks} <= {"", *names}
    assert all(check.alone == check.name.startswith("times") for check in checks[2:])
    memcheck = checks[names.index("memcheck: mla_decode")]
    assert memcheck.command[0] == "/x/compute-sanitizer" and "values" in memcheck.command and memcheck.may_time_out
    small = gpu_first_minutes.plan(gpu_first_minutes.Options(tmp_path / "minutes.json", small=True), ["mla_decode"])
    assert [check.name.split(":")[0] for check in small] == ["versions", "speeds", "compiled", "values", "repeats"]
    monkeypatch.setattr(gpu_first_minutes.shutil, "which", lambda *_, **__: None)
    (missing,) = gpu_first_minutes.sanitized(options, "memcheck", ["mla_decode"])
    assert missing.skip


def test_a_failed_check_makes_the_exit_code_1(tmp_path, monkeypatch):
    outcome = {"name": "values", "status": "passed", "seconds": 0.0}
    monkeypatch.setattr(gpu_first_minutes, "run_checks", lambda *_, **__: [outcome])
    arguments = ["--output", str(tmp_path / "minutes.json")]
    for status in ("passed", "refused", "no time left", "skipped"):
        outcome["status"] = status
        gpu_first_minutes.main(arguments)
    for status in ("failed", "raised", "timed out", "killed"):
        outcome["status"] = status
        with pytest.raises(SystemExit) as ended:
            gpu_first_minutes.main(arguments)
        assert ended.value.code == 1


def test_without_a_hopper_gpu_nothing_is_tried():
    with pytest.raises(RuntimeError, match="only --small runs here"):
        _gpu_checks.versions(_gpu_checks.Settings())
    found = _gpu_checks.versions(_gpu_checks.Settings(small=True))
    assert found["passed"] and found["versions"]["jax"] == jax.__version__


def test_named_shapes_exist():
    for kernel, name in TIMED:
        assert name in [case.name for case in kernel_cases.cases(kernel)]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernel_takes_every_case(kernel):
    for name, case in {**CASES[kernel], "repeated": REPEATED[kernel]}.items():
        run = kernel_cases.call(kernel, case.options(), "gpu")
        arrays = {key: value for key, value in case.replaced.items() if not callable(value)}
        described = {key: jax.ShapeDtypeStruct(np.shape(value), jnp.int32) for key, value in arrays.items()}
        results = jax.eval_shape(run, {**case.shape.operands(), **described})
        assert jax.tree.leaves(results)[0].dtype == case.shape.dtype, name


def test_limits_are_read_from_the_file(tmp_path):
    path = tmp_path / "minutes.json"
    assert read_limits(path) is None
    path.write_text(json.dumps({"records": [{"name": "versions"}]}))
    assert read_limits(path) is None
    limits = {"copy_bytes_per_second": 2.0, "matmul_flops_per_second": 3.0}
    path.write_text(json.dumps({"records": [{"name": "speeds", "limits": limits}]}))
    assert read_limits(path).seconds(8, 3) == 4.0


def test_wrong_numbers_are_found_with_their_place():
    expected = jnp.asarray([[1.0, 2.0, -jnp.inf], [3.0, 4.0, 5.0]])
    bound = np.full((2, 3), 0.1)
    same = compare(expected + 0.05, expected, bound)
    assert same["passed"] and same["error_over_tolerance"] == pytest.approx(0.5, rel=1e-4)
    wrong = expected.at[1, 0].set(jnp.nan).at[1, 2].set(5.2).at[0, 2].set(0.0)
    found = compare(wrong, expected, bound)
    assert not found["passed"] and (found["num_wrong"], found["num_nan"]) == (3, 1)
    assert found["first_wrong"] == [[0, 2], [1, 0], [1, 2]] and found["wrong_along_axis"] == [[0, 1], [0, 2]]
    assert "3 of 6 wrong, 1 NaN, first [0, 2] of [2, 3]" in line(
        {"name": "values", "status": "failed", "seconds": 1.0, **found}
    )


def test_a_kernel_that_is_refused_or_wrong_has_no_time(monkeypatch):
    name = kernel_cases.cases("mla_decode")[0].name
    ours, xla = {"implementation": "gpu"}, {"implementation": "xla", "seconds": 1e-3}
    timed = {"seconds": 1e-4, "of_copy_bandwidth": 0.5, "of_matmul_rate": 0.25}
    xla |= timed
    settings = _gpu_checks.Settings(limits=_gpu_checks.bench_kernels.Limits(1.0, 1.0))
    outcomes = {}
    for what, record in {
        "timed": timed,
        "refused": {"left_out": "CUDA 12.9"},
        "wrong": {"left_out": "gate FAILS", "failed": True},
    }.items():
        monkeypatch.setattr(_gpu_checks.bench_kernels, "measure", lambda *_, record=record: [ours | record, xla])
        outcomes[what] = _gpu_checks.times("mla_decode", name, settings)
    assert {what: outcome["passed"] for what, outcome in outcomes.items()} == {
        "timed": True,
        "refused": False,
        "wrong": False,
    }
    assert [what for what, outcome in outcomes.items() if "refused" in outcome] == ["refused"]
    assert outcomes["timed"]["line"].startswith("gpu 100.0 us (0.50 of copy, 0.25 of product); xla 100.0 us")


def test_results_are_written_to_memory_that_was_nan():
    operands = {"x": jnp.arange(3.0)}
    assert run_poisoned(lambda operands: operands["x"] + 1, operands, 64).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.slow
def test_a_kernel_without_figures_of_ptxas_is_still_run(monkeypatch):
    """What fails ahead of time fails; what cannot be lowered raises, and its other checks are skipped."""

    def fail(*_):
        raise RuntimeError("no such topology")

    monkeypatch.setattr(_gpu_checks.ahead_of_time, "prepare", lambda _: None)
    monkeypatch.setattr(_gpu_checks.compile_kernels, "compile_gpu", fail)
    outcome = _gpu_checks.compiled("grouped_matmul", _gpu_checks.Settings())
    assert not outcome["passed"] and outcome["line"].endswith("RuntimeError: no such topology")
    monkeypatch.setattr(_gpu_checks, "call", fail)
    with pytest.raises(RuntimeError):
        _gpu_checks.compiled("grouped_matmul", _gpu_checks.Settings())


SOME = {kernel: next(iter(CASES[kernel])) for kernel in KERNELS}
SOME |= {"flash_prefill": "a cache", "grouped_matmul": "rows of nobody", "grouped_gate_up": "rows of nobody"}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_poison_does_not_reach_xla_and_lost_rows_break_the_bounds(kernel):
    """XLA in the operands' own dtype is within the bounds; with zeros instead of eight rows of an operand it is not."""
    case: ValueCase = CASES[kernel][SOME[kernel]]
    operands, options = case.operands(kernel), case.options()
    run = jax.jit(kernel_cases.call(kernel, options, "xla"))
    dirty = poisoned(kernel, operands, options)
    assert any(bool(jnp.isnan(x).any()) for x in jax.tree.leaves(dirty))
    exact = in_float32(operands)
    expected = jax.tree.leaves(run(exact))
    bounds = error_bounds(kernel, case, exact, expected)
    for got, wanted, bound in zip(jax.tree.leaves(run(dirty)), expected, bounds, strict=True):
        assert compare(got, wanted, bound)["passed"]
    name = next(name for name in ("value", "value_pages", "latent", "tokens") if name in operands)
    axis = operands[name].ndim - (3 if kernel == "linear_attention" else 2)
    lost = operands[name].at[(slice(None),) * axis + (slice(8, 16),)].set(0)
    results = zip(jax.tree.leaves(run(operands | {name: lost})), expected, bounds, strict=True)
    assert not all(compare(*triple)["passed"] for triple in results)


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter of JAX 0.10 compiles every program")
def test_a_small_run_on_cpu(tmp_path):
    path = tmp_path / "minutes.json"
    command = [sys.executable, "-m", "benchmarks.gpu_first_minutes", "--small", "--kernel", "grouped_matmul"]
    ended = subprocess.run([*command, "--output", str(path)], cwd=ROOT, capture_output=True, text=True)
    records = json.loads(path.read_text())["records"]
    assert ended.returncode == 0, ended.stdout
    assert [record["status"] for record in records] == ["passed"] * 5
    assert len(ended.stdout.splitlines()) == 6
    values = records[3]["outputs"][0]
    assert values["num_wrong"] == values["num_nan"] == 0 and 0 < values["error_over_tolerance"] <= 1
    assert records[4]["runs"] == 3 and records[4]["different_numbers"] == {}
