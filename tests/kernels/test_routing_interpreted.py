"""The routing kernels' logic on a CPU, by Triton's interpreter, against the torch twin; the bound on their scratch."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.runtime import interpreter

from dsv4.config import capacity
from dsv4.kernels.triton.grouped_gemm import TileMap
from dsv4.kernels.triton.routing import RoutingBuffers, RoutingConfig, histogram_size, num_bins, route
from dsv4.ops.routing import local_expert_ids
from dsv4.ops.routing import route as route_twin

POISON = 0x5A5A5A5A


@pytest.mark.parametrize("experts", [7, 256, 384])
def test_scratch_holds_the_histograms_of_every_smaller_call(experts):
    """A buffer sized for the largest call fits any call below it, whichever way that one is cut up."""
    bins = num_bins(experts)
    used = [0]
    for slots in range(1, 60_000):
        config = RoutingConfig.of(slots, bins)
        used.append(triton.cdiv(slots, config.chunk) * bins if config.count_first else 0)
    largest = 0
    for slots in range(1, 60_000):
        largest = max(largest, used[slots])
        assert histogram_size(slots, experts) >= largest


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 6), (11, 6), (64, 6), (171, 6), (333, 5)])
def test_routing_tables(tokens, top_k):
    """Every entry of every table equals the torch twin's, one launch and two, with nothing cleared beforehand."""
    # The interpreter is chosen when Triton is imported: a process of its own.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__, str(tokens), str(top_k)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def compare(tokens: int, top_k: int, experts: int, tile: int) -> None:
    def poison(n: int) -> torch.Tensor:
        return torch.full((n,), POISON, dtype=torch.int32)

    slots = tokens * top_k
    rows = capacity(slots, experts, tile)
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-2, experts + 3, (tokens, top_k), generator=generator)
    mapping = torch.randperm(experts + 2, generator=generator).to(torch.int32)
    mapping[mapping >= experts] = -1
    for start, expert_map, valid in (
        (1, None, torch.tensor([tokens // 2 + 1], dtype=torch.int32)),
        (0, mapping, None),
    ):
        tiles = TileMap(poison(rows), poison(rows // tile), poison(1))
        got = RoutingBuffers(poison(slots), tiles, poison(histogram_size(slots, experts)), torch.full((2,), torch.nan))
        route(ids, experts, tile, got, start=start, expert_map=expert_map, num_valid_tokens=valid)
        local = local_expert_ids(ids, experts, start, expert_map, valid)
        want = route_twin(local, experts, tile)
        assert torch.equal(got.local_ids, local.flatten())
        assert torch.equal(tiles.row_slot, want.row_slot)
        assert torch.equal(tiles.tile_expert, want.tile_expert)
        assert tiles.num_tiles.item() == (want.tile_expert >= 0).sum().item()
        assert got.amax.tolist() == [0.0, 0.0]


def let_loop_bounds_be_numbers() -> None:
    """Triton 3.6 makes them Python numbers in a way that NumPy refuses from 2.4 on: arrays of one element."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor


if __name__ == "__main__":
    let_loop_bounds_be_numbers()
    for number, row_tile in ((7, 16), (256, 128)):
        compare(int(sys.argv[1]), int(sys.argv[2]), number, row_tile)
