"""Pictures of the GPU benchmark."""

from __future__ import annotations

import json

import pytest


def row(tokens: int, active: float, floor: float) -> dict:
    times = {"w4a16": 4 * floor, "humming-indexed": 3 * floor, "humming-grouped": 2 * floor}
    return {"tokens": tokens, "active_experts": active, "floor_us": floor, "us": times}


ROWS = [row(1, 6.0, 19.1), row(64, 200.0, 637.2), row(8192, 256.0, 3204.5)]
DOCUMENT = {
    "gpu": "Abacus 9",
    "shape": "v4-flash",
    "routing": "uniform",
    "ceilings": {"read_gb_per_s": 4443.0, "bf16_tflop_per_s": 772.0},
    "backends": {"w4a16": "portable"},
    "results": ROWS,
}


@pytest.fixture
def plots(benchmarks):
    """The script."""
    import plots

    return plots


@pytest.fixture
def axes():
    from matplotlib.figure import Figure

    return Figure().add_subplot()


def lines(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


def test_times(plots, axes):
    """Each contender's line goes through its times, of a peer's two modes the faster, above the floor."""
    plots.draw_times(DOCUMENT, axes)
    found = lines(axes)
    assert set(found) == {"dsv4 W4A16", "Humming W4A16", "floor of this chip"}
    assert found["floor of this chip"] == [(row["tokens"], row["floor_us"]) for row in ROWS]
    assert found["Humming W4A16"] == [(row["tokens"], 2 * row["floor_us"]) for row in ROWS]


def test_roofline(plots, axes):
    """A contender that takes four times the floor lies a factor of four under the roof, everywhere."""
    plots.draw_roofline(DOCUMENT, axes)
    found = lines(axes)
    roof = lambda x: min(772.0, 4.443 * x)  # noqa: E731
    for x, y in found["dsv4 W4A16"]:
        assert roof(x) / y == pytest.approx(4, rel=1e-2)
    assert found["dsv4 W4A16"][0][0] == pytest.approx(2 / 0.5625, rel=1e-6)  # one token: two operations a weight
    for x, y in found["roof of this chip"]:
        assert y == pytest.approx(roof(x), rel=1e-6)


def test_files(plots, tmp_path):
    """Two small PNGs for every document with enough points, which one of whole models has not; an unknown contender is
    an error, and no picture."""
    results, output = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    (results / "h200_a.json").write_text(json.dumps(DOCUMENT))
    (results / "h200_b.json").write_text(json.dumps(DOCUMENT | {"results": ROWS[:2]}))
    (results / "h200_c.json").write_text(json.dumps({"runs": {}}))
    written = plots.render(results, output)
    assert [path.name for path in written] == ["h200_a_time.png", "h200_a_roofline.png"]
    assert sorted(output.iterdir()) == sorted(written)
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 200_000 for path in written)
    odd = [row | {"us": {"abacus": 1.0}} for row in ROWS]
    (results / "h200_a.json").write_text(json.dumps(DOCUMENT | {"results": odd}))
    with pytest.raises(ValueError, match="abacus"):
        plots.render(results, tmp_path / "none")
    assert not (tmp_path / "none").exists()
