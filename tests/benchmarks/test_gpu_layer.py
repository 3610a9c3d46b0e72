"""The GPU benchmark, everything but the GPU: peers' numbers, the proof, the floor, the file, the reasons given."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise, permutations
from types import SimpleNamespace

import pytest
import torch
from oracle import OracleWeights, nearest_reference, relative_l2

from dsv4.cli._layer import random_call, random_weights
from dsv4.cli._shapes import SHAPES, LayerShape

CPU = torch.device("cpu")
TINY = LayerShape(8, 128, 64, 3, 1.0)  # a limit that clamps
COUNT = 3


@pytest.fixture
def setup(benchmarks):
    """What peers are given, for a tiny layer."""
    from peers.base import Setup

    return Setup(TINY, random_weights(TINY, CPU), (5, 16), CPU)


def calls_of(tokens: int):
    return [random_call(TINY, tokens, "uniform", CPU, seed) for seed in range(COUNT)]


class EagerGraph:
    """Stands for a CUDA graph: a replay runs what was captured again, into the same tensors."""

    def __init__(self, runs):
        self.runs, self.outputs, self.replays = runs, runs[-1](), 0

    def replay(self):
        self.replays += 1
        for run in self.runs[:-1]:
            run()
        for into, value in zip(self.outputs, self.runs[-1](), strict=True):
            into.copy_(value)

    def pool(self):
        return None


@pytest.fixture
def on_cpu(benchmarks, monkeypatch):
    """The harness with graphs, clock and streams that need no GPU."""
    import contextlib

    import gpu_layer
    import harness
    import stages

    def capture(runs, stream, pool=None):
        graph = EagerGraph(list(runs))
        return graph, graph.outputs

    def warm(contender, count, stream):
        with contender.context():
            for index in range(count):
                contender.run(index)

    def elapsed_us(graph):
        graph.replay()
        return 7.0 * len(graph.runs)

    for name, stand_in in {"capture": capture, "warm": warm, "elapsed_us": elapsed_us}.items():
        monkeypatch.setattr(harness, name, stand_in)
    monkeypatch.setattr(stages, "kernel_us", lambda layer, calls, out: {"_combine": 2.0, "_grouped_gemm": 90.0})
    monkeypatch.setattr(gpu_layer, "packing_rate", lambda layer, weights: {"gb_per_s": 1.0, "peak_extra_bytes": 0})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Abacus 9")
    monkeypatch.setattr(torch.cuda, "Stream", contextlib.nullcontext)
    monkeypatch.setitem(SHAPES, "v4-flash", TINY)
    return gpu_layer


def test_floor_by_hand(benchmarks):
    """V4-Flash: one token reads 6 experts of 3 x 4096 x 2048 weights at 4.5 bits; arithmetic binds 8192 tokens."""
    from harness import floor_us, rates

    shape = SHAPES["v4-flash"]
    assert floor_us(shape, 1, 6) == pytest.approx(6 * 25_165_824 * 0.5625 / 4443e3, rel=1e-12)  # 19.1
    flops = 2 * 8192 * 6 * 25_165_824
    assert floor_us(shape, 8192, 256) == pytest.approx(flops / 772e6, rel=1e-12)  # 3204.5
    found = rates(shape, 8192, 256, 6409.0, 0.5625)
    assert found == {"tflop_per_s": 386.0, "gb_per_s": 565.4, "floor_share": 0.5}


def test_stage_table_by_hand(benchmarks):
    """Products are left out; a kernel with a formula has GB/s, another a time alone."""
    from stages import table

    shape = SHAPES["v4-flash"]
    rows = table({"_combine": 10.0, "Memset": 3.0, "_grouped_gemm": 99.0}, shape, 8192, "w4a16")
    moved = 49_152 * (4096 * 2 + 8) + 8192 * 4096 * 2  # bf16 rows above 4096 slots
    assert rows == {
        "_combine": {"us": 10.0, "gb_per_s": round(moved / 10 / 1e3, 1)},
        "Memset": {"us": 3.0, "gb_per_s": None},
    }
    small = table({"_combine": 10.0}, shape, 1, "w4a16")
    assert small["_combine"]["gb_per_s"] == round((6 * 16_392 + 8192) / 10 / 1e3, 1)
    # Tokens are staged in both; rows between the products only where their scale was not known before.
    static, token = (table({"_stage_rows": 100.0}, shape, 8192, f"w4a4-{scale}") for scale in ("static", "token"))
    assert static["_stage_rows"]["gb_per_s"] == round(8192 * 16_388 / 100 / 1e3, 1)
    assert token["_stage_rows"]["gb_per_s"] == round((8192 * 16_388 + 49_152 * 8196) / 100 / 1e3, 1)


@pytest.mark.parametrize("quantized", [False, True])
def test_reference_agrees_with_the_oracle(setup, quantized):
    """The fp32 reference that peers are proven by is the float64 oracle's block within the project's bar."""
    from reference import BF16, TOKEN_SCALES, reference

    call, w = calls_of(16)[0], setup.weights
    activations = TOKEN_SCALES if quantized else BF16
    found = reference(w, call, torch.arange(16), TINY.swiglu_limit, activations)
    wanted = nearest_reference(
        found,
        call.hidden_states,
        call.topk_weights,
        call.topk_ids,
        OracleWeights(w.l1.codes, w.l1.sf, w.l1.gs.flatten(), w.l2.codes, w.l2.sf, w.l2.gs.flatten()),
        activation_format="nvfp4" if quantized else "bf16",
        activation_scale="token",
        swiglu_limit=TINY.swiglu_limit,
    )
    assert relative_l2(found, wanted) < 3e-3
    some = torch.tensor([0, 7, 15])
    assert torch.allclose(reference(w, call, some, TINY.swiglu_limit, activations), found[some], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("peer", ["grouped-mm", "transformers"])
def test_bf16_peers_compute_the_layer(setup, peer, on_cpu):
    """Every contender of a peer that runs on a CPU passes the proof it will have to pass on a GPU."""
    import peers

    found, skipped = peers.load([peer], setup)
    assert not skipped
    calls = calls_of(16)
    contenders = found[peer].contenders(calls)
    graphs, errors, left_out = on_cpu.captured(contenders, calls, setup, None)
    assert set(graphs) == {contender.name for contender in contenders} == set(errors)
    assert not left_out
    assert all(peers.peer_of(name) == peer for name in graphs)


def test_a_peer_that_does_nothing_has_no_time(setup, on_cpu):
    """A replay that leaves outputs as they were, computes something else, or raises is left out, with the reason."""
    from harness import BF16_TOLERANCE, Contender
    from reference import BF16

    calls = calls_of(16)
    idle = torch.zeros(16, TINY.hidden_size)

    def lazy(index):
        return (idle,)

    def wrong(index):
        return (torch.ones(16, TINY.hidden_size),)

    def broken(index):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    contenders = [Contender(run.__name__, run, BF16) for run in (lazy, wrong, broken)]
    graphs, errors, left_out = on_cpu.captured(contenders, calls, setup, None)
    assert not graphs
    assert not errors
    assert left_out["broken"] == "does not run: operation not permitted"
    assert left_out["wrong"].endswith(f"at most {BF16_TOLERANCE}")
    assert "nan" in left_out["lazy"]


def test_w4a16_is_no_w4a4(setup, on_cpu):
    """The tolerance for quantizing contenders tells apart one that leaves the quantization out."""
    from harness import NVFP4_TOLERANCE, Contender
    from reference import BF16, TOKEN_SCALES, reference

    calls, rows = calls_of(16), torch.arange(16)

    def run_as(activations):
        return lambda index: (reference(setup.weights, calls[index], rows, TINY.swiglu_limit, activations),)

    contenders = [
        Contender("honest", run_as(TOKEN_SCALES), TOKEN_SCALES, NVFP4_TOLERANCE),
        Contender("bf16", run_as(BF16), TOKEN_SCALES, NVFP4_TOLERANCE),
    ]
    graphs, _, left_out = on_cpu.captured(contenders, calls, setup, None)
    assert set(graphs) == {"honest"}
    assert set(left_out) == {"bf16"}


def test_replays_of_slow_graphs(on_cpu, monkeypatch):
    """A slow graph is replayed less often, never less than three times; the median is divided by the layers."""
    import harness

    times = {"fast": 100.0, "slow": 5e5, "slowest": 5e6}
    graphs = {name: SimpleNamespace(name=name) for name in times}
    monkeypatch.setattr(harness, "elapsed_us", lambda graph: times[graph.name])
    us, replays = harness.interleaved(graphs, 4)
    assert us == {"fast": 25.0, "slow": 1.25e5, "slowest": 1.25e6}
    assert replays == {"fast": 12, "slow": 4, "slowest": 3}


@pytest.mark.parametrize("count", range(2, 10))
def test_everyone_is_measured_behind_everyone(on_cpu, monkeypatch, count):
    """Nobody owes a time to the contender that comes before: each comes once in a turn, and in all of them behind each
    other one equally often."""
    import harness

    seen: list[str] = []
    monkeypatch.setattr(harness, "elapsed_us", lambda graph: seen.append(graph.name) or 1.0)
    names = [str(n) for n in range(count)]
    harness.interleaved({name: SimpleNamespace(name=name) for name in names}, 1)
    turns = [seen[i : i + count] for i in range(2 * count, len(seen), count)]  # behind two replays of each, to warm up
    assert 9 <= len(turns) <= 18
    assert all(sorted(turn) == names for turn in turns)
    behind = Counter(pair for turn in turns for pair in pairwise(turn))
    assert set(behind) == set(permutations(names, 2))
    assert len(set(behind.values())) == 1


def test_reasons_for_skipping(setup, tmp_path):
    """Peers without their code are named with a reason and nothing is raised; vLLM's say that they need a GPU."""
    import peers
    from peers.base import Setup

    _, skipped = peers.load(["humming", "vllm-marlin"], setup)
    assert skipped["humming"] == "needs --peer-folder"
    if not torch.cuda.is_available():
        assert "CUDA" in skipped["vllm-marlin"]
    empty = Setup(TINY, setup.weights, (1,), CPU, tmp_path)
    assert f"no humming_moe.py in {tmp_path}" == peers.load(["humming"], empty)[1]["humming"]


