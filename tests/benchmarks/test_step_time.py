"""The step benchmark: it runs, its tables and plot are drawn, and an interrupted run goes on."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import typer


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def test_an_interrupted_step_benchmark_goes_on_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_time = importlib.import_module("step_time")
    started: list[str] = []

    def measured(command: list[str]) -> str:
        started.append(command[-1])
        return command[-1]

    monkeypatch.setattr(step_time, "start", measured)
    monkeypatch.setattr(step_time, "outcome", lambda process, _: {"first": 1.0, "steps": [float(len(started))]})
    output = tmp_path / "out.json"
    options = {"device": "cpu", "quick": True, "output": output, "commit": "one"}

    step_time.main(**options, arm=["compile", "floor"], budget=0)
    assert not started
    step_time.main(**options, arm=["compile"])
    before = output.read_text()
    step_time.main(**options, arm=["compile", "floor"], again=True)
    assert started == ["compile", "floor"]
    assert json.loads(output.read_text())["samples"] == {
        "compile": json.loads(before)["samples"]["compile"],
        "floor": [{"first": 1.0, "steps": [2.0]}],
    }
    with pytest.raises(typer.BadParameter, match="has commit one, not two; name another output"):
        step_time.main(**{**options, "commit": "two"}, arm=["compile"], again=True)
    assert started == ["compile", "floor"]


@pytest.mark.parametrize(
    ("printed", "reason"),
    [("Traceback\nKeyError: 'x'\na warning at exit", "KeyError: 'x'"), ("killed\nfor memory", "for memory")],
)
def test_an_arm_that_dies_says_why(printed: str, reason: str) -> None:
    step_time = importlib.import_module("step_time")
    process = step_time.start([sys.executable, "-c", f"import sys; sys.exit({printed!r})"])
    assert step_time.outcome(process, timeout=60) == {"failed": reason}


def test_a_process_that_does_not_end_when_told_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    step_time = importlib.import_module("step_time")
    monkeypatch.setattr(step_time, "GRACE", 0.1)
    forever = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); [signal.pause() for _ in iter(int, 1)]"
    process = step_time.start([sys.executable, "-c", forever])
    assert step_time.outcome(process, timeout=1) == {"failed": "not done in 1 s"}
    assert process.wait(timeout=60) < 0


@pytest.mark.long
def test_the_step_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)  # arms are processes, as for a user
    output = tmp_path / "out.json"
    arms = ["floor+matmul", "sampled@0.5+budget=0.7"]
    importlib.import_module("step_time").main(device="cpu", quick=True, arm=arms, output=output)
    report = json.loads(output.read_text())
    samples = report["samples"]
    assert [len(runs[0]["steps"]) for runs in samples.values()] == [3, 3]
    table = (tmp_path / "out.md").read_text()
    assert table.count("\n| ") == 4
    draw = importlib.import_module("step_time_report").main
    draw([output])
    assert (tmp_path / "out.md").read_text() == table
    # What a profile on CUDA adds: every kernel is in one part, and the parts are the step.
    routed = samples["sampled@0.5+budget=0.7"][0]
    routed["steps"] = [0.004] * 3
    kernels = [
        "nvjet_tst",
        "flash_fprop",
        "triton_poi_fused_mul_0",
        "Memset (Unknown)",
        "void at::native::x",
        "_select",
    ]
    routed["profile"] = [[name, 2, 500.0] for name in kernels]
    output.write_text(json.dumps(report))
    draw([output])
    found = (tmp_path / "out.md").read_text()
    assert found.count("| 2 | 0.50 | 12% |") == 6
    assert "| rest | | 1.00 | 25% |" in found
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_matrix_names_arms_that_exist_and_is_shared_out_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, step_time = map(importlib.import_module, ("step_time_matrix", "step_time"))
    commands: list[list[str]] = []
    caches: list[str] = []

    def run(command: list[str], check: bool, env: dict[str, str]) -> None:
        commands.append(command)
        caches.extend((env["TORCHINDUCTOR_CACHE_DIR"], env["TRITON_CACHE_DIR"]))

    monkeypatch.setattr(matrix.subprocess, "run", run)
    monkeypatch.setattr(matrix.torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    for part in range(2):
        matrix.main(tmp_path / "new", budget=60, part=part, parts=2)
    assert len(set(caches)) == 2 * len(matrix.MATRIX)
    outputs = [Path(command[command.index("--output") + 1]).name for command in commands]
    assert sorted(outputs) == sorted(f"step_time-{name}-h100.json" for name in matrix.MATRIX)
    for command in commands:
        assert 0 < float(command[command.index("--budget") + 1]) <= 60
        for argument in command:
            if argument.startswith("--arm="):
                assert step_time.Arm.parse(argument.removeprefix("--arm="), 0.25).name in step_time.ARMS
        if "--model" in command:
            assert command[command.index("--model") + 1] in step_time.SHAPES
    commands.clear()
    matrix.main(tmp_path / "some", only=["qwen", "smollm"])
    assert [Path(command[command.index("--output") + 1]).name for command in commands] == [
        "step_time-qwen-h100.json",
        "step_time-smollm-h100.json",
    ]
    with pytest.raises(typer.BadParameter, match="only: got qwem, expected some of llama-1b"):
        matrix.main(tmp_path / "none", only=["qwem", "qwen"])


@pytest.mark.parametrize(
    ("arm", "given"),
    [
        ("sampled", {"ratio": 0.25, "router_body": "exact", "router_layers": "auto", "cuda_graphs": False}),
        ("sampled@0.5+fp8", {"ratio": 0.5, "router_body": "fp8", "router_head": "sampled"}),
        ("sampled+graphs+matmul", {"matmul": "fp8", "router_body": "exact", "cuda_graphs": True}),
        ("routed+fp8+layers=3+graphs", {"matmul": "exact", "router_body": "fp8", "router_layers": 3}),
    ],
)
def test_switches_are_options(arm: str, given: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    step_time = importlib.import_module("step_time")
    monkeypatch.setattr(step_time.cggr, "optimize", lambda model, **options: options)
    parsed = step_time.Arm.parse(arm, 0.25)
    options = step_time.ARMS[parsed.name](None, parsed)
    assert {name: options[name] for name in given} == given


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("sampld", "got 'sampld', expected one of eager, compile"),
        ("compile+graphs", "the switches except .budget=F and .checkpoint are for this package's arms"),
        ("sampled+graph", "expected NAME.@RATIO."),
        ("sampled+fp8=1", r"expected NAME.@RATIO.*\+fp8"),
        ("compile+matmul", "the switches except .budget=F and .checkpoint are for this package's arms"),
        ("compile+fp8", "the switches except .budget=F and .checkpoint are for this package's arms"),
        ("sampled@1.5", "expected NAME.@RATIO."),
        ("sampled+layers=0", "expected NAME.@RATIO."),
        ("sampled+budget=a", "expected NAME.@RATIO."),
    ],
)
def test_an_arm_that_is_none_is_named(arm: str, message: str) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        importlib.import_module("step_time").main(quick=True, arm=[arm])
