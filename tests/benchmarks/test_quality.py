"""The quality benchmark: what its regimes do to the rows, what its table says, and a run of every part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LENGTH = 4


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks' modules can be imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Two domains whose rows are all different."""
    path = tmp_path / "tokens.npz"
    np.savez(path, vocabulary=60000, one=np.arange(4000, dtype=np.uint16), two=np.arange(4000, 12000, dtype=np.uint16))
    return path


def test_held_out_rows_are_not_trained_on(quality: None, tokens: Path) -> None:
    import quality_data

    for regime in quality_data.REGIMES:
        train, held_out = quality_data.rows_of(tokens, LENGTH, regime)
        held = np.concatenate(list(held_out.values()))
        whole = {tuple(row) for row in train.tolist()}
        assert not whole & {tuple(row) for row in held.tolist()}
        assert train.shape == (3000 - len(held), LENGTH)


def test_regimes_copy_and_spoil(quality: None, tokens: Path) -> None:
    import quality_data

    def shares(regime: str) -> tuple[float, float]:
        train, _ = quality_data.rows_of(tokens, LENGTH, regime)
        noise = (np.diff(train, axis=1) != 1).any(1)  # a clean row counts upwards
        clean = [tuple(row) for row in train[~noise].tolist()]
        return 1 - len(set(clean)) / len(train), noise.mean()

    assert shares("clean") == (0, 0)
    copied, noise = shares("repeats")
    assert noise == 0
    assert copied > 0.4
    assert 0.09 < shares("noise")[1] < 0.11
    assert 0.09 < shares("dirty")[1] < 0.11
    with pytest.raises(ValueError, match="got 'muddy', expected one of clean"):
        quality_data.rows_of(tokens, LENGTH, "muddy")


def test_arms_are_parsed(quality: None) -> None:
    import quality
    import typer

    def parts(arm: str) -> tuple:
        return quality.Run(arm, "clean", 0, 1.0, "tiny", 16).parts

    assert parts("compile") == ("compile", 0.5, 32, 1.5e-3)
    assert parts("loss-random@0.25x128/2e-3") == ("loss-random", 0.25, 128, 2e-3)
    with pytest.raises(typer.BadParameter, match="got 'topc'"):
        parts("topc")


def test_the_table_compares_seed_by_seed(quality: None) -> None:
    from quality_report import seconds_to, table

    def record(arm: str, seed: int, loss: float) -> dict:
        curve = [[1.0, 5, loss + 2], [2.0, 10, loss + 1]]
        measured = {"curve": curve, "spent": 3.0, "steps": 15, "longest_step": 0.1, "GiB": None}
        return {"arm": arm, "seed": seed, "mean": loss, **measured}

    records = [record(arm, seed, loss + seed) for arm, loss in (("a", 4.0), ("b", 3.5)) for seed in range(3)]
    lines = table(records, "a", "clean", 3.0).splitlines()
    assert "| b | 3 | 15 | 4.5000 | -0.5000 (-0.5000 to -0.5000) | 2.5 | 0.10 |" in lines[-1]
    assert seconds_to(record("a", 0, 4.0), 4.5) == 2.5
    assert seconds_to(record("a", 0, 4.0), 3.9) is None


@pytest.mark.long
def test_quick(quality: None, capsys: pytest.CaptureFixture) -> None:
    import quality

    quality.main(quick=True)
    page = capsys.readouterr().out
    assert "failed" not in page
    assert "| loss-random@0.5x4 | 1 |" in page


def test_a_run_trains(quality: None, tokens: Path) -> None:
    import quality
    import torch

    run = quality.Run("trimmed@0.5x4/0.01", "dirty", 0, 1.0, "tiny", 8)
    record = quality.trained(run, _few(tokens), torch.device("cpu"))
    assert record["steps"] > 5
    assert record["spent"] >= 1.0
    assert record["mean"] < record["curve"][0][2]


def _few(tokens: Path) -> Path:
    """The same rows with a small vocabulary."""
    given = np.load(tokens)
    path = tokens.with_name("few.npz")
    np.savez(path, vocabulary=50, **{name: given[name] % 50 for name in ("one", "two")})
    return path
