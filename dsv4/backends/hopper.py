"""The Hopper backend: grouped GEMMs in CuTe DSL (:mod:`dsv4.kernels.hopper`), the stages around them in Triton.

Rows live in *images*, in the order of the tile map, from the gather to GEMM 2; routing and combine are the portable
backend's, as is everything that only chooses scales.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsv4.backends.base import Call, Packed, Verdict, packing_parts
from dsv4.backends.portable import PortableBackend
from dsv4.config import MoEConfig, capacity
from dsv4.kernels.hopper.cache import dsl_version, lookup
from dsv4.kernels.hopper.config import HopperConfig
from dsv4.kernels.hopper.layout import matrix_bytes, unpack_matrix
from dsv4.nvfp4 import finite_row_amax, pack_nibbles
from dsv4.weights import MoEWeights
from dsv4.workspace import BufferPlan

if TYPE_CHECKING:
    from dsv4.kernels.triton.routing import RoutingBuffers

_MULTIPLE = 128
"""H and I are multiples of it: whole blocks of weights."""


@dataclass(frozen=True)
class Tiling:
    """One line of the table: up to ``rows_per_expert`` slots for each expert on average.

    Attributes:
        rows_per_expert: the largest mean, ``T * k / E``, that this line serves.
        gemm1: ``(tokens, warpgroups, blocks, stages, programs_per_sm)`` of :class:`HopperConfig`.
        gemm2: the same of down; ``tokens`` is shared.
    """

    rows_per_expert: float
    gemm1: tuple[int, int, int, int, int]
    gemm2: tuple[int, int, int, int, int]


# Measured on an H200, V4-Flash, W4A16, microseconds of both GEMMs, floor of each T in brackets:
#   T = 1 [19]: 8,1,2,4,4 29.6; 8,1,1,8,4 31.5; 8,2,2,5,2 35.0. T = 16 [257], 64 [636]: 8,2,2,5,2 284, 719; 8,1,2,4,4
#   285, 730; 8,2,1,9,2 292, 760; 8,4,1,10,1 293, 752.
#   T = 256 [813]: 16,2,2,4,2 1021; 16,4,2,4,1 1032; 16,4,1,9,1 1060; 16,2,1,8,2 1083.
#   T = 1024 [816]: 32,4,1,8,1 1275; 32,2,2,3,2 1328; 32,2,1,6,2 1339; 40,2,1,5,2 1458; 48,4,1,7,1 1474.
#   T = 2048 [816]: 72,2,1,4,2 1736; 64,4,1,6,1 1741; 64,2,1,4,2 1779.
#   T = 8192 [3205]: 128,2,1,5,1 4835; 256,2,1,3,1 5253; 96,4,1,5,1 5243; two programs of 128 tokens 8463.
TILINGS = (
    Tiling(1 / 8, (8, 1, 2, 4, 4), (8, 1, 2, 4, 4)),
    Tiling(4, (8, 2, 2, 5, 2), (8, 2, 2, 5, 2)),
    Tiling(9, (16, 2, 2, 4, 2), (16, 2, 2, 4, 2)),
    Tiling(16, (24, 2, 2, 3, 2), (24, 2, 2, 3, 2)),
    Tiling(26, (32, 4, 1, 8, 1), (32, 4, 1, 8, 1)),
    Tiling(54, (72, 2, 1, 4, 2), (72, 2, 1, 4, 2)),
    Tiling(float("inf"), (128, 2, 1, 5, 1), (128, 2, 1, 5, 1)),
)


class HopperBackend(PortableBackend):
    """See the module docstring; the interface is :class:`dsv4.backends.base.Backend`."""

    name = "hopper"

    def __init__(self, config: MoEConfig, device: torch.device):
        self.config = config
        self.device = device
        self._plan = _plan(config)
        i, h = config.intermediate_size, config.hidden_size
        self._l2_offset = matrix_bytes(2 * i, h)
        self._expert_bytes = self._l2_offset + matrix_bytes(h, i)
        self._multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count

    @classmethod
    def explain(cls, config: MoEConfig, device: torch.device) -> Verdict:
        portable = PortableBackend.explain(config, device)
        if not portable.usable:
            return portable
        capability = torch.cuda.get_device_capability(device)
        if capability != (9, 0):
            return Verdict(False, f"kernels for compute capability 9.0, found {capability}")
        if not config.fused_swiglu:
            return Verdict(False, "SwiGLU is always part of GEMM 1, set_fused_swiglu(False) asks it not to be")
        if config.hidden_size % _MULTIPLE or config.intermediate_size % _MULTIPLE:
            return Verdict(
                False,
                f"hidden and intermediate size must be multiples of {_MULTIPLE}, found {config.hidden_size} and "
                f"{config.intermediate_size}",
            )
        if dsl_version() is None and lookup(_gemm1_config(config, TILINGS[0])) is None:
            return Verdict(False, "nvidia-cutlass-dsl is not installed and the kernel cache is empty")
        return Verdict(True, "CuTe DSL, weights decoded in registers for wgmma")

    @classmethod
    def workspace_bytes(cls, config: MoEConfig, device: torch.device) -> int:
        return _plan(config).nbytes

    def pack(self, weights: MoEWeights, into: Packed | None = None) -> Packed:
        from dsv4.kernels.hopper.packing import pack

        if into is None:
            into = Packed.empty(self.config.num_experts, self._expert_bytes, self.device)
        parts = ((0, True, weights.l1_fp4, weights.l1_sf), (self._l2_offset, False, weights.l2_fp4, weights.l2_sf))
        for offset, gated, fp4, sf in parts:
            for part, codes, scales in packing_parts(fp4, sf, self.device):
                pack(codes, scales, into.experts[part], offset, gated)
        into.l1_gs.copy_(weights.l1_gs)
        into.l2_gs.copy_(weights.l2_gs)
        return into

    def unpack(self, packed: Packed) -> MoEWeights:
        i, h = self.config.intermediate_size, self.config.hidden_size
        e, device = packed.experts.shape[0], packed.experts.device
        matrices = []
        for n, k, gated, part in (
            (2 * i, h, True, packed.experts[:, : self._l2_offset]),
            (h, i, False, packed.experts[:, self._l2_offset :]),
        ):
            fp4 = torch.empty(e, n, k // 2, dtype=torch.uint8, device=device)
            sf = torch.empty(e, n, k // 16, dtype=torch.uint8, device=device)
            for expert in range(e):
                codes, sf[expert] = unpack_matrix(part[expert], n, k, gated)
                fp4[expert] = pack_nibbles(codes)
            matrices += [fp4, sf.view(torch.float8_e4m3fn)]
        l1_fp4, l1_sf, l2_fp4, l2_sf = matrices
        return MoEWeights(l1_fp4, l1_sf, packed.l1_gs.clone(), l2_fp4, l2_sf, packed.l2_gs.clone())

    def _run(self, packed: Packed, call: Call, views: dict[str, Tensor], out: Tensor) -> None:
        from dsv4.kernels.hopper.launch import grouped_gemm
        from dsv4.kernels.hopper.stages import image_amax, quantize_image
        from dsv4.kernels.triton.stages import ScaleSource, combine

        cfg = self.config
        slots = call.topk_ids.numel()
        tiling = self._line(call.hidden_states.shape[0])
        row_tile = tiling.gemm1[0]
        tables = self._route(call, views, row_tile)
        self._activate(packed, call, views, tables, tiling, quantize=cfg.quantizes_activations)
        activated, i = views["act"], cfg.intermediate_size
        row_scale = None
        if cfg.quantizes_activations:
            source, scale = self._scale_source(call, call.input_scales.l2 if call.input_scales else None, tables, 1)
            row_scale = views["row_scale"]
            if source is ScaleSource.BATCH:
                image_amax(activated, tables.tiles, row_tile, i, tables.amax[1:])
            quantize_image(activated, row_scale, tables.tiles, row_tile, i, source, scale)
        slot_rows = self._slot_rows(views, slots)
        gemm2 = replace(_gemm2_config(cfg, tiling), wide_out=slot_rows.dtype == torch.float32)
        grouped_gemm(
            gemm2, activated, row_scale, packed.experts, self._l2_offset, packed.l2_gs, tables.tiles, slot_rows,
            rows=cfg.hidden_size, k=i, multiprocessors=self._multiprocessors,
        )  # fmt: skip
        combine(
            slot_rows, tables.local_ids, call.topk_weights if cfg.route_weight == "output" else None, out, cfg.top_k
        )

    def _activated_amax(self, packed: Packed, call: Call, views: dict[str, Tensor]) -> tuple[RoutingBuffers, Tensor]:
        cfg = self.config
        tiling = self._line(call.hidden_states.shape[0])
        row_tile = tiling.gemm1[0]
        tables = self._route(call, views, row_tile)
        self._activate(packed, call, views, tables, tiling, quantize=False)
        slots = call.topk_ids.numel()
        row_slot = tables.tiles.row_slot.long()
        image = views["act"][: row_slot.shape[0] * cfg.intermediate_size]
        rows = image.view(-1, cfg.intermediate_size // 64, row_tile, 64).transpose(1, 2).flatten(2).flatten(0, 1)
        # Unused rows hold anything: they go to a slot that is cut off.
        target = torch.where(row_slot >= 0, row_slot, slots)
        amax = finite_row_amax(rows)
        return tables, amax.new_zeros(slots + 1).scatter_(0, target, amax)[:-1]

    def _line(self, tokens: int) -> Tiling:
        """Chosen by the number of tokens of the call alone, which a captured graph fixes."""
        mean = tokens * self.config.top_k / self.config.num_experts
        return next(t for t in TILINGS if mean <= t.rows_per_expert)

    def _activate(
        self,
        packed: Packed,
        call: Call,
        views: dict[str, Tensor],
        tables: RoutingBuffers,
        tiling: Tiling,
        quantize: bool,
    ) -> None:
        """Gather the tokens, multiply, SwiGLU: the image ``act``."""
        from dsv4.kernels.hopper.launch import grouped_gemm
        from dsv4.kernels.hopper.stages import gather_image, quantize_image
        from dsv4.kernels.triton.stages import ScaleSource, batch_amax, stage_rows

        cfg, row_tile = self.config, tiling.gemm1[0]
        x, x_scale, tokens = call.hidden_states, None, call.hidden_states.shape[0]
        input_weights = call.topk_weights if cfg.route_weight == "input" else None
        scales = call.input_scales if quantize else None
        per_slot = scales is not None and cfg.l1_scale_policy == "per_expert"
        row_scale = views["row_scale"]
        if input_weights is not None or (quantize and not per_slot):
            source, scale = ScaleSource.NONE, None
            x, x_scale = views["x_staged"][:tokens], None
            if quantize and not per_slot:
                source, scale = self._scale_source(call, None if scales is None else scales.l1_merged, tables, 0)
                x_scale = views["x_scale"][:tokens]
                if source is ScaleSource.BATCH:
                    batch_amax(call.hidden_states, tables.local_ids, tables.amax[:1], cfg.top_k, input_weights)
            stage_rows(call.hidden_states, x, views["x_scale"], source=source, scale=scale, weights=input_weights)
        gather_image(x, x_scale, views["x_image"], row_scale, tables.tiles, row_tile, cfg.top_k)
        if scales is not None and per_slot:
            quantize_image(
                views["x_image"], row_scale, tables.tiles, row_tile, cfg.hidden_size, ScaleSource.EXPERT, scales.l1
            )
        config = replace(_gemm1_config(cfg, tiling), row_scale=quantize)
        grouped_gemm(
            config, views["x_image"], row_scale, packed.experts, 0, packed.l1_gs, tables.tiles, views["act"],
            rows=2 * cfg.intermediate_size, k=cfg.hidden_size, multiprocessors=self._multiprocessors,
            limit=cfg.swiglu_limit, topk_weights=call.topk_weights,
        )  # fmt: skip


def _gemm1_config(config: MoEConfig, tiling: Tiling) -> HopperConfig:
    return HopperConfig(
        *tiling.gemm1,
        gated=True,
        row_scale=config.quantizes_activations,
        weighted=config.route_weight == "before_down",
        limited=config.swiglu_limit is not None,
    ).fitted(2 * config.intermediate_size, config.hidden_size)


def _gemm2_config(config: MoEConfig, tiling: Tiling) -> HopperConfig:
    fitting = HopperConfig(*tiling.gemm2, row_scale=config.quantizes_activations)
    return fitting.fitted(config.hidden_size, config.intermediate_size)


def kernels(config: MoEConfig) -> list[HopperConfig]:
    """Every kernel that a layer may launch: what is compiled ahead of time."""
    needed = []
    for tiling in TILINGS:
        gemm1 = _gemm1_config(config, tiling)
        gemm2 = _gemm2_config(config, tiling)
        needed += [gemm1, gemm2, replace(gemm2, wide_out=True)]
        if config.activation_scale == "calibrated" and config.quantizes_activations:
            needed.append(replace(gemm1, row_scale=False))  # calibration multiplies what is not quantized
    return needed


def _plan(config: MoEConfig) -> BufferPlan:
    from dsv4.kernels.triton.routing import histogram_size

    slots, e = config.max_slots, config.num_experts
    h, i = config.hidden_size, config.intermediate_size
    tiles = {t.gemm1[0] for t in TILINGS}
    # A line of the table serves calls of so many slots at most.
    served = [(t.gemm1[0], min(slots, int(min(t.rows_per_expert * e, slots)))) for t in TILINGS]
    rows = max(capacity(s, e, p) for p, s in served)
    staged = config.quantizes_activations or config.route_weight == "input"
    buffers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "local_ids": ((slots,), torch.int32),
        "row_slot": ((rows,), torch.int32),
        "tile_expert": ((capacity(slots, e, min(tiles)) // min(tiles),), torch.int32),
        "num_tiles": ((1,), torch.int32),
        "hist": ((histogram_size(slots, e),), torch.int32),
        "amax": ((2,), torch.float32),
        "row_scale": ((rows,), torch.float32),
        "x_scale": ((config.max_num_tokens,), torch.float32),
        "x_staged": ((config.max_num_tokens if staged else 0, h), torch.bfloat16),
        "act": ((rows * i,), torch.bfloat16),
        "x_image": ((rows * h,), torch.bfloat16),
    }
    # GEMM 1's operand is dead before GEMM 2's rows are written; one plan serves both where rows >= slots.
    down = ((slots, h), torch.float32 if config.batch_invariant else torch.bfloat16)
    return BufferPlan(buffers, {"down": ("x_image", down)})
