"""Routing: from global expert ids to rows ordered by expert, with fixed shapes and no word to the host.

A *slot* is one (token, choice) pair, numbered ``token * k + choice``. The grouped GEMMs want the slots of an expert
side by side, each expert's rows starting at a multiple of the row tile P. That is a counting sort: histogram, prefix
sum, stable placement. Slots that this rank does not serve (negative ids, other ranks' experts, padding tokens) get no
row.

Example: ``E = 3, P = 4``, two tokens with ``k = 2`` and local ids ``[[2, 0], [2, -1]]``::

    slots          0 -> expert 2,  1 -> expert 0,  2 -> expert 2,  3 -> dropped
    counts         [1, 0, 2]
    row_starts     [0, 4, 4, 8]            expert 1 takes no tile
    row_slot       [1 -1 -1 -1 | 0 2 -1 -1 | -1 ...]
    slot_row       [[4, 0], [5, -1]]
    tile_expert    [0, 2, -1, ...]         padded with -1 to the capacity bound

Everything has a size known from T, k, E and P alone (:func:`dsv4.config.capacity`), so one CUDA graph serves any
routing. Device work only: no ``nonzero``, ``bincount`` or ``unique``, whose shapes depend on data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.config import capacity
from dsv4.errors import ConfigError


@dataclass(frozen=True)
class Routing:
    """The tables that place slots in rows. All int32 unless said otherwise.

    Attributes:
        num_experts: E, local experts.
        row_tile: P.
        counts: ``[E]`` rows of each expert.
        row_starts: ``[E + 1]`` first row of each expert, a multiple of P; the last entry is the end of all.
        row_slot: ``[R]`` slot of each row, -1 for padding; R is the capacity bound.
        slot_row: ``[T, k]`` row of each slot, -1 where the slot is dropped.
        tile_expert: ``[R / P]`` expert of each row tile, -1 beyond the last.
    """

    num_experts: int
    row_tile: int
    counts: Tensor
    row_starts: Tensor
    row_slot: Tensor
    slot_row: Tensor
    tile_expert: Tensor

    @property
    def num_rows(self) -> int:
        """R: rows of every buffer that is indexed by row, whatever the routing."""
        return self.row_slot.shape[0]

    def row_token(self) -> Tensor:
        """``[R]`` token of each row; 0 (a safe index) for padding rows, which ``row_slot < 0`` tells apart."""
        top_k = self.slot_row.shape[1]
        return torch.div(self.row_slot.clamp(min=0), top_k, rounding_mode="floor")

    def row_expert(self) -> Tensor:
        """``[R]`` expert of each row, padding rows of a tile included; -1 beyond the last tile."""
        return self.tile_expert.repeat_interleave(self.row_tile, output_size=self.num_rows)


def local_expert_ids(
    topk_ids: Tensor,
    num_experts: int,
    start: int = 0,
    expert_map: Tensor | None = None,
    num_valid_tokens: Tensor | None = None,
) -> Tensor:
    """Global expert ids to local ones, -1 for every slot that this rank does not serve.

    Args:
        topk_ids: int32 or int64 ``[T, k]``, global.
        num_experts: E, local experts.
        start: global id of local expert 0; ignored with ``expert_map``.
        expert_map: int32 ``[global]`` -> local id or -1. Ids outside the map are dropped.
        num_valid_tokens: int32 ``[1]`` on the device: tokens from there on are padding.

    Returns:
        int32 ``[T, k]`` in ``[-1, E)``.
    """
    if expert_map is None:
        local = topk_ids - start
        local = torch.where((local >= 0) & (local < num_experts), local, -1)
    else:
        known = (topk_ids >= 0) & (topk_ids < expert_map.shape[0])
        mapped = expert_map[torch.where(known, topk_ids, 0)] if expert_map.shape[0] else topk_ids
        local = torch.where(known, mapped, -1)
    if num_valid_tokens is not None:
        token = torch.arange(topk_ids.shape[0], device=topk_ids.device, dtype=torch.int32)
        local = torch.where((token < num_valid_tokens).unsqueeze(1), local, -1)
    return local.to(torch.int32)


def checked_expert_map(expert_map: Tensor | None, num_experts: int, device: torch.device) -> Tensor | None:
    """A map ``[global] -> local id or -1`` as int32 on ``device``, once its values were checked (this synchronises).

    Raises:
        ConfigError: not an integer vector, an id outside ``[-1, E)``, or a local id that appears twice.
    """
    if expert_map is None:
        return None
    if expert_map.dim() != 1 or expert_map.dtype not in (torch.int32, torch.int64):
        raise ConfigError(
            f"expert_map: expected an integer vector [global experts], found {expert_map.dtype} "
            f"{list(expert_map.shape)}"
        )
    local = expert_map[expert_map >= 0]
    if bool((expert_map < -1).any()) or bool((local >= num_experts).any()) or local.unique().numel() != local.numel():
        raise ConfigError(
            f"expert_map: expected distinct local ids in 0 .. {num_experts - 1}, or -1, found {expert_map.tolist()}"
        )
    return expert_map.to(device=device, dtype=torch.int32)


def route(local_ids: Tensor, num_experts: int, row_tile: int = 1) -> Routing:
    """Place every slot in a row: a stable counting sort by expert, padded to row tiles.

    Within an expert, rows follow the order of the slots; the same inputs give the same tables.

    Args:
        local_ids: int32 ``[T, k]`` in ``[-1, E)``, from :func:`local_expert_ids`. Repeated ids in a row are allowed.
        num_experts: E.
        row_tile: P.
    """
    device = local_ids.device
    flat = local_ids.reshape(-1)
    num_slots = flat.shape[0]
    num_rows = capacity(num_slots, num_experts, row_tile)
    key = torch.where(flat >= 0, flat, num_experts).long()  # dropped slots sort behind every expert

    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
    counts.scatter_add_(0, key, torch.ones_like(key))  # integer addition: any order gives the same sum
    padded = torch.div(counts[:num_experts] + row_tile - 1, row_tile, rounding_mode="floor") * row_tile
    row_starts = _exclusive_sum(padded)

    # A stable sort by expert is the placement step: position in the sorted order minus the expert's first position is
    # the rank within the expert. Dropped slots go to a spare last entry.
    order = torch.sort(key, stable=True).indices
    sorted_key = key[order]
    rank = torch.arange(num_slots, device=device) - _exclusive_sum(counts)[sorted_key]
    row = torch.where(sorted_key < num_experts, row_starts[sorted_key] + rank, num_rows)
    row_slot = torch.full((num_rows + 1,), -1, dtype=torch.int32, device=device)
    row_slot.scatter_(0, row, order.to(torch.int32))
    slot_row = torch.empty(num_slots, dtype=torch.int32, device=device)
    slot_row.scatter_(0, order, torch.where(row < num_rows, row, -1).to(torch.int32))

    tile_start = torch.arange(0, num_rows, row_tile, device=device)
    tile_expert = torch.searchsorted(row_starts[1:], tile_start, right=True)
    return Routing(
        num_experts=num_experts,
        row_tile=row_tile,
        counts=counts[:num_experts].to(torch.int32),
        row_starts=row_starts.to(torch.int32),
        row_slot=row_slot[:num_rows],
        slot_row=slot_row.view(local_ids.shape),
        tile_expert=torch.where(tile_expert < num_experts, tile_expert, -1).to(torch.int32),
    )


def _exclusive_sum(x: Tensor) -> Tensor:
    """``[n]`` -> ``[n + 1]``: 0, x0, x0 + x1, ..."""
    return torch.nn.functional.pad(x.cumsum(0), (1, 0))
