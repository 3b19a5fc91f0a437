"""The kernel benchmark checks results before it times, times every call, and measures nothing without a device."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks import _bench_device_time as device_time
from benchmarks import _bench_kernel_cases as kernel_cases
from benchmarks import bench_kernels
from benchmarks._bench_kernel_gate import gate, is_open, tolerance, words
from benchmarks._bench_kernel_peers import peers
from benchmarks._bench_kernel_pictures import draw_roofline
from decodax.kernels_pallas import KERNELS, shapes_of

pytestmark = pytest.mark.slow

RECORDED = {"kernel", "implementation", "shape", "dtype", "device", "bytes", "flops", "jax", "date"}


def quick(kernel):
    (case,) = kernel_cases.quick_cases(kernel)
    return case, case.operands(0)


def test_a_quick_run_on_cpu_gates_the_kernels_and_times_only_xla(tmp_path, capsys):
    path, picture = tmp_path / "result.json", tmp_path / "roofline.png"
    arguments = ["--quick", "--kernel", "grouped_matmul", "--output", str(path), "--picture", str(picture)]
    bench_kernels.main(arguments)
    assert "no time of this run says anything" in capsys.readouterr().out
    records = json.loads(path.read_text())["records"]
    runs = {record["implementation"]: record for record in records}
    assert set(runs) == {"tpu_interpreted", "gpu_interpreted", "xla", "ragged_dot"}
    for implementation, record in runs.items():
        assert record.keys() >= RECORDED
        if implementation != "xla":
            assert all(part["difference"] <= part["tolerance"] for part in record["gate"])
        assert ("seconds" in record) == (not implementation.endswith("interpreted"))
    timed = runs["xla"]
    least = timed["bytes"] / timed["copy_bytes_per_second"], timed["flops"] / timed["matmul_flops_per_second"]
    assert timed["fraction_of_roofline"] == pytest.approx(max(least) / timed["seconds"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_a_device_nothing_is_measured_or_written(monkeypatch, capsys):
    monkeypatch.setattr(bench_kernels, "measure", lambda *_: [])
    monkeypatch.setattr(bench_kernels.common, "write_json", lambda *_: pytest.fail("a result was written"))
    with pytest.raises(SystemExit):
        bench_kernels.main([])
    assert "only --quick runs here" in capsys.readouterr().err
    bench_kernels.main(["--quick", "--kernel", "linear_attention"])


def test_a_red_gate_keeps_a_kernel_from_being_timed(monkeypatch, tmp_path):
    real = bench_kernels.call

    def wrong(kernel, options, implementation):
        function = real(kernel, options, "xla")
        shift = 0.0 if implementation == "xla" else 1.0
        return lambda operands: jax.tree.map(lambda x: x + jnp.asarray(shift, x.dtype), function(operands))

    monkeypatch.setattr(bench_kernels, "call", wrong)
    monkeypatch.setattr(bench_kernels, "kernel_implementations", lambda: ["gpu"])
    path = tmp_path / "result.json"
    with pytest.raises(SystemExit, match="grouped_matmul, tiny, gpu"):
        bench_kernels.main(["--quick", "--kernel", "grouped_matmul", "--output", str(path)])
    records = {record["implementation"]: record for record in json.loads(path.read_text())["records"]}
    assert "seconds" not in records["gpu"] and "FAILS" in records["gpu"]["left_out"]
    assert records["xla"]["seconds"] > 0


def test_the_gate_detects_a_length_that_is_off_by_one():
    case, operands = quick("flash_decode")
    options = case.shape.options()
    run = jax.jit(kernel_cases.call("flash_decode", options, "xla"))
    expected = run(operands)
    assert is_open(gate("flash_decode", case.dtype, options, expected, expected))
    short = run(operands | {"length": operands["length"] - 1})
    outcome = gate("flash_decode", case.dtype, options, short, expected)
    assert not is_open(outcome) and not outcome[1]["holds"]  # one of 200 tokens: 0.005 of the log-sum-exp
    output, lse = expected
    for wrong_output in (output * jnp.nan, output + 1 / jnp.zeros((), output.dtype), 0 * output):
        outcome = gate("flash_decode", case.dtype, options, (wrong_output, lse), expected)
        assert [part["holds"] for part in outcome] == [False, True] and words(outcome).startswith("FAILS")


def test_the_gate_lets_rounding_through_and_wants_infinities_in_place():
    numbers = jnp.linspace(-1, 1, 101, dtype=jnp.float32)
    rounded = numbers.astype(jnp.bfloat16)
    assert is_open(gate("grouped_matmul", jnp.bfloat16, {}, rounded, numbers))
    assert tolerance(jnp.bfloat16) == pytest.approx(4 * 2**-7, abs=2e-5)
    lse = jnp.array([1.0, -jnp.inf])
    for other, holds in (([1.0, -jnp.inf], True), ([1.0, 0.0], False), ([-jnp.inf, -jnp.inf], False)):
        outcome = gate("flash_decode", jnp.bfloat16, {}, (lse, jnp.array(other)), (lse, lse))
        assert is_open(outcome) == holds


def test_no_loop_iteration_is_dropped_or_hoisted():
    """The product stays inside the loop, once for each copy of its operands, and the loop runs all its iterations."""
    copies = [{"left": jnp.ones((3, 5)), "right": jnp.ones((5, 7))} for _ in range(2)]
    product = lambda operands: jnp.dot(operands["left"], operands["right"])
    text = jax.jit(lambda copies: device_time.repeated(product, copies, 11)).lower(copies).compile().as_text()
    (body,) = re.findall(r"body=%([\w.]+)", text)
    by_name = dict(re.findall(r"\n%?([\w.]+) [^\n]*{\n(.*?)\n}", text, re.DOTALL))
    assert text.count(" dot(") == by_name[body].count(" dot(") == 2
    assert "constant(11)" in text


def test_the_time_of_a_call_is_that_of_the_run_over_iterations_and_copies(monkeypatch):
    ran = []

    def seconds(program, operands):
        program(operands)
        ran.append(len(operands))
        return 0.5

    monkeypatch.setattr(device_time, "seconds", seconds)
    run = device_time.timed(lambda operands: operands["x"] * 2.0, {"x": jnp.ones(3)}, run_seconds=5.0)
    assert run() == 0.5 / 20  # two iterations take half a second, so five seconds are twenty
    assert ran == [1, 1, 1]


def test_limits_and_comparisons_by_hand(capsys):
    limits = bench_kernels.Limits(copy_bytes_per_second=2.0, matmul_flops_per_second=10.0)
    assert limits.seconds(8, 10) == 4.0 and limits.seconds(8, 100) == 10.0
    one = {"implementation": "gpu", "kernel": "flash_decode"}
    ragged, equal = (
        {"shape": name, "seconds": s} for name, s in ((kernel_cases.RAGGED, 3.0), (kernel_cases.EQUAL, 2.0))
    )
    (found,) = bench_kernels.compare(
        [one | ragged, one | equal, one | equal | {"implementation": "xla", "seconds": 9.0}]
    )
    assert found["ratio"] == 1.5 and "at most 1.15" in capsys.readouterr().out
    assert bench_kernels.compare([one | equal]) == []


def test_cases_have_names_of_their_own_and_targets_name_cases():
    names = {kernel: [case.name for case in kernel_cases.cases(kernel)] for kernel in KERNELS}
    assert all(len(set(listed)) == len(listed) for listed in names.values())
    everything = {(kernel, name) for kernel, listed in names.items() for name in listed}
    compared = {pair for c in kernel_cases.COMPARISONS for pair in (c.of, c.over)}
    assert everything >= set(kernel_cases.TARGETS) | compared
    assert set(kernel_cases.TINY) == set(KERNELS)
    by_name = {case.name: case for case in kernel_cases.cases("flash_decode")}
    lengths = by_name[kernel_cases.RAGGED].replaced["length"]
    assert sum(lengths) == 8 * by_name[kernel_cases.EQUAL].shape.length
    assert sum(case.target is not None for case in by_name.values()) == 3


@pytest.mark.parametrize("kernel", KERNELS)
def test_tiny_sizes_are_tiny_and_no_bad_input(kernel):
    (case,) = kernel_cases.quick_cases(kernel)
    assert case.num_bytes() < 4e6 and case.shape.flops() < 1e9
    for implementation in ("xla", "tpu_interpreted", "gpu_interpreted"):
        jax.eval_shape(kernel_cases.call(kernel, case.shape.options(), implementation), case.shape.operands())


def test_operands_are_replaced_as_in_the_case():
    (case,) = kernel_cases.quick_cases("flash_decode")
    changed = dataclasses.replace(case, replaced={"length": (3, 5)}).operands(0)
    assert changed["length"].tolist() == [3, 5]
    assert case.operands(0)["length"].tolist() == [200, 200]


def test_peers_compute_the_same():
    case, operands = quick("grouped_matmul")
    ((function, its_operands),) = peers(case, operands).values()
    expected = kernel_cases.call("grouped_matmul", {}, "xla")(operands)
    assert is_open(gate("grouped_matmul", case.dtype, {}, function(its_operands), expected))
    prefill, operands = quick("flash_prefill")
    assert peers(prefill, operands) == {}  # cuDNN is there only on a GPU


def test_cudnn_is_compared_only_on_supported_cases(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    taken = {}
    for name, shape in shapes_of("flash_prefill").items():
        tiny = dataclasses.replace(shape, **kernel_cases.TINY["flash_prefill"])
        operands = {key: jnp.zeros(leaf.shape, leaf.dtype) for key, leaf in tiny.operands().items()}
        operands["length"] = jnp.full(1, 64) if shape.length is None else jnp.full(1, 63)
        taken[name] = list(peers(kernel_cases.Case("flash_prefill", name, tiny), operands))
    assert taken["llama3-8b prefill, 16k"] == ["cudnn"]
    special = ("cached", "local layer", "streaming", "deepseek")  # a prefix, windows, sinks, values of another size
    assert not any(found for name, found in taken.items() if any(word in name for word in special))


def test_a_picture_needs_something_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no record with a time"):
        draw_roofline({"device": "x", "records": [{"kernel": "flash_decode"}]}, tmp_path / "roofline.png")


def test_a_run_of_one_kernel_keeps_the_records_of_others(monkeypatch, tmp_path):
    def record(kernel, shape, date):
        return {"kernel": kernel, "shape": shape, "implementation": "xla", "target": None, "date": date}

    monkeypatch.setattr(bench_kernels, "measure", lambda case, *_: [record(case.kernel, case.name, "new")])
    path = tmp_path / "result.json"
    held = [("linear_attention", "tiny"), ("grouped_matmul", "tiny"), ("grouped_matmul", "no longer there")]
    path.write_text(json.dumps({"records": [record(*which, "old") for which in held]}))
    bench_kernels.main(["--quick", "--kernel", "grouped_matmul", "--output", str(path)])
    dates = {(r["kernel"], r["shape"]): r["date"] for r in json.loads(path.read_text())["records"]}
    assert dates == {("linear_attention", "tiny"): "old", ("grouped_matmul", "tiny"): "new"}


def test_too_little_memory_for_one_contestant_leaves_the_others(monkeypatch):
    case, _ = quick("grouped_matmul")
    real = bench_kernels.device_time.timed

    def timed(function, operands, **options):
        if isinstance(operands, tuple):  # the peer's
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return real(function, operands, **options)

    monkeypatch.setattr(bench_kernels.device_time, "timed", timed)
    monkeypatch.setattr(bench_kernels, "kernel_implementations", list)
    records = {
        r["implementation"]: r for r in bench_kernels.measure(case, bench_kernels.Limits(1e9, 1e9), bench_kernels.QUICK)
    }
    assert records["xla"]["seconds"] > 0
    assert "RESOURCE_EXHAUSTED" in records["ragged_dot"]["left_out"] and "seconds" not in records["ragged_dot"]
