"""Tables in README.md are what the results say."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = "# Title\n\n<!-- bench:cpu_layer -->\nold\n<!-- /bench -->\n\ntext\n\n<!-- demo -->\n<!-- /demo -->\n"


def timing(median_us: float) -> dict[str, float]:
    return {"median_us": median_us, "p10_us": median_us, "p90_us": median_us, "calls": 17}


RESULTS = {
    "commit": "0123456789ab",
    "cpu": "Abacus 9",
    "threads": 2,
    "versions": {"torch": "2.99", "transformers": "5.99"},
    "inputs": 8,
    "backend": {"w4a16": "reference", "w4a4-token": "reference"},
    "weight_bytes": {"w4a16": 281_000, "w4a4-token": 281_000, "peer": 1_000_000},
    "weight_target": 0.3,
    "results": [
        {
            "tokens": 32,
            "peer": "eager",
            "times": {"w4a16": timing(3000), "w4a4-token": timing(4500), "eager": timing(1500)},
            "ratios": {"w4a16": 2.0, "w4a4-token": 3.0},
            "ratio_target": 4.0,
        }
    ],
}


@pytest.fixture
def tables(monkeypatch) -> Callable[..., str | None]:
    """The script: ``tables(*arguments)`` gives what it has to complain about, None if nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: str) -> str | None:
        monkeypatch.setattr("sys.argv", ["tables.py", *arguments])
        try:
            module.main()
        except SystemExit as end:
            return str(end)
        return None

    return run


@pytest.fixture
def paths(tmp_path) -> tuple[Path, list[str]]:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    readme.write_text(README)
    (results / "cpu_layer.json").write_text(json.dumps(RESULTS))
    return readme, ["--readme", str(readme), "--results", str(results)]


def test_readme_agrees_with_the_results(tables):
    """The tables in README.md are the ones that the JSON files give: no number is there that nobody measured."""
    assert tables("--check") is None


def test_writing_and_checking(paths, tables):
    """--check fails on a table that is out of date and changes nothing; writing makes it pass."""
    readme, arguments = paths
    assert tables("--check", *arguments) is not None
    assert readme.read_text() == README
    assert tables(*arguments) is None
    assert tables("--check", *arguments) is None
    text = readme.read_text()
    assert "old" not in text
    assert "| 32 | 1.5 ms (`eager`) | 3 ms (**2.00x**) | 4.5 ms (**3.00x**) | 4x |" in text
    assert "**0.281x**" in text
    assert all(fact in text for fact in ("Abacus 9, 2 threads", "torch 2.99", "0123456789ab", "17 calls"))
    assert text.startswith("# Title\n")
    assert text.endswith("text\n\n<!-- demo -->\n<!-- /demo -->\n")


def test_a_changed_number_is_noticed(paths, tables):
    """A number edited by hand makes --check fail."""
    readme, arguments = paths
    tables(*arguments)
    readme.write_text(readme.read_text().replace("2.00x", "1.00x"))
    assert tables("--check", *arguments) is not None


def test_missing_comments(paths, tables):
    """Results without a place in the README are an error, not silence."""
    readme, arguments = paths
    readme.write_text("# Title\n")
    with pytest.raises(ValueError, match="bench:cpu_layer"):
        tables(*arguments)


def gpu_document(*results: dict) -> dict:
    return {
        "commit": "0123456",
        "gpu": "Abacus 9",
        "shape": "v4-flash",
        "routing": "uniform",
        "versions": {"torch": "2.99", "triton": "3.99"},
        "backends": {"w4a16": "portable", "w4a4-token": "portable"},
        "results": list(results),
    }


def gpu_table(document: dict, paths, tables) -> list[list[str]]:
    readme, arguments = paths
    readme.write_text("<!-- bench:h200_v4_flash -->\n<!-- /bench -->\n" + README)
    (Path(arguments[-1]) / "h200_v4_flash.json").write_text(json.dumps(document))
    assert tables(*arguments) is None
    lines = readme.read_text().splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[: lines.index("")]]


def test_peers_are_compared_with_the_mode_that_computes_the_same(paths, tables):
    """A peer that quantizes activations stands beside our W4A4, another beside W4A16; of two modes the faster counts.

    A peer, or a mode of ours, without a time in a row has a dash there; one without any time has no column.
    """
    ours = {"w4a16": 100.0, "w4a4-token": 50.0}
    first = ours | {"humming-indexed": 90.0, "humming-grouped": 80.0, "vllm-emulation": 300.0}
    second = {"w4a16": 200.0, "humming-indexed": 150.0, "grouped-mm": 400.0}
    head, _, *rows = gpu_table(
        gpu_document({"tokens": 1, "floor_us": 25.0, "us": first}, {"tokens": 4, "floor_us": 50.0, "us": second}),
        paths,
        tables,
    )
    assert head[4:] == ["Humming W4A16, faster mode", "torch grouped_mm bf16 (products)", "vLLM emulation W4A4"]
    assert rows[0][2:] == ["100 (25%)", "50 (50%)", "80 (dsv4 0.80x its speed)", "-", "300 (dsv4 6.00x its speed)"]
    assert rows[1][2:] == ["200 (25%)", "-", "150 (dsv4 0.75x its speed)", "400 (dsv4 2.00x its speed)", "-"]