def test_bf16_weights_that_do_not_fit(setup, monkeypatch):
    """Too little memory for bf16 weights skips the peers that want them."""
    import peers
    import peers.base

    monkeypatch.setattr(peers.base, "free_memory", lambda device: 1000)
    _, skipped = peers.load(["grouped-mm", "transformers"], setup)
    assert set(skipped) == {"grouped-mm", "transformers"}
    assert all("1 kB are free" in reason for reason in skipped.values())


def test_peers_are_named_apart(benchmarks):
    """A contender belongs to one peer, ours to none, and every shape of the table can be asked for."""
    import gpu_layer
    from peers import peer_of

    assert peer_of("humming-indexed") == "humming"
    assert peer_of("vllm-humming") == "vllm-humming"
    assert peer_of("grouped-mm") == "grouped-mm"
    assert peer_of("w4a16") is None
    for shape in ("v4-flash", "v4-pro", "qwen3-30b"):
        assert gpu_layer.parse(["--shape", shape]).shape == shape
    with pytest.raises(SystemExit):
        gpu_layer.parse(["--peers", "hummming"])
    with pytest.raises(SystemExit):
        gpu_layer.parse(["--modes", "w4a4-tensor"])


def test_document(on_cpu, tmp_path, monkeypatch, capsys):
    """One run: a file after every row, with every contender's time, rates and proof; skipped peers are printed. The
    profiler, behind which replays take longer, runs after everything is timed."""
    import harness
    import stages
    from harness import rates

    done = []
    for module, name in ((harness, "interleaved"), (stages, "kernel_us")):
        inner = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, name=name, inner=inner, **options: done.append(name) or inner(*args, **options)
        )
    written = []
    write_text = on_cpu.write_text

    def counting(path, text):
        written.append(len(json.loads(text)["results"]))
        write_text(path, text)

    monkeypatch.setattr(on_cpu, "write_text", counting)
    output = tmp_path / "tiny.json"
    arguments = ["--tokens", "1,16", "--routings", "3", "--device", "cpu", "--peers", "grouped-mm,transformers,humming"]
    modes = ["--modes", "w4a16,w4a4-token,w4a4-static"]
    monkeypatch.setattr("sys.argv", ["gpu_layer.py", *arguments, *modes, "--output", str(output)])
    on_cpu.main()
    assert written == [1, 2, 2, 2]
    assert done == ["interleaved"] * 2 + ["kernel_us"] * 6
    assert "humming: skipped, needs --peer-folder" in capsys.readouterr().out
    document = json.loads(output.read_text())
    assert document["skipped"] == {"humming": "needs --peer-folder"}
    assert set(document["peers"]) == {"grouped-mm", "transformers"}
    names = {"w4a16", "w4a4-token", "w4a4-static", "grouped-mm", "transformers-grouped_mm", "transformers-batched_mm"}
    for row in document["results"]:
        assert row["left_out"] == {}
        assert set(row["us"]) == set(row["errors"]) == set(row["single_us"]) == set(row["rates"]) == names
        assert set(row["us"].values()) == {7.0}
        assert row["rates"]["w4a16"] == rates(TINY, row["tokens"], row["active_experts"], 7.0, 0.5625)
        assert row["speed_of_peer"]["grouped-mm"] == dict.fromkeys(document["backends"], 1.0)
        assert row["stages_us"] == dict.fromkeys(document["backends"], 2.0)
        assert all(error > 0 and math.isfinite(error) for error in row["errors"].values())
