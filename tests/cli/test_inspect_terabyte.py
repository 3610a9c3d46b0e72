"""``dsv4 inspect --headers-only`` on files of a terabyte, which are holes but for their headers."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsv4.checkpoints import TensorSource
from dsv4.cli.app import app

SIZES = {"U8": 1, "F8_E4M3": 1, "F32": 4}
HIDDEN, INTER, EXPERTS, LAYERS = 7168, 3072, 384, 71


def sparse_checkpoint(folder: Path) -> int:
    """V4-Pro's shapes, a shard for each layer, in files that are holes but for their headers: returns the bytes."""
    total = 0
    for layer in range(LAYERS):
        header, offset = {}, 0
        for expert in range(EXPERTS):
            for name, rows, columns in (("w1", INTER, HIDDEN), ("w3", INTER, HIDDEN), ("w2", HIDDEN, INTER)):
                for suffix, dtype, shape in (
                    ("weight", "U8", [rows, columns // 2]),
                    ("weight_scale", "F8_E4M3", [rows, columns // 16]),
                    ("weight_scale_2", "F32", []),
                ):
                    end = offset + math.prod(shape) * SIZES[dtype]
                    key = f"model.layers.{layer}.ffn.experts.{expert}.{name}.{suffix}"
                    header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
                    offset = end
        text = json.dumps(header).encode()
        with open(folder / f"layer-{layer:02d}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
        total += 8 + len(text) + offset
    return total


def bytes_read() -> int:
    """What this process has read so far through system calls."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


@pytest.mark.skipif(not os.access("/proc/self/io", os.R_OK), reason="counts reads through /proc/self/io")
def test_a_terabyte_in_seconds(tmp_path, monkeypatch):
    """--headers-only reads no tensor: 1 TB takes seconds, and reads little more than the headers."""
    total = sparse_checkpoint(tmp_path)
    assert total > 1e12
    headers = sum(int.from_bytes(file.open("rb").read(8), "little") for file in tmp_path.iterdir())

    def refuse(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(TensorSource, "read", refuse)
    monkeypatch.setattr(TensorSource, "slice", refuse)
    before, start = bytes_read(), time.monotonic()
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--headers-only", "--json"])
    assert time.monotonic() - start < 60  # reading it would take minutes on any disk
    assert bytes_read() - before < 2 * headers + 2**20
    found = json.loads(result.stdout)
    assert found["bytes"] == total
    assert len(found["layers"]) == LAYERS
    assert all(layer["unreadable_experts"] == [] for layer in found["layers"])
    assert [finding["kind"] for finding in found["findings"]] == ["missing-input-scales", "no-config"]
