"""The benchmark of attention over a cache: what it writes, what it counts, what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas
import pytest
import torch

from benchmarks import cache_checking, decode, decode_cases, implementations, visualize_results
from benchmarks.cache_checking import CacheOracle
from benchmarks.cache_problem import CacheCall, CacheProblem

from .cache_cases import CacheCase
from .test_benchmarks import stream_of_its_own  # noqa: F401, a fixture

SMALL = CacheCase(head_dim=16, heads_q=4, heads_kv=2, lengths=(40, 40), append=False, slack=0)
FIRST = [
    *("heads_q", "heads_kv", "batch", "seqlen_k", "layout", "page_size", "impl", "us", "gbs", "max_error"),
    *("commit", "date"),
]


@pytest.fixture
def small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("cpu", "cuda"):
        monkeypatch.setitem(decode_cases._HEADS, kind, ((4, 2), (2, 2)))
        monkeypatch.setitem(decode_cases._SIZES, kind, ((1, 48), (2, 64)))
        monkeypatch.setitem(decode_cases._VARIED, kind, ((2, 64),))


def _run(folder: Path, *arguments: str) -> pandas.DataFrame:
    decode.main(["--device", "cpu", "--budget", "20", "--output", str(folder), *arguments])
    return pandas.read_csv(folder / decode.CSV)


def test_a_run_writes_its_columns_and_a_picture_that_can_be_drawn_again(small_cases: None, tmp_path: Path) -> None:
    frame = _run(tmp_path)
    assert list(frame.columns) == decode.COLUMNS and frame.columns[: len(FIRST)].tolist() == FIRST
    assert (frame["status"] == "ok").all(), frame[["layout", "impl", "status"]].to_string()
    assert (frame[["us", "gbs"]] > 0).all(axis=None) and (frame["us_min"] <= frame["us"]).all()
    assert set(frame["layout"]) == set(decode_cases.LAYOUTS)
    paged = frame[frame["layout"] == "paged"]
    assert set(paged["page_size"]) == {1, 16, 64, 256} and set(paged["impl"]) == {"auto"}
    assert set(frame["seqlen_q"]) == {1, 2, 4, 8, 16, 32} and set(frame["head_dim"]) == {64, 128, 256}
    has_peer = frame.groupby(decode._PROBLEM)["impl"].agg(lambda impls: "torch_flash" in set(impls))
    is_plain = has_peer.index.get_level_values("layout").isin(["contiguous", "token_major"])
    assert has_peer.tolist() == is_plain.tolist()

    picture = tmp_path / "decode.png"
    picture.unlink()
    visualize_results.main([str(tmp_path)])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_problems_can_be_chosen(small_cases: None, tmp_path: Path) -> None:
    only = ("--heads", "4:2", "--batch", "2", "--lengths", "64", "--head-dims", "128", "--queries", "1")
    frame = _run(tmp_path, *only, "--layouts", "paged", "float8", "--dtype", "bfloat16", "--quick")
    assert frame["layout"].tolist() == 4 * ["paged"] + ["float8"]
    frame = _run(tmp_path, *only, "--layouts", "contiguous", "--impl", "auto", "reference", "torch_math")
    assert frame["impl"].tolist() == 2 * ["auto", "reference", "torch_math"]


@pytest.mark.parametrize(
    "arguments",
    [("--layouts", "spiral"), ("--heads", "7:7"), ("--lengths", "5"), ("--queries", "two"), ("--device", "abacus")],
    ids=" ".join,
)
def test_what_there_is_not_is_refused(arguments: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        _run(tmp_path, *arguments)
    assert not any(tmp_path.iterdir())


def test_a_used_up_budget_and_a_missing_device_are_statuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    frame = decode.measure([CacheProblem(SMALL)], ["auto"], 0)
    assert frame["status"].str.startswith("skipped: the budget").all()
    frame = decode.measure([CacheProblem(SMALL, "cuda")], ["auto", "torch_cudnn"], 1)
    assert len(frame) == 2 and frame["status"].str.contains("no CUDA device").all() and frame["us"].isna().all()
    decode.print_results(frame)


def test_the_bytes_of_the_tokens_are_counted() -> None:
    def kv_bytes(**changes) -> int:
        return CacheProblem(dataclasses.replace(SMALL, **changes)).kv_bytes

    of_token = 2 * 2 * 16 * 4
    assert kv_bytes() == 80 * of_token
    assert kv_bytes(lengths=(7, 40)) == 47 * of_token
    assert kv_bytes(lengths=(38, 38), append=True, seqlen_q=2) == 80 * of_token
    assert kv_bytes(dtype="bf16", page_size=16) == 80 * of_token // 2
    assert kv_bytes(dtype="bf16", float8=True) == 80 * of_token // 4


def test_a_gpu_is_measured_on_every_size_that_was_promised() -> None:
    sizes = [(1, 1024), (1, 4096), (1, 16384), (1, 65536), (8, 1024), (8, 8192), (32, 4096), (128, 1024)]
    wanted = {(*heads, *size) for heads in ((32, 8), (32, 32), (64, 8)) for size in sizes}
    problems = [CacheProblem(case).columns() for case in decode_cases.cases("cuda")]
    for layout in ("contiguous", "token_major"):
        plain = pandas.DataFrame(p for p in problems if p["layout"] == layout and p["dtype"] == "bfloat16")
        assert wanted == set(plain[FIRST[:4]].itertuples(index=False, name=None))
    mixed = [case.lengths for case in decode_cases.cases("cuda") if len(set(case.lengths)) > 1]
    assert all(min(lengths) * 16 == max(lengths) for lengths in mixed) and len(mixed) == 2


def test_speed_is_held_against_the_same_kernel_on_the_contiguous_cache() -> None:
    row = CacheProblem(dataclasses.replace(SMALL, head_dim=128)).columns() | {"impl": "auto", "gbs": 8.0}
    rows = [row, row | {"layout": "paged", "gbs": 6.0}, row | {"head_dim": 64, "gbs": 4.0}]
    rows += [row | {"impl": "torch_flash", "gbs": 2.0}, row | {"batch": 7, "layout": "paged"}]
    assert decode.of_contiguous(pandas.DataFrame(rows)).fillna(-1).tolist() == [1, 0.75, 0.5, 1, -1]


@pytest.mark.parametrize("changes", [{}, {"page_size": 16}, {"append": True, "rotary": "halves"}], ids=str)
def test_a_large_problem_is_checked_in_parts(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cache_checking._PART_SIZE, "cpu", 1)
    problem = CacheProblem(dataclasses.replace(SMALL, lengths=(33, 40, 21, 40, 40), **changes))
    inputs = problem.inputs()
    oracle, call = CacheOracle(problem, inputs), CacheCall("auto", problem, inputs)
    assert len(oracle._parts) == cache_checking._MOST_PARTS < 10
    verdict = oracle.check(call)
    assert verdict.status == "ok" and verdict.error < 1e-5
    inputs["q"][-1, -1] += 1  # the last head of the last sequence
    assert oracle.check(call).is_wrong


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q, k, v, *, causal):
        return 2 * v[:, :1, :1].expand_as(q)

    monkeypatch.setattr("benchmarks.cache_problem.find", lambda name: implementations.Implementation(name, wrong))
    frame = decode.measure([CacheProblem(SMALL)], ["torch_flash"], 1)
    assert frame["status"].str.startswith("wrong: error").all() and frame["us"].isna().all()


@pytest.mark.gpu
@pytest.mark.usefixtures("stream_of_its_own")
def test_short_calls_are_timed_in_graphs_on_the_gpu(small_cases: None) -> None:
    problems = [CacheProblem(case, "cuda") for case in decode_cases.cases("cuda")]
    frame = decode.measure(problems, [], 60)
    ours = frame[frame["impl"] == "auto"]
    assert (ours["status"] == "ok").all(), ours[["layout", "dtype", "seqlen_q", "status"]].to_string()
    assert (ours["timer"] == "graph").all() and (ours["gbs"] > 0).all()
