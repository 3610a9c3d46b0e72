#!/usr/bin/env python3
"""``dsv4 convert``: speed and memory on a synthetic checkpoint, beside ModelOpt's own functions.

    python benchmarks/convert.py [--gigabytes G] [--sources dense,mxfp4] [--jobs 1,2] [--folder DIR] [--output FILE]

A source has V4-Flash's expert shape and eight shards, and is made of a few random experts over and over; it lies in the
page cache, as it was just written. Each command runs in a process of its own. Seconds are without the start of the
interpreter; memory is sampled over the command and its workers: of their own (anonymous), and with the mapped pages of
source files, which the system takes back when it needs them.

ModelOpt has no command for this. It has the functions for a shard (``quantize_mxfp4_to_nvfp4_lossless``,
``NVFP4QTensor.quantize``), which are driven here as its export drives them: a shard is read, its experts are quantized
one by one, gate and up under one global scale, and the shard is saved. It runs on fewer shards (``--peer-shards``); its
speed is that of these. Before a number is quoted: nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4.cli._machine import cpu_model, versions
from dsv4.cli._output import dumps, human_bytes, write_text

ROOT = Path(__file__).resolve().parent.parent
HIDDEN, INTER = 4096, 2048
SIZES = {"w1": (INTER, HIDDEN), "w3": (INTER, HIDDEN), "w2": (HIDDEN, INTER)}
BYTES_A_VALUE = {"dense": 2.0, "mxfp4": 0.5 + 1 / 32}
SHARDS = 8
DISTINCT = 3
"""Random experts that take turns; making 4 GB of random numbers would take longer than what is measured."""

OTHER_BYTES = 16 << 20
"""Of what is passed through, in each shard."""


def random_expert(kind: str, generator: torch.Generator) -> dict[str, Tensor]:
    """``w1.weight`` ... of one expert."""
    tensors: dict[str, Tensor] = {}
    for name, (rows, columns) in SIZES.items():
        if kind == "dense":
            tensors[f"{name}.weight"] = (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()
            continue
        codes = torch.randint(-128, 128, (rows, columns // 2), generator=generator, dtype=torch.int8)
        exponents = torch.randint(114, 122, (rows, columns // 32), generator=generator, dtype=torch.uint8)
        tensors[f"{name}.weight"], tensors[f"{name}.scale"] = codes, exponents.view(torch.float8_e8m0fnu)
    return tensors


def write_source(kind: str, folder: Path, gigabytes: float) -> dict[str, int]:
    """A checkpoint of about ``gigabytes``; returns what is in it."""
    generator = torch.Generator().manual_seed(0)
    distinct = [random_expert(kind, generator) for _ in range(DISTINCT)]
    one = int(sum(rows * columns for rows, columns in SIZES.values()) * BYTES_A_VALUE[kind])
    per_shard = max(1, round((gigabytes * 1e9 / SHARDS - OTHER_BYTES) / one))
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number in range(SHARDS):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        tensors = {f"layers.{number}.attn.wq.weight": torch.ones(OTHER_BYTES // HIDDEN // 2, HIDDEN).bfloat16()}
        for expert in range(per_shard):
            for name, tensor in distinct[expert % DISTINCT].items():
                tensors[f"layers.{number}.ffn.experts.{expert}.{name}"] = tensor.clone()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v4", "n_routed_experts": per_shard}))
    os.sync()  # so that writing the source is no part of what is measured
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"bytes": size, "shards": SHARDS, "experts": SHARDS * per_shard, "expert_bytes": one}


class MemoryWatch(threading.Thread):
    """The most memory that a process and its children had at any time, sampled."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self._process = process
        self._ended = threading.Event()
        self.anonymous = self.resident = 0

    def run(self) -> None:
        while not self._ended.wait(0.02):
            found = [_memory(process) for process in _tree(self._process)]
            self.anonymous = max(self.anonymous, sum(anonymous for anonymous, _ in found))
            self.resident = max(self.resident, sum(anonymous + mapped for anonymous, mapped in found))

    def stop(self) -> None:
        self._ended.set()
        self.join()


def _tree(process: int) -> list[int]:
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [process, *(other for child in children for other in _tree(int(child)))]


def _memory(process: int) -> tuple[int, int]:
    """(anonymous, mapped files) in bytes."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    except OSError:
        return 0, 0
    anonymous, mapped = (int(status.get(key, "0 kB").split()[0]) * 1024 for key in ("RssAnon", "RssFile"))
    return anonymous, mapped


def measured(arguments: list[str], threads: int) -> dict[str, Any]:
    """Run a command that prints one JSON document with ``seconds``; adds its peak memory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    watch = MemoryWatch(process.pid)
    watch.start()
    out, err = process.communicate()
    watch.stop()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {err}")
    return {**json.loads(out), "peak_anonymous_bytes": watch.anonymous, "peak_resident_bytes": watch.resident}


