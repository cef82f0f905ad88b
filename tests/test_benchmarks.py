"""The benchmarks run, write what they promise, and turn what is missing into a status."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pandas
import pytest
import torch

from benchmarks import (
    attention,
    benchmark_memory,
    benchmark_speed,
    checking,
    demo,
    features,
    from_scratch,
    grid,
    host,
    implementations,
    machine,
    plot_attention_sweep,
    visualize_results,
)
from benchmarks.call import Call
from benchmarks.checking import Oracle
from benchmarks.implementations import Implementation
from benchmarks.measure import COLUMNS, measure_all
from benchmarks.memory import peak_bytes
from benchmarks.problem import Problem
from benchmarks.sweep_table import SWEEP_CSV
from benchmarks.timing import time_calls, use_device
from flash_attention import _C, flash_attention, flash_attention_varlen
from flash_attention.reference import standard_attention

from .cases import Case
from .checks import FORWARD_ONLY

SMALL = Case(batch=1, heads_q=2, heads_kv=1, seqlen_q=40, seqlen_k=40, head_dim=16, causal=True)
SWEEP_COLUMNS = ["tag", "impl", "B", "H", "Tq", "Tkv", "D", "time_ms", "peak_mem_MB", "tflops", "status"]


def _tiny_run(main, folder: Path, *arguments: str) -> None:
    main(["--device", "cpu", "--budget", "1", "--output", str(folder), *arguments])


def _assert_pictures(folder: Path, *names: str) -> None:
    for name in names:
        assert (folder / name).read_bytes().startswith(b"\x89PNG"), name


def test_sweep_writes_its_columns_and_pictures(tmp_path: Path) -> None:
    _tiny_run(
        attention.main,
        tmp_path,
        "--sweep",
        "--max-length",
        "128",
        "--H",
        "2",
        "--no-memory",
        "--impl",
        "online",
        "ext",
        "torch_unfused",
    )
    frame = pandas.read_csv(tmp_path / SWEEP_CSV)
    assert list(frame.columns[: len(SWEEP_COLUMNS)]) == SWEEP_COLUMNS
    assert set(COLUMNS) <= {*frame.columns, "batch", "heads_q", "seqlen_q", "seqlen_k", "head_dim", "ms"}
    assert set(frame["tag"]) == {"prefill", "decode", "head_dim"}
    assert set(frame["impl"]) == {"fused", "split", "torch_unfused"}
    timed = frame[frame["impl"] != "split"]
    assert (timed["status"] == "ok").all() and (timed["time_ms"] > 0).all() and (timed["max_error"] < 1e-4).all()
    assert frame.loc[frame["impl"] == "split", "status"].str.startswith("unavailable: impl 'split'").all()
    pictures = [f"sweep_{name}.png" for name in ("time", "time_log", "memory", "tflops", "decode", "head_dim")]
    _assert_pictures(tmp_path, *pictures)
    (tmp_path / pictures[0]).unlink()
    plot_attention_sweep.main([str(tmp_path / SWEEP_CSV), "--output", str(tmp_path)])
    _assert_pictures(tmp_path, *pictures)


def test_every_benchmark_writes_its_results_and_one_overview(tmp_path: Path) -> None:
    _tiny_run(demo.main, tmp_path, "--lengths", "32", "64", "--no-memory")
    _tiny_run(benchmark_speed.main, tmp_path, "--lengths", "32", "64", "--heads", "2", "--no-memory")
    _tiny_run(
        benchmark_memory.main,
        tmp_path,
        "--lengths",
        "64",
        "--batch-lengths",
        "64",
        "--impl",
        "fused",
        "torch_unfused",
        "--memory-budget",
        "0.01",
        "--budget",
        "20",
    )
    impls = ("--impl", "fused", "torch_math", "megatron")
    _tiny_run(from_scratch.main, tmp_path, "--lengths", "32", "64", "--tokens", "64", *impls, "--no-memory")
    visualize_results.main([str(tmp_path)])
    pictures = ("demo.png", "speed.png", "from_scratch.png", "memory.png", "memory_batch.png", "overview.png")
    _assert_pictures(tmp_path, *pictures)
    pairs = pandas.read_csv(tmp_path / "from_scratch.csv")
    first = ["B", "H", "L", "D", "pytorch", "pytorch_ms", "pytorch_tflops", "ours", "ours_ms", "ours_tflops", "ratio"]
    assert list(pairs.columns[: len(first)]) == first
    assert pairs[["B", "L", "pytorch"]].values.tolist() == [
        *([2, 32, "torch_math"], [1, 64, "torch_math"], [2, 32, "megatron"], [1, 64, "megatron"])
    ]
    assert (pairs["ours"] == "fused").all()
    assert list(pandas.read_csv(tmp_path / "demo.csv").columns) == COLUMNS
    batches = pandas.read_csv(tmp_path / "memory_batch.csv")
    assert (batches["status"] == "ok").all()
    assert (batches["largest_batch"] >= 1).all() and (batches["total_bytes"] <= batches["budget_bytes"]).all()


def test_backward_of_one_case(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _tiny_run(attention.main, tmp_path, "--Tq", "40", "--H", "2", "--backward", "--impl", "fused", "--no-memory")
    assert "bwd" in capsys.readouterr().out


def test_host_time_has_a_row_for_each_implementation_and_pass(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    host.main(["--device", "cpu", "--batches", "1", "--output", str(tmp_path)])
    torch.set_num_threads(threads)
    frame = pandas.read_csv(tmp_path / host.CSV)
    assert list(frame.columns) == host.COLUMNS
    assert set(frame["pass"]) == {"fwd", "fwd+bwd"} and {"auto", "fused", host.DEFAULT} <= set(frame["impl"])
    timed = frame[frame["status"] == "ok"]
    assert (timed["us_min"] <= timed["us"]).all() and (timed["us"] <= timed["us_max"]).all()
    assert (timed.loc[timed["impl"] == host.DEFAULT, "ratio"] == 1).all() and len(timed) >= 8


def test_a_missing_device_is_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    frame = measure_all([Problem(SMALL, device="cuda")], ["fused", "torch_flash"], budget=1)
    assert len(frame) == 2 and frame["status"].str.contains("no CUDA device").all() and frame["ms"].isna().all()


def test_a_used_up_budget_is_a_status() -> None:
    frame = measure_all([Problem(SMALL)], ["fused"], budget=0)
    assert frame["status"].str.startswith("skipped: the budget").all()


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q, k, v, *, causal):
        return standard_attention(q, k, v, causal=not causal)

    monkeypatch.setattr("benchmarks.measure.find", lambda name: Implementation(name, wrong))
    frame = measure_all([Problem(SMALL)], ["fused"], budget=1, with_memory=False)
    assert frame["status"].str.startswith("wrong: error").all() and frame["ms"].isna().all()


@pytest.mark.parametrize("direction", ["fwd", "bwd", "fwd+bwd"])
def test_a_long_problem_is_checked_in_part(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checking.MAX_SCORES, "cpu", 500)
    problem = Problem(SMALL, direction)
    inputs = problem.inputs()
    call = Call(implementations.find("torch_unfused"), problem, inputs)
    assert Oracle(problem, inputs).check(call).status == "ok"


_FEATURES = {
    "bias": {"bias": "bhqk"},
    "shared bias": {"bias": "1h1k"},
    "alibi": {"alibi": "h"},
    "alibi of each sequence": {"alibi": "bh"},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.25},
    "packed": {"packed": True, "lengths_q": (9, 30), "lengths_k": (20, 40)},
}


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("feature", _FEATURES)
def test_every_feature_of_a_long_problem_is_checked_in_part(
    feature: str, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = _with_feature(feature, direction)
    inputs = problem.inputs()
    for max_scores in (500, 5000, 10**6):  # some rows of a few heads, one sequence or some heads of it, everything
        monkeypatch.setitem(checking.MAX_SCORES, "cpu", max_scores)
        oracle, call = Oracle(problem, inputs), Call(implementations.find("fused"), problem, inputs)
        verdict = oracle.check(call)
        assert verdict.status == "ok" and verdict.error < 1e-4


@pytest.mark.parametrize("feature", _FEATURES)
def test_a_feature_left_out_is_noticed(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_feature(q, k, v, **options):
        return flash_attention(q, k, v, causal=True)

    def without_mask(q, k, v, *, causal, **lengths):
        return flash_attention_varlen(q, k, v, **lengths)

    monkeypatch.setitem(checking.MAX_SCORES, "cpu", 500)
    problem = _with_feature(feature, "fwd")
    inputs = problem.inputs()
    call = Call(Implementation("without", without_feature, without_mask), problem, inputs)
    assert Oracle(problem, inputs).check(call).status != "ok"


def _with_feature(feature: str, direction: str) -> Problem:
    case = dataclasses.replace(SMALL, batch=2, heads_q=4, heads_kv=2, seqlen_k=50, **_FEATURES[feature])
    extras = tuple(name for name in ("bias", "alibi_slopes", "sinks") if name in case.inputs().leaves)
    return Problem(case, direction, extra_gradients=extras)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_a_peer_that_drops_by_bits_of_its_own_must_drop_as_many(direction: str) -> None:
    def drops(p: float) -> Implementation:
        def attention(q, k, v, *, causal, dropout_p, seed):
            return standard_attention(q, k, v, causal=causal, dropout_p=p, seed=seed + 1)

        return Implementation(f"drops {p}", attention, draws_own_bits=True)

    problem = Problem(dataclasses.replace(SMALL, heads_q=4, seqlen_q=128, seqlen_k=128, dropout_p=0.125), direction)
    inputs = problem.inputs()
    oracle = Oracle(problem, inputs)
    verdicts = {p: oracle.check(Call(drops(p), problem, inputs)) for p in (0.0, 0.01, 0.125, 0.6)}
    assert [verdict.status == "ok" for verdict in verdicts.values()] == [False, False, True, False]
    assert verdicts[0.0].is_wrong
    assert oracle.check(Call(implementations.find("torch_math"), problem, inputs)).status == "ok"


def test_a_backward_whose_bits_a_peer_drew_is_not_captured() -> None:
    dropped = dataclasses.replace(SMALL, dropout_p=0.125)

    def can_be_captured(name: str, case: Case, direction: str) -> bool:
        problem = Problem(case, direction)
        return Call(implementations.find(name), problem, problem.inputs()).can_be_captured

    assert not can_be_captured("torch_math", dropped, "bwd")
    assert can_be_captured("torch_math", dropped, "fwd") and can_be_captured("torch_math", SMALL, "bwd")
    assert can_be_captured("fused", dropped, "bwd")


def test_flex_attention_has_our_masks_and_biases_and_no_backward_on_a_cpu() -> None:
    case = Case(batch=2, heads_q=4, heads_kv=2, seqlen_q=40, seqlen_k=50, head_dim=16, window=(20, 3), softcap=3.0)
    case = dataclasses.replace(case, bias="1h1k", alibi="h", softmax_scale=0.3)
    problems = [Problem(case), Problem(case, "bwd"), Problem(dataclasses.replace(case, dropout_p=0.1))]
    frame = measure_all(problems, ["flex"], budget=60, with_memory=False)
    assert frame["status"].tolist() == [
        "ok",
        "unavailable: FlexAttention has no backward on a CPU",
        "unavailable: FlexAttention has no dropout_p",
    ]


def test_a_call_that_fails_while_timed_leaves_the_others() -> None:
    problem = Problem(SMALL)
    inputs = problem.inputs()
    good, bad = (Call(implementations.find("torch_unfused"), problem, inputs) for _ in range(2))

    def fail(*_, **__):
        raise RuntimeError("gone")

    bad._attention = fail
    timings = time_calls({"good": good, "bad": bad}, 0.01)
    assert timings["good"].ms_min <= timings["good"].ms <= timings["good"].ms_max and timings["good"].samples >= 3
    assert isinstance(timings["bad"], RuntimeError)


def test_costs_count_what_the_masks_leave() -> None:
    problem = Problem(Case(batch=2, heads_q=3, seqlen_q=5, seqlen_k=7, head_dim=8, head_dim_v=4, causal=True), "bwd")
    assert problem.visible_pairs == 2 * (3 + 4 + 5 + 6 + 7)
    assert problem.flops == 2.5 * 2 * 2 * 3 * (8 + 4) * 25
    assert Problem(Case(batch=1, seqlen_q=4, seqlen_k=4, window=(1, 1))).visible_pairs == 2 + 3 + 3 + 2
    assert Problem(Case(batch=1, seqlen_q=3, seqlen_k=1, causal=True)).visible_pairs == 1
    packed = Problem(Case(head_dim=8, causal=True, packed=True, lengths_q=(2, 3), lengths_k=(4, 3)))
    assert packed.visible_pairs == (3 + 4) + (1 + 2 + 3)
    assert packed.kv_bytes == 7 * 2 * (8 + 8) * 4 and packed.scores_bytes == (2 * 4 + 3 * 3) * 2 * 4
    assert packed.columns() | {"batch": 2, "seqlen_q": 3, "seqlen_k": 4} == packed.columns()


def test_ratios_take_the_best_of_each_side() -> None:
    rows = [
        {**Problem(SMALL).columns(), "impl": impl, "ms": ms, "status": status}
        for impl, ms, status in (
            ("naive", 9.0, "ok"),
            ("fused", 2.0, "ok"),
            ("split", 1.0, "inaccurate: error"),
            ("torch_flash", 4.0, "inaccurate: error"),
            ("torch_math", 8.0, "ok"),
            ("torch_cudnn", math.nan, "unavailable: no GPU"),
        )
    ]
    ratios = grid.ratios_to_best_peer(pandas.DataFrame(rows, columns=COLUMNS))
    assert ratios["ratio"].tolist() == [2.0] and ratios["peer"].tolist() == ["torch_flash"]
    assert ratios["ours"].tolist() == ["fused"]
    assert grid.geometric_mean(pandas.Series([2.0, 8.0])) == pytest.approx(4)


def test_grid_cells_carry_the_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = dataclasses.replace(SMALL, seqlen_q=1, causal=False)
    monkeypatch.setattr(grid, "_cpu_cells", lambda full: iter([("fwd", SMALL), ("bwd", SMALL), ("decode", decode)]))
    _tiny_run(grid.main, tmp_path, "--impl", "fused", "torch_flash", "--no-memory")
    frame = pandas.read_csv(tmp_path / "grid.csv")
    assert list(frame.columns[:19]) == [
        *("pass", "dtype", "batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_k", "head_dim", "causal"),
        *("impl", "ms", "ms_min", "ms_max", "tflops", "gbs", "peak_bytes", "max_error", "commit", "date"),
    ]
    _assert_pictures(tmp_path, "grid.png")
    assert frame["causal"].isna().tolist() == (frame["pass"] == "decode").tolist()
    assert len(grid.ratios_to_best_peer(grid.read_grid(tmp_path / "grid.csv"))) == 3


def test_grid_problems_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [Case(dtype, dim, batch=1, seqlen_q=32, seqlen_k=32) for dtype in ("f32", "bf16") for dim in (16, 32)]
    monkeypatch.setattr(grid, "_cpu_cells", lambda full: ((d, case) for d in ("fwd", "bwd") for case in cases))
    only = ("--dtype", "bfloat16", "--head-dims", "16", "64", "--passes", "bwd", "--mask", "full", "--lengths", "32")
    _tiny_run(grid.main, tmp_path, "--impl", "fused", "--no-memory", *only)
    frame = pandas.read_csv(tmp_path / "grid.csv")
    assert frame[["pass", "dtype", "head_dim"]].values.tolist() == [["bwd", "bfloat16", 16]]
    with pytest.raises(SystemExit):
        _tiny_run(grid.main, tmp_path, "--lengths", "7")


def test_features_have_a_row_for_each_implementation_and_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Case("f32", 16, batch=1, heads_q=2, seqlen_q=64, seqlen_k=64, causal=True)
    monkeypatch.setitem(features._PLAIN_CASES, "cpu", plain)
    impls = ["fused", "torch_unfused", "torch_math"]
    _tiny_run(features.main, tmp_path, "--impl", *impls, "--no-memory", "--budget", "20")
    frame = pandas.read_csv(tmp_path / features.CSV)
    assert list(frame.columns[:8]) == ["feature", "pass", "impl", "ms", "tflops", "dtype", "batch", "heads_q"]
    assert sorted(frame.columns[1:]) == sorted(COLUMNS)
    names = list(features.cases(plain))
    wanted = [[name, direction, impl] for name in names for direction in ("fwd", "bwd") for impl in impls]
    assert frame[["feature", "pass", "impl"]].values.tolist() == wanted
    assert (frame.loc[frame["impl"] == "fused", "status"] == "ok").all()
    assert frame.loc[frame["feature"] == "bias + its gradient", "status"].eq("ok").all()
    assert frame.loc[frame["ms"].isna(), "status"].str.startswith("unavailable").all()
    assert set(frame.loc[frame["feature"] == "dropout 0.125", "status"]) == {"ok"}
    _assert_pictures(tmp_path, "features.png")
    _tiny_run(
        features.main, tmp_path, "--impl", "fused", "--no-memory", "--features", "bias", "D192/", "--passes", "bwd"
    )
    frame = pandas.read_csv(tmp_path / features.CSV)
    assert frame["feature"].tolist() == ["bias", "bias + its gradient", "D192/128"] and set(frame["pass"]) == {"bwd"}
    with pytest.raises(SystemExit):
        _tiny_run(features.main, tmp_path, "--features", "nothing")


def test_a_feature_costs_what_it_slows_its_kernel_down() -> None:
    speeds = {
        ("plain causal", True): (6.0, 10.0),
        ("alibi", True): (3.0, 8.0),
        ("plain full", False): (8.0, math.nan),
        ("bias", False): (2.0, 12.0),
    }
    rows = [
        {"feature": feature, "causal": causal, "pass": direction, "impl": impl, "tflops": speed * factor}
        for (feature, causal), both in speeds.items()
        for direction, factor in (("fwd", 1), ("bwd", 0.5))
        for impl, speed in zip(("fused", "flex"), both, strict=True)
    ]
    costs = features.costs(pandas.DataFrame(rows)).tolist()
    assert costs == pytest.approx(2 * [1, 1] + 2 * [2, 1.25] + 2 * [1, math.nan] + 2 * [4, math.nan], nan_ok=True)


def test_what_compiles_is_measured_last_and_stands_with_its_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def measured(problems, impls, **_):
        order.extend(impls)
        return pandas.DataFrame([p.columns() | {"impl": impl} for p in problems for impl in impls], columns=COLUMNS)

    monkeypatch.setattr(features, "measure_all", measured)
    problems = [("full", Problem(dataclasses.replace(SMALL, causal=False))), ("causal", Problem(SMALL))]
    frame = features.measure(problems, ["flex", "fused", "torch_flash"], 1, with_memory=False)
    assert order == ["fused", "torch_flash", "flex"]
    assert frame["feature"].tolist() == 3 * ["full"] + 3 * ["causal"] and frame["impl"].tolist() == 2 * order
    assert frame["causal"].tolist() == 3 * [False] + 3 * [True]


def test_kernels_that_the_build_lacks_are_not_measured_by_default() -> None:
    built = {impl for impl, device in _C.kernels() if device == "cuda"}
    ours = [name for name in implementations.defaults("cuda") if name in implementations.OURS]
    assert set(ours) <= built
    assert implementations.present(["hopper", "auto", "fused", "torch_math"], "cpu") == ["auto", "fused", "torch_math"]


def test_the_environment_can_name_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTENTION_COMMIT", "abc1234")
    assert machine.commit.__wrapped__() == "abc1234"


def test_a_gpu_gives_its_results_folder_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.machine_name.__wrapped__("cuda") == "h200"


@pytest.fixture
def stream_of_its_own() -> Iterator[None]:
    """Timing leaves the default stream for good; the tests after it return to it."""
    with torch.cuda.stream(torch.cuda.current_stream()):
        yield
    use_device.cache_clear()


@pytest.mark.gpu
def test_every_implementation_is_timed_on_the_gpu_and_ours_in_graphs(stream_of_its_own: None) -> None:
    case = Case("f16", 64, batch=2, heads_q=4, seqlen_q=128, seqlen_k=128, causal=True)
    problems = [Problem(case, direction, "cuda") for direction in ("fwd", "bwd", "fwd+bwd")]
    problems.append(Problem(dataclasses.replace(case, seqlen_q=1, causal=False), "decode", "cuda"))
    frame = measure_all(problems, implementations.defaults("cuda"), budget=20)
    is_ours = frame["impl"].isin(implementations.OURS)
    ours = frame[is_ours & ~(frame["impl"].isin(FORWARD_ONLY) & frame["pass"].str.contains("bwd"))]
    assert (ours["status"] == "ok").all(), ours[["pass", "impl", "status"]].to_string()
    forward = ours[ours["pass"].isin(["fwd", "decode"])]
    assert (forward["timer"] == "graph").all(), forward[["pass", "impl", "timer", "ms"]].to_string()
    timed = frame[~is_ours & frame["pass"].isin(["fwd", "bwd"])]
    assert (timed["ms"] > 0).all() and (timed["peak_bytes"] > 0).all(), timed[["pass", "impl", "status"]].to_string()


@pytest.mark.gpu
def test_peers_with_features_are_checked_and_timed_on_the_gpu(stream_of_its_own: None) -> None:
    plain = Case("f16", 64, batch=2, heads_q=4, seqlen_q=256, seqlen_k=256, causal=True)
    lengths = {"lengths_q": (100, 156), "lengths_k": (100, 156)}
    for peer, changes in (
        ("flex", {"softcap": 5.0, "alibi": "h", "window": (64, -1)}),
        ("flex", {"bias": "bhqk", "causal": False}),
        ("torch_flash", {"dropout_p": 0.125}),
        ("torch_efficient", {"dropout_p": 0.125}),
        ("torch_flash", {"packed": True, **lengths}),
    ):
        case = dataclasses.replace(plain, **changes)
        problems = [Problem(case, direction, "cuda") for direction in ("fwd", "bwd")]
        frame = measure_all(problems, [peer, "fused"], budget=60)
        assert (frame["ms"] > 0).all() and (frame["status"] == "ok").all(), frame[
            ["pass", "impl", "status"]
        ].to_string()


@pytest.mark.gpu
def test_the_memory_that_megatron_keeps_is_counted() -> None:
    case = Case("f16", 64, batch=1, heads_q=4, seqlen_q=1024, seqlen_k=1024)
    problem = Problem(case, "fwd", "cuda")
    for _ in range(2):
        assert peak_bytes(problem, "megatron") >= 3 * problem.scores_bytes  # what is kept, the product, the softmax
