"""The portable backend: every stage in Triton, bf16 tensor cores, any NVIDIA GPU from Ampere on.

Tokens are staged once (bf16, or quantized and decoded again: the same bf16 tensor cores serve W4A4 and W4A16), gathered
by GEMM 1's loads, and everything after that is indexed by slot: no buffer is padded, nothing is cleared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsv4.backends.base import OUT_DTYPES, Call, Packed, Verdict, packing_parts
from dsv4.config import MoEConfig, capacity
from dsv4.nvfp4 import finite_row_amax
from dsv4.weights import MoEWeights
from dsv4.workspace import BufferPlan

if TYPE_CHECKING:
    from dsv4.kernels.triton.grouped_gemm import GemmConfig
    from dsv4.kernels.triton.routing import RoutingBuffers, RowGroups
    from dsv4.kernels.triton.stages import ScaleSource

MIN_CAPABILITY = (8, 0)

FP32_SLOTS = 4096
"""Calls of up to this many slots keep GEMM 2's rows in fp32, if the buffer sized for the largest call has room."""


@dataclass(frozen=True)
class Tiling:
    """One line of the table: up to ``rows_per_expert`` slots for each expert on average.

    Attributes:
        rows_per_expert: the largest mean, ``T * k / E``, that this line serves.
        gemm1: ``(block_m, block_n, num_warps, num_stages, programs_per_sm, wgmma)`` of gate and up.
        gemm2: the same of down; ``block_m`` is shared.
    """

    rows_per_expert: float
    gemm1: tuple[int, int, int, int, int, bool]
    gemm2: tuple[int, int, int, int, int, bool]


# Measured on an H200, V4-Flash (256 experts, 4096 x 2048, top-6), W4A16, microseconds of the whole layer. A tiling is
# written as rows x weight rows, stages, programs for each multiprocessor; 4 warps but where it says otherwise.
#   T = 1: 8 x 64, 8 stages, 4 programs 40; 10 stages, 3 programs 42; 4 stages, 5 programs 53.
#   T = 2, 4: 8 x 64, 4, 6 58, 105; 6, 5 66, 108; 8, 4 67; 10, 3 123 at T = 4.
#   T = 8, 32, 128: 8 x 128, 4, 4 181, 517, 943; 4, 3 186, 534, 951; 8 x 64, 4, 6 194, 572; 16 x 128 1118 at T = 128.
#   T = 256: 8 x 128 1082, 16 x 128 1184, 16 x 64 1182, 8 warps 1276. T = 512: 16 x 128 1218, with wgmma 1223,
#   32 x 128 with wgmma 1363.
#   T = 1024, with wgmma: 32 x 128 1402, 64 x 128 1818, 32 x 256 1630. T = 2048: 64 x 128 1846, 8 warps 1922.
#   T = 4096, 8192, with wgmma: 128 x 256, 8 warps 3289, 6611; 64 x 128, 8 warps 3720, 6940; 128 x 128 3820, 7472.
# TILINGS are for any GPU: ``mma`` alone, and within the 99 KiB of shared memory that the smallest of them have.
_FEW_ROWS = (
    Tiling(1 / 32, (8, 64, 4, 8, 4, False), (8, 64, 4, 8, 4, False)),
    Tiling(1 / 8, (8, 64, 4, 4, 6, False), (8, 64, 4, 4, 6, False)),
    Tiling(8, (8, 128, 4, 4, 4, False), (8, 128, 4, 4, 4, False)),
    Tiling(16, (16, 128, 4, 4, 3, False), (16, 128, 4, 4, 3, False)),
)

TILINGS = (
    *_FEW_ROWS,
    Tiling(32, (32, 64, 4, 4, 4, False), (32, 64, 4, 4, 4, False)),
    Tiling(float("inf"), (64, 128, 8, 3, 1, False), (64, 128, 8, 3, 1, False)),
)

HOPPER_TILINGS = (
    *_FEW_ROWS,
    Tiling(32, (32, 128, 4, 4, 2, True), (32, 128, 4, 4, 2, True)),
    Tiling(64, (64, 128, 4, 3, 2, True), (64, 128, 4, 3, 2, True)),
    Tiling(float("inf"), (128, 256, 8, 3, 1, True), (128, 256, 8, 3, 1, True)),
)