def modelopt_shards(kind: str, source: Path, target: Path, shards: int) -> dict[str, Any]:
    """ModelOpt's functions on the first shards of ``source``, saved to ``target``."""
    from modelopt.torch.export.shard_cast_utils import mxfp4_kmax, quantize_mxfp4_to_nvfp4_lossless
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    target.mkdir(parents=True)
    files = sorted(source.glob("*.safetensors"))[:shards]
    started = time.perf_counter()
    for file in files:
        tensors = load_file(file)
        result = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        experts = sorted({name.rsplit(".", 2)[0] for name in tensors if ".experts." in name})
        for expert in experts:
            for projections in (("w1", "w3"), ("w2",)):
                names = [f"{expert}.{projection}" for projection in projections]
                if kind == "mxfp4":
                    largest = max(mxfp4_kmax(tensors[f"{name}.scale"]) for name in names)
                else:
                    scale = torch.stack([tensors[f"{name}.weight"].abs().max().float() for name in names]).max() / 2688
                for name in names:
                    weight = tensors[f"{name}.weight"]
                    if kind == "mxfp4":
                        codes, sf, gs, *_ = quantize_mxfp4_to_nvfp4_lossless(
                            weight, tensors[f"{name}.scale"], largest, "cpu"
                        )
                    else:
                        quantized, sf, gs = NVFP4QTensor.quantize(weight, 16, None, scale)
                        codes = quantized._quantized_data
                    result |= {
                        f"{name}.weight": codes,
                        f"{name}.weight_scale": sf,
                        f"{name}.weight_scale_2": gs.clone(),
                    }
        save_file(result, target / file.name, metadata={"format": "pt"})
    return {"seconds": time.perf_counter() - started, "source_bytes": sum(file.stat().st_size for file in files)}


def measure(kind: str, folder: Path, gigabytes: float, jobs: list[int], peer_shards: int) -> dict[str, Any]:
    """All commands on one source."""
    source, target = folder / f"source-{kind}", folder / "target"
    facts = write_source(kind, source, gigabytes)
    runs = []
    for count in jobs:
        command = ["-m", "dsv4.cli", "convert", str(source), str(target), "--activations", "dynamic", "--json"]
        result = measured([*command, "--jobs", str(count)], threads=count)
        runs.append(_entry(f"dsv4, jobs {count}", facts["bytes"], result))
        shutil.rmtree(target)
    if peer_shards:
        command = [str(Path(__file__).resolve()), "--peer", kind, str(source), str(target), str(peer_shards)]
        result = measured(command, threads=max(jobs))
        runs.append({**_entry("modelopt", result["source_bytes"], result), "shards": peer_shards})
        shutil.rmtree(target)
    shutil.rmtree(source)
    return {"kind": kind, "source": facts, "runs": runs}


def _entry(name: str, nbytes: int, result: dict[str, Any]) -> dict[str, Any]:
    entry = {
        "name": name,
        "seconds": round(result["seconds"], 2),
        "source_mb_per_s": round(nbytes / result["seconds"] / 1e6, 1),
        "peak_anonymous_bytes": result["peak_anonymous_bytes"],
        "peak_resident_bytes": result["peak_resident_bytes"],
    }
    print(
        f"  {name:16} {entry['seconds']:8.1f} s {entry['source_mb_per_s']:8.1f} MB/s of the source, "
        f"own memory {human_bytes(entry['peak_anonymous_bytes'])}, with mapped files "
        f"{human_bytes(entry['peak_resident_bytes'])}",
        flush=True,
    )
    return entry


def main() -> None:
    if sys.argv[1:2] == ["--peer"]:
        kind, source, target, shards = sys.argv[2:]
        print(json.dumps(modelopt_shards(kind, Path(source), Path(target), int(shards))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of each source")
    parser.add_argument("--sources", default="dense,mxfp4", help="formats, separated by commas")
    parser.add_argument("--jobs", default="1,2", help="numbers of processes, separated by commas")
    parser.add_argument("--peer-shards", type=int, default=2, help="shards that ModelOpt converts; 0 leaves it out")
    parser.add_argument("--folder", type=Path, help="where to write; everything is removed afterwards")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "convert.json")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    document: dict[str, Any] = {
        "commit": commit.stdout.strip(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "versions": versions(),
        "results": [],
    }
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="dsv4-convert-") as folder:
        for kind in args.sources.split(","):
            print(f"{kind}, {args.gigabytes:g} GB", flush=True)
            jobs = [int(count) for count in args.jobs.split(",")]
            document["results"].append(measure(kind, Path(folder), args.gigabytes, jobs, args.peer_shards))
    write_text(args.output, dumps(document))
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