def written(name: str, document: dict, folder: Path, tables) -> str:
    """What a README with one table in it says then."""
    readme = folder / "README.md"
    readme.write_text(f"<!-- bench:{name} -->\n<!-- /bench -->\n")
    (folder / f"{name}.json").write_text(json.dumps(document))
    assert tables("--readme", str(readme), "--results", str(folder)) is None
    return readme.read_text()


def test_layers_in_vllm(tmp_path, tables):
    """Ours stand beside the faster of vLLM's own kernels; what has no time has a dash, and no ratio."""
    names = ("vllm-marlin", "vllm-humming", "vllm-dsv4-w4a16", "vllm-dsv4-w4a4")
    document = {
        "commit": "0123456",
        "gpu": "Abacus 9",
        "shape": "v4-flash",
        "routing": "uniform",
        "versions": {"torch": "2.99", "triton": "3.99", "vllm": "0.99"},
        "peers": {name: {"kernel": "dsv4 portable"} for name in names},
        "results": [
            {"tokens": 1, "floor_us": 20.0, "us": dict(zip(names, (60.0, 50.0, 40.0, 100.0), strict=True))},
            {"tokens": 8, "floor_us": 90.0, "us": {"vllm-dsv4-w4a16": 200.0, "vllm-marlin": 300.0}},
            {"tokens": 9, "floor_us": 90.0, "us": {"vllm-dsv4-w4a16": 200.0}},
        ],
    }
    text = written("h200_vllm_layers", document, tmp_path, tables)
    assert "| 1 | 20 | 60 | 50 | 40 (1.25x) | 100 (0.50x) |" in text
    assert "| 8 | 90 | 300 | - | 200 (1.50x) | - |" in text
    assert "| 9 | 90 | - | - | 200 | - |" in text
    assert "Abacus 9, vLLM 0.99, torch 2.99, Triton 3.99, dsv4 portable, commit 0123456" in text


def test_whole_models_in_vllm(tmp_path, tables):
    """Decoding and prefill of each setting, with what computed its experts; ratios against the first one."""

    def run(experts: str, *speeds: tuple[float, float]) -> dict[str, object]:
        rows = [
            {"batch": batch, "decode_tokens_per_s": decode, "prefill_tokens_per_s": prefill}
            for batch, (decode, prefill) in zip((1, 64), speeds, strict=True)
        ]
        return {"vllm": "0.99", "torch": "2.99", "gpu": "Abacus 9", "experts": [experts], "results": rows}

    document = {
        "commit": "0123456",
        "model": {"layers": 3, "hidden": 64, "intermediate": 32, "experts": 8, "top_k": 2},
        "prompt": 16,
        "tokens": 17,
        "attention": "ABACUS",
        "runs": {
            "vllm": run("MarlinExperts", (500.0, 4000.0), (8000.4, 1e5)),
            "dsv4-w4a16": run("Nvfp4Experts (hopper)", (600.0, 3000.0), (8000.4, 15e4)),
        },
    }
    text = written("h200_vllm_generate", document, tmp_path, tables)
    assert "vLLM's own (MarlinExperts): decode, prefill | dsv4 W4A16 (Nvfp4Experts (hopper)): decode, prefill" in text
    assert "| 1 | 500, 4,000 | 600 (1.20x), 3,000 (0.75x) |" in text
    assert "| 64 | 8,000, 100,000 | 8,000 (1.00x), 150,000 (1.50x) |" in text
    assert "16 in and 17 out; a Qwen3-MoE model of 3 layers" in text
    assert "Abacus 9, vLLM 0.99, torch 2.99, commit 0123456" in text


def test_conversions(tmp_path, tables):
    """A row for each converter of each source: its rate, its memory, and what part of the source it had."""
    runs = [
        {"name": "dsv4, jobs 2", "seconds": 1.0, "source_mb_per_s": 123.4, "peak_anonymous_bytes": 5_600_000},
        {"name": "modelopt", "seconds": 1.0, "source_mb_per_s": 7.8, "peak_anonymous_bytes": 9_000_000, "shards": 2},
    ]
    document = {
        "commit": "0123456789ab",
        "cpu": "Abacus 9",
        "cores": 2,
        "versions": {"torch": "2.99"},
        "results": [{"kind": "mxfp4", "source": {"bytes": 4_000_000_000, "shards": 8}, "runs": runs}],
    }
    text = written("convert", document, tmp_path, tables)
    assert "| MXFP4, 4.0 GB | dsv4, jobs 2 | 123 | 6 MB |" in text
    assert "| MXFP4, 4.0 GB | ModelOpt's functions (2 of 8 shards) | 8 | 9 MB |" in text
    assert "Abacus 9, 2 cores, torch 2.99, commit 0123456789ab" in text