class PortableBackend:
    """See the module docstring; the interface is :class:`dsv4.backends.base.Backend`."""

    name = "portable"

    _last_views: tuple[Tensor | None, dict[str, Tensor]] = (None, {})
    """The scratch of the last call, and its buffers."""

    def __init__(self, config: MoEConfig, device: torch.device):
        from dsv4.kernels.triton.weight_layout import Matrix

        self.config = config
        self.device = device
        self._plan = _plan(config)
        i, h = config.intermediate_size, config.hidden_size
        self._l1 = Matrix(2 * i, h, 0, interleaved=True)
        self._l2 = Matrix(h, i, self._l1.end)
        properties = torch.cuda.get_device_properties(device)
        self._multiprocessors = properties.multi_processor_count
        # The two kinds of tensor-core instructions need not add up in the same order: one kind where bits are promised.
        self._tilings = HOPPER_TILINGS if properties.major == 9 and not config.batch_invariant else TILINGS

    @classmethod
    def explain(cls, config: MoEConfig, device: torch.device) -> Verdict:
        if device.type != "cuda":
            return Verdict(False, f"Triton kernels for NVIDIA GPUs, the device is {device.type}")
        if not torch.cuda.is_available():
            return Verdict(False, "torch sees no CUDA device")
        if find_spec("triton") is None:
            return Verdict(False, "Triton is not installed (pip install 'dsv4[cuda]')")
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            return Verdict(False, f"needs compute capability 8.0 for bf16 tensor cores, found {capability}")
        return Verdict(True, "Triton, weights decoded in registers for bf16 tensor cores")

    @classmethod
    def workspace_bytes(cls, config: MoEConfig, device: torch.device) -> int:
        return _plan(config).nbytes

    def pack(self, weights: MoEWeights, into: Packed | None = None) -> Packed:
        from dsv4.kernels.triton.packing import pack

        if into is None:
            into = Packed.empty(self.config.num_experts, self._l2.end, self.device)
        for matrix, fp4, sf in ((self._l1, weights.l1_fp4, weights.l1_sf), (self._l2, weights.l2_fp4, weights.l2_sf)):
            for part, codes, scales in packing_parts(fp4, sf, self.device):
                pack(codes, scales, matrix, into.experts[part])
        into.l1_gs.copy_(weights.l1_gs)
        into.l2_gs.copy_(weights.l2_gs)
        return into

    def unpack(self, packed: Packed) -> MoEWeights:
        from dsv4.kernels.triton.packing import unpack

        l1, l2 = unpack(packed.experts, self._l1), unpack(packed.experts, self._l2)
        return MoEWeights(*l1, packed.l1_gs.clone(), *l2, packed.l2_gs.clone())

    def budgets(self) -> Sequence[int]:
        cfg = self.config
        return token_classes(cfg.num_experts, cfg.top_k, cfg.max_num_tokens, self._edges())

    def _edges(self) -> tuple[float, ...]:
        """Numbers of slots beyond which a call takes another path."""
        return tuple(t.rows_per_expert * self.config.num_experts for t in self._tilings)

    def warmup(self, packed: Packed, scratch: Tensor, calls: Sequence[Call]) -> None:
        for call in calls:
            for dtype in OUT_DTYPES:
                self.run(packed, call, scratch, torch.empty_like(call.hidden_states, dtype=dtype))

    def run(self, packed: Packed, call: Call, scratch: Tensor, out: Tensor) -> None:
        if _is_dense(out):
            self._run(packed, _dense(call), self._views(scratch), out)
        else:
            dense = torch.empty_like(out, memory_format=torch.contiguous_format)
            self.run(packed, call, scratch, dense)
            out.copy_(dense)

    def _views(self, scratch: Tensor) -> dict[str, Tensor]:
        """The plan's buffers. A layer keeps its scratch, and making twenty views costs the host more than a launch."""
        if self._last_views[0] is not scratch:
            self._last_views = (scratch, self._plan.views(scratch))
        return self._last_views[1]

    def _run(self, packed: Packed, call: Call, views: dict[str, Tensor], out: Tensor) -> None:
        """:meth:`run` on tensors that are contiguous and aligned."""
        from dsv4.kernels.triton.grouped_gemm import grouped_gemm
        from dsv4.kernels.triton.stages import ScaleSource, batch_amax, combine, stage_rows

        cfg = self.config
        tokens = call.hidden_states.shape[0]
        slots = tokens * cfg.top_k
        gemm1, gemm2 = self._tiling(tokens)
        tables = self._route(call, views, gemm1.block_m)
        local = tables.local_ids
        activated = self._gemm1(packed, call, views, tables, gemm1, quantize=cfg.quantizes_activations)

        operand_scale = None
        if cfg.quantizes_activations:
            source, scale = self._scale_source(call, call.input_scales.l2 if call.input_scales else None, tables, 1)
            operand_scale = views["act_scale"][:slots]
            if source is ScaleSource.BATCH:
                batch_amax(activated, local, tables.amax[1:], 1)
            if source is ScaleSource.BATCH or (cfg.fused_swiglu and source is ScaleSource.ROW):
                stage_rows(activated, activated, operand_scale, source=source, scale=scale, local_ids=local)
        slot_rows = self._slot_rows(views, slots)
        grouped_gemm(
            activated, operand_scale, packed.experts, self._l2, packed.l2_gs, tables.tiles, slot_rows, gemm2,
            slots_per_row=1, multiprocessors=self._multiprocessors,
        )  # fmt: skip
        combine(slot_rows, local, call.topk_weights if cfg.route_weight == "output" else None, out, cfg.top_k)

    def activation_amax(self, packed: Packed, call: Call, scratch: Tensor) -> tuple[Tensor, Tensor]:
        call = _dense(call)
        tables, activated = self._activated_amax(packed, call, self._views(scratch))
        hidden = call.hidden_states
        if self.config.route_weight == "input":
            hidden = (hidden.float() * call.topk_weights).to(torch.bfloat16)
        by_slot = finite_row_amax(hidden).repeat_interleave(self.config.top_k, output_size=tables.local_ids.shape[0])
        return self._expert_amax(by_slot, tables), self._expert_amax(activated, tables)

    def _activated_amax(self, packed: Packed, call: Call, views: dict[str, Tensor]) -> tuple[RoutingBuffers, Tensor]:
        """The call's routing, and the largest magnitude of each slot's unquantized intermediate: fp32 ``[S]``."""
        config, _ = self._tiling(call.hidden_states.shape[0])
        tables = self._route(call, views, config.block_m)
        return tables, finite_row_amax(self._gemm1(packed, call, views, tables, config, quantize=False))

    # Stages.

    def _tables(
        self, call: Call, views: dict[str, Tensor], row_tile: int, groups: RowGroups | None = None
    ) -> RoutingBuffers:
        """Room for the tables of routing."""
        from dsv4.kernels.triton.grouped_gemm import TileMap
        from dsv4.kernels.triton.routing import RoutingBuffers

        slots = call.topk_ids.numel()
        rows = capacity(slots, self.config.num_experts, row_tile)
        return RoutingBuffers(
            views["local_ids"][:slots],
            TileMap(views["row_slot"][:rows], views["tile_expert"][: rows // row_tile], views["num_tiles"]),
            views["hist"],
            views["amax"],
            groups,
        )

    def _route(self, call: Call, views: dict[str, Tensor], row_tile: int) -> RoutingBuffers:
        tables = self._tables(call, views, row_tile)
        self._fill(tables, call, row_tile)
        return tables

    def _fill(self, tables: RoutingBuffers, call: Call, row_tile: int) -> None:
        from dsv4.kernels.triton.routing import route

        cfg = self.config
        route(
            call.topk_ids, cfg.num_experts, row_tile, tables, start=cfg.experts_start_idx, expert_map=call.expert_map,
            num_valid_tokens=call.num_valid_tokens,
        )  # fmt: skip

    def _gemm1(
        self,
        packed: Packed,
        call: Call,
        views: dict[str, Tensor],
        tables: RoutingBuffers,
        config: GemmConfig,
        quantize: bool,
    ) -> Tensor:
        """Stage the tokens, multiply, SwiGLU: bf16 ``[S, I]``, already staged where the scale is known by then."""
        from dsv4.kernels.triton.grouped_gemm import Requantize, grouped_gemm
        from dsv4.kernels.triton.stages import ScaleSource, batch_amax, stage_rows

        cfg = self.config
        tokens, slots = call.hidden_states.shape[0], call.topk_ids.numel()
        x, x_scale, slots_per_row = call.hidden_states, None, cfg.top_k
        input_weights = call.topk_weights if cfg.route_weight == "input" else None
        if quantize:
            scales = call.input_scales
            per_slot = scales is not None and cfg.l1_scale_policy == "per_expert"
            given = None if scales is None else scales.l1 if per_slot else scales.l1_merged
            source, scale = self._scale_source(call, given, tables, 0)
            if source is ScaleSource.BATCH:
                batch_amax(x, tables.local_ids, tables.amax[:1], cfg.top_k, input_weights)
            rows = slots if per_slot else tokens
            staged, x_scale = views["x_staged"][:rows], views["x_scale"][:rows]
            stage_rows(
                x, staged, x_scale, source=source, scale=scale, weights=input_weights,
                local_ids=tables.local_ids if per_slot else None, slots_per_row=cfg.top_k if per_slot else 1,
            )  # fmt: skip
            x, slots_per_row = staged, 1 if per_slot else cfg.top_k
        elif input_weights is not None:
            staged = views["x_staged"][:tokens]
            stage_rows(x, staged, views["x_scale"], source=ScaleSource.NONE, weights=input_weights)
            x = staged

        weights = call.topk_weights if cfg.route_weight == "before_down" else None
        activated, operand_scale = views["act"][:slots], views["act_scale"][:slots]
        source, scale = ScaleSource.NONE, None
        if quantize:
            source, scale = self._scale_source(call, call.input_scales.l2 if call.input_scales else None, tables, 1)
        if cfg.fused_swiglu:
            known = scale if source is ScaleSource.EXPERT else None
            grouped_gemm(
                x, x_scale, packed.experts, self._l1, packed.l1_gs, tables.tiles, activated, config,
                slots_per_row=slots_per_row, swiglu=True, limit=cfg.swiglu_limit, topk_weights=weights,
                requantize=Requantize(known, operand_scale) if known is not None else None,
                multiprocessors=self._multiprocessors,
            )  # fmt: skip
            return activated
        gate_up = views["gate_up"][:slots]
        grouped_gemm(
            x, x_scale, packed.experts, self._l1, packed.l1_gs, tables.tiles, gate_up, config,
            slots_per_row=slots_per_row, multiprocessors=self._multiprocessors,
        )  # fmt: skip
        if source is ScaleSource.BATCH:  # the maximum is not known yet
            source = ScaleSource.NONE
        stage_rows(
            gate_up, activated, operand_scale, source=source, scale=scale, local_ids=tables.local_ids,
            swiglu=True, limit=cfg.swiglu_limit, weights=weights,
        )  # fmt: skip
        return activated

    def _scale_source(
        self, call: Call, given: Tensor | None, tables: RoutingBuffers, gemm: int
    ) -> tuple[ScaleSource, Tensor | None]:
        from dsv4.kernels.triton.stages import ScaleSource

        if given is not None:
            return (ScaleSource.GIVEN if given.numel() == 1 and gemm == 0 else ScaleSource.EXPERT), given
        if self.config.activation_scale == "token":
            return ScaleSource.ROW, None
        return ScaleSource.BATCH, tables.amax[gemm:]

    def _slot_rows(self, views: dict[str, Tensor], slots: int) -> Tensor:
        """GEMM 2's output ``[S, H]``: fp32 for small calls, bf16 for large ones, where it halves combine's time.

        Where a token's bits may not depend on its batch it is fp32 always.
        """
        down = views["down"]
        if down.dtype == torch.float32 or slots > FP32_SLOTS or 2 * slots > down.shape[0]:
            return down[:slots]
        return down[: 2 * slots].view(torch.float32).view(slots, -1)

    def _tiling(self, tokens: int) -> tuple[GemmConfig, GemmConfig]:
        """Chosen by the number of tokens of the call alone, which a captured graph fixes."""
        from dsv4.kernels.triton.grouped_gemm import GemmConfig

        mean = tokens * self.config.top_k / self.config.num_experts
        tiling = next(t for t in self._tilings if mean <= t.rows_per_expert)
        return GemmConfig(*tiling.gemm1), GemmConfig(*tiling.gemm2)

    def _expert_amax(self, amax: Tensor, tables: RoutingBuffers) -> Tensor:
        local = tables.local_ids.long()
        amax = torch.where(local >= 0, amax, 0.0)
        result = torch.zeros(self.config.num_experts, dtype=torch.float32, device=self.device)
        return result.scatter_reduce_(0, local.clamp(min=0), amax, "amax")


@cache
def token_classes(num_experts: int, top_k: int, max_num_tokens: int, edges: tuple[float, ...]) -> tuple[int, ...]:
    """Numbers of tokens whose calls, together, launch every variant of the kernels that any call launches.

    A call's variants follow from how its slots are cut up for routing, from the dtype of its slot rows, and from which
    ``edges``, numbers of slots, it is beyond: those of the table of tilings.
    """
    from dsv4.kernels.triton.routing import RoutingConfig, num_bins

    bins = num_bins(num_experts)
    first: dict[tuple[object, ...], int] = {}
    for tokens in range(1, max_num_tokens + 1):
        slots = tokens * top_k
        routing = RoutingConfig.of(slots, bins)
        wide = slots <= FP32_SLOTS and 2 * tokens <= max_num_tokens
        beyond = sum(slots > edge for edge in edges)
        first.setdefault((routing, beyond, wide), tokens)
    return tuple(first.values())


_ALIGNMENT = 16
"""Bytes of an asynchronous copy. Triton compiles a kernel anew for an address that is not a multiple of it."""


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0


def _dense(call: Call) -> Call:
    """The call with contiguous, aligned tensors: the same ones, where they are."""

    def dense(tensor: Tensor) -> Tensor:
        return tensor if _is_dense(tensor) else tensor.clone(memory_format=torch.contiguous_format)

    return replace(
        call,
        hidden_states=dense(call.hidden_states),
        topk_weights=dense(call.topk_weights),
        topk_ids=dense(call.topk_ids),
    )


def _plan(config: MoEConfig) -> BufferPlan:
    from dsv4.kernels.triton.routing import histogram_size

    slots, e = config.max_slots, config.num_experts
    h, i = config.hidden_size, config.intermediate_size
    row_tiles = {t.gemm1[0] for t in (*TILINGS, *HOPPER_TILINGS)}
    smallest = min(row_tiles)
    rows = max(capacity(slots, e, tile) for tile in row_tiles)
    per_slot = config.quantizes_activations and config.l1_scale_policy == "per_expert"
    x_rows = slots if per_slot else config.max_num_tokens
    staged = config.quantizes_activations or config.route_weight == "input"
    buffers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "local_ids": ((slots,), torch.int32),
        "row_slot": ((rows,), torch.int32),
        "tile_expert": ((capacity(slots, e, smallest) // smallest,), torch.int32),
        "num_tiles": ((1,), torch.int32),
        "hist": ((histogram_size(slots, e),), torch.int32),
        "amax": ((2,), torch.float32),
        "x_scale": ((x_rows,), torch.float32),
        "act_scale": ((slots,), torch.float32),
        "x_staged": ((x_rows if staged else 0, h), torch.bfloat16),
        "act": ((slots, i), torch.bfloat16),
        "down": ((slots, h), torch.float32 if config.batch_invariant else torch.bfloat16),
    }
    # gate_up is dead before down is written, and shares its memory.
    aliases = {"gate_up": ("down", ((slots, 2 * i), torch.float32))} if not config.fused_swiglu else {}
    return BufferPlan(buffers, aliases)
