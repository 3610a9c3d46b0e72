"""The Hopper backend: grouped GEMMs in CuTe DSL (:mod:`dsv4.kernels.hopper`), the stages around them in Triton.

Rows live in *images*, in the order of the tile map, from the gather to GEMM 2; combine, and routing but of the smallest
calls, are the portable backend's, as is everything that only chooses scales.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsv4.backends.base import Call, Packed, Verdict, packing_parts
from dsv4.backends.portable import PortableBackend
from dsv4.backends.proof import configurations
from dsv4.config import MoEConfig, capacity
from dsv4.kernels.cutedsl.cache import dsl_version
from dsv4.kernels.hopper.cache import ARCH, CACHE
from dsv4.kernels.hopper.config import COMPARED_SLOTS, FEW_SLOTS, ROW_UNIT, HopperConfig
from dsv4.kernels.hopper.layout import matrix_bytes, unpack_matrix
from dsv4.nvfp4 import pack_nibbles
from dsv4.weights import MoEWeights
from dsv4.workspace import BufferPlan

if TYPE_CHECKING:
    from dsv4.kernels.triton.routing import RoutingBuffers, RowGroups
    from dsv4.kernels.triton.stages import ScaleSource

FEW_TOKENS = 64
"""Calls of up to so many tokens scatter them to their rows, others gather them."""

MANY_TOKENS = 2048
"""Calls of more tokens gather in smaller programs."""

_MULTIPLE = 128
"""H and I are multiples of it: whole blocks of weights."""


@dataclass(frozen=True)
class Tiling:
    """One line of the table: up to ``rows_per_expert`` slots for each expert on average.

    Attributes:
        rows_per_expert: the largest mean, ``T * k / E``, that this line serves.
        loops: of :class:`HopperConfig`.
        gemm1: ``(warpgroups, blocks, stages, programs_per_sm)`` of :class:`HopperConfig`.
        gemm2: the same of down.
    """

    rows_per_expert: float
    loops: tuple[tuple[int, ...], ...]
    gemm1: tuple[int, int, int, int]
    gemm2: tuple[int, int, int, int]

    @property
    def tokens(self) -> int:
        """The most rows of a row group."""
        return self.loops[-1][-1]


# Measured on an H200, W4A16, microseconds of the whole layer, in a process that replayed nothing but the lines of a row
# in turn; floor of each T in brackets. Rows are of several H200s and days, and do not compare. A tiling is
# written as loops, a + between the widths of one: warpgroups, K blocks, stages, programs. V4-Flash:
#   T = 16 [259], 64 [634], 128 [775]: 8: 2,2,5,2 284, 675, 845; 2,2,3,3 287, 669, 846; 4,1,5,2 706, 876 (T = 64, 128);
#     1,2,5,3 289 (T = 16), 877 (T = 128). V4-Pro, T = 16, 32, 64 [716, 1277, 2039]: 2,2,5,2 786, 1398, 2218; 2,2,3,3
#     810, 1372, 2202; 1,2,5,3 816, 1442, 2332.
#   T = 256 [813]: 8, 16: 2,2,4,2 941; 4,1,5,2 996; 16 alone 1061; 8 alone 1030.
#   T = 512 [816]: 8, 16, 24: 2,2,3,2 996; 8, 16, 24+32: 2,2,3,2 992; 8, 16+24: 2,2,3,2 1015. Before: 8, 16, 24: 2,2,3,2
#     1040; 4,2,4,1 1072.
#   T = 1024 [816], 4,2,3,1: 16+24, 32, 40 1148; 16+24, 32+40+48 1152; 24, 32, 40 1156; 16+24, 32+40 1158. Before: 24,
#     32: 4,2,4,1 1204; 4,1,7,1 1257.
#   T = 2048 [816]: 40+48, 56+64+72: 4,2,3,1 1459; 48, 56+64: 4,2,3,1 1474; 40+48, 56+64: 4,2,3,1 1484; 48, 64: 4,1,5,1
#     1548. (For a GEMM 1 that quantizes its result 72 tokens are 1248 bytes of shared memory too much; 40
#     stands for skewed routings.)
#   T = 4096 [1602], 2,1,5,1: 80+88, 96, 104, 112, 120+128 2341; 64+80, 88, 96, 104, 112, 120+128 2345; 80, 88, 96, 104,
#     112, 128 2346. All in one loop, before: up to 128 by eights 2737; 80, 88, 96, 104, 112, 128 2445.
#   T = 8192 [3205], and under Zipf, 2,1,3,1: 64+128, 176+184, 192, 200, 208+224 4120, 4727; 32+64+96+128+160, 176+184,
#     192, 200, 208+216+224 4134, 4662; 64, 128, 184, 200, 224 4244, 4824. (48+56+64+72+80, 96+104+112, 120, 128, 136,
#     144, 152+160: 2,1,4,1 under Zipf: 4591; with it an expert of 192 rows is decoded twice.) A GEMM 1 that quantizes
#     its result has registers for four loops.
# V4-Pro:
#   T = 1024 [3212], 16 rows an expert: 8, 16, 24: 2,2,3,2 4173; 4,2,4,1 4192; 16, 24+32: 4,2,4,1 4183; 8, 16, 24+32:
#     2,2,3,2 4294.
#   T = 2048 [3212], 32 rows, 4,2,3,1: 24+32, 40+48+56 4820; 24+32, 40+48 4821; 32, 48 4910.
#   T = 4096 [4206], 64 rows: 48+56+64+72+80+96: 4,1,4,1 6733; 56+64+72+80: 4,1,5,1 6775; 48 to 88 by eights in one
#     loop: 4,1,5,1 6946; 48, 56, 64, 72, 80: 2,2,3,1 7019.
#   T = 8192 [8412], 128 rows, and under Zipf, 2,1,4,1: 32+64+96, 112, 120, 128, 136, 144, 160 10969, 13193;
#     48+56+64+72+80, 96+104+112, 120, 128, 136, 144, 152+160 11120, 13119; 48, 80, 112, 128, 136, 144, 160 11317,
#     12988.
TILINGS = (
    Tiling(0.4, ((8,),), (2, 2, 5, 2), (2, 2, 5, 2)),
    Tiling(4, ((8,),), (2, 2, 3, 3), (2, 2, 3, 3)),
    Tiling(9, ((8,), (16,)), (2, 2, 4, 2), (2, 2, 4, 2)),
    Tiling(16, ((8,), (16,), (24,)), (2, 2, 3, 2), (2, 2, 3, 2)),
    Tiling(30, ((16, 24), (32, 40, 48)), (4, 2, 3, 1), (4, 2, 3, 1)),
    Tiling(40, ((24, 32), (40, 48, 56)), (4, 2, 3, 1), (4, 2, 3, 1)),
    Tiling(60, ((40, 48), (56, 64)), (4, 2, 3, 1), (4, 2, 3, 1)),
    Tiling(76, ((48, 56, 64, 72, 80, 96),), (4, 1, 4, 1), (4, 1, 4, 1)),
    Tiling(110, ((64, 80), (88,), (96,), (104,), (112,), (120, 128)), (2, 1, 5, 1), (2, 1, 5, 1)),
    # The narrow ones of these two are for experts with few rows, under skewed routing.
    Tiling(144, ((32, 64, 96), (112,), (120,), (128,), (136,), (144,), (160,)), (2, 1, 4, 1), (2, 1, 4, 1)),
    Tiling(
        float("inf"), ((32, 64, 96, 128, 160), (176, 184), (192,), (200, 208, 216, 224)), (2, 1, 3, 1), (2, 1, 3, 1)
    ),
)

# Of the same layer at T = 1, 2, 4, for GEMM 1 and GEMM 2 as warpgroups, K blocks, stages, programs:
#   1,2,4,4 both 36.8, 61.5, 94.9; 1,2,5,3 and 1,2,4,4 33.8, 60.5, 96.9; 1,2,4,4 and 1,2,5,3 34.8, 58.9, 100.6;
#   2,2,3,3 both 41.0, 51.8, 93.5; 2,2,5,2 both 37.8, 61.4, 93.4; 1,1,5,6 and 1,2,4,4 42.3, 55.3, 95.0.
# V4-Pro, T = 1, 2 [50, 99]: 1,2,4,4 both 85, 136; 1,2,3,5 and 1,2,4,4 75, 128; 2,2,3,3 both 75, 136; 2,2,5,2 both 78,
#   129. What counts is that all tiles run at once and that no multiprocessor has more of them than the others.
ONE_WAVE = ((1, 2, 5, 3), (2, 2, 5, 2), (1, 2, 3, 5), (2, 2, 3, 3))
"""For few tiles, where groups are narrowest: the first of these whose programs, a tile each, run all at once."""

# Since programs take tiles as they become free, T = 4, 8, and V4-Pro T = 2, 4, 8, shapes of both products:
#   1,2,5,3 91.5, 163.1, 116.3, 217.5, 432.5; 2,2,5,2 93.6, 163.8, 124.5, 220.7, 420.1; 1,2,3,5 95.5, 166.4, 122.8,
#   222.0, 444.4; 2,2,3,3 94.5, 168.0, 134.5, 224.4, 421.5. 1,2,5,3 for GEMM 1 and 2,2,5,2 for GEMM 2 are worse than
#   either for both: a program of the larger shape waits until two of the smaller have made room.
FEW_TILES = 8
"""Where not all tiles run at once, but a program of the smallest shape of ``ONE_WAVE`` has up to so many of either
product: that shape, but for a GEMM 1 that wants an even number of warpgroups."""


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
        if dsl_version() is None:
            needed = {kernel for layer in (config, *configurations()) for kernel in kernels(layer)}
            missing = len(CACHE.missing(needed, ARCH))
            if missing:
                return Verdict(
                    False,
                    f"no recent nvidia-cutlass-dsl is installed, and {missing} of the {len(needed)} kernels of the "
                    f"layer and of the self-check are not in {CACHE.folder()}",
                )
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
        tables, groups = self._schedule(call, views, tiling)
        self._activate(packed, call, views, tables, groups, tiling, quantize=cfg.quantizes_activations)
        activated, i = views["act"], cfg.intermediate_size
        row_scale, expert_scale = None, None
        if _requantizes(cfg):
            expert_scale = call.input_scales.l2 if call.input_scales else None
        elif cfg.quantizes_activations:
            source, scale = self._scale_source(call, None, tables, 1)
            row_scale = views["row_scale"]
            if source is ScaleSource.BATCH:
                image_amax(activated, tables.tiles, groups, ROW_UNIT, i, tables.amax[1:], of_batch=True)
            quantize_image(activated, row_scale, tables.tiles, groups, ROW_UNIT, i, source, scale, dependent=True)
        slot_rows = self._slot_rows(views, slots)
        gemm2 = replace(_gemm2_config(cfg, tiling), wide_out=slot_rows.dtype == torch.float32)
        grouped_gemm(
            gemm2, activated, row_scale, packed.experts, self._l2_offset, packed.l2_gs, tables.tiles, groups, slot_rows,
            rows=cfg.hidden_size, k=i, multiprocessors=self._multiprocessors, expert_scale=expert_scale,
            dependent=True,
        )  # fmt: skip
        combine(
            slot_rows, tables.local_ids, call.topk_weights if cfg.route_weight == "output" else None, out, cfg.top_k,
            dependent=True,
        )  # fmt: skip

    def _activated_amax(self, packed: Packed, call: Call, views: dict[str, Tensor]) -> tuple[RoutingBuffers, Tensor]:
        from dsv4.kernels.hopper.stages import image_amax

        tiling = self._line(call.hidden_states.shape[0])
        tables, groups = self._schedule(call, views, tiling)
        self._activate(packed, call, views, tables, groups, tiling, quantize=False)
        amax = torch.zeros(call.topk_ids.numel(), dtype=torch.float32, device=self.device)
        image_amax(views["act"], tables.tiles, groups, ROW_UNIT, self.config.intermediate_size, amax, of_batch=False)
        return tables, amax

    def _edges(self) -> tuple[float, ...]:
        cfg = self.config
        waves = (self._at_once(shape) / row_tiles for shape in ONE_WAVE for row_tiles in _row_tiles(cfg))
        tokens = (FEW_TOKENS * cfg.top_k, MANY_TOKENS * cfg.top_k)
        lines = (t.rows_per_expert * cfg.num_experts for t in TILINGS)
        return (*lines, *waves, self._few_tiles_slots(), *COMPARED_SLOTS, *tokens)

    def _line(self, tokens: int) -> Tiling:
        """Chosen by the number of tokens of the call alone, which a captured graph fixes."""
        slots = tokens * self.config.top_k
        line = next(t for t in TILINGS if slots / self.config.num_experts <= t.rows_per_expert)
        if not _narrowest(line):
            return line
        few = ONE_WAVE[:1] if slots <= self._few_tiles_slots() else ()
        shapes = []
        for served, row_tiles, otherwise in zip(
            (_one_wave(_requantizes(self.config)), ONE_WAVE),
            _row_tiles(self.config),
            (line.gemm1, line.gemm2),
            strict=True,
        ):
            at_once = (shape for shape in served if slots * row_tiles <= self._at_once(shape))
            smallest = (shape for shape in few if shape in served)
            shapes.append(next(chain(at_once, smallest, (otherwise,))))
        return replace(line, gemm1=shapes[0], gemm2=shapes[1])

    def _few_tiles_slots(self) -> float:
        """Up to so many slots a program of the smallest shape has ``FEW_TILES`` tiles at most, of either product."""
        return FEW_TILES * self._at_once(ONE_WAVE[0]) / max(_row_tiles(self.config))

    def _at_once(self, shape: tuple[int, int, int, int]) -> int:
        """64-row tiles that are multiplied at the same time, if each program has one tile."""
        warpgroups, _, _, programs_per_sm = shape
        return warpgroups * programs_per_sm * self._multiprocessors

    def _schedule(self, call: Call, views: dict[str, Tensor], tiling: Tiling) -> tuple[RoutingBuffers, RowGroups]:
        from dsv4.kernels.triton.routing import RowGroups

        slots, most = call.topk_ids.numel(), tiling.tokens
        e = self.config.num_experts
        tiles, groups = capacity(slots, e, ROW_UNIT) // ROW_UNIT, capacity(slots, e, most) // most
        schedule = RowGroups(
            most,
            views["slot_row"][:slots],
            views["tile_start"][:tiles],
            views["tile_rows"][:tiles],
            views["group_row"][: groups + 1],
            views["group_expert"][:groups],
            views["num_groups"],
            views["taken"],
        )
        return self._tables(call, views, ROW_UNIT, schedule), schedule

    def _activate(
        self,
        packed: Packed,
        call: Call,
        views: dict[str, Tensor],
        tables: RoutingBuffers,
        groups: RowGroups,
        tiling: Tiling,
        quantize: bool,
    ) -> None:
        """Routing, tokens to their rows, GEMM 1, SwiGLU: the image ``act``, quantized if its scales are known ahead."""
        from dsv4.kernels.hopper.few_slots import route_and_scatter
        from dsv4.kernels.hopper.launch import grouped_gemm
        from dsv4.kernels.triton.stages import ScaleSource, batch_amax

        cfg, x = self.config, call.hidden_states
        input_weights = call.topk_weights if cfg.route_weight == "input" else None
        source, scale = ScaleSource.NONE, None
        if quantize:
            per_slot, given = cfg.l1_scale_policy == "per_expert", None
            if call.input_scales is not None:
                given = call.input_scales.l1 if per_slot else call.input_scales.l1_merged
            source, scale = self._scale_source(call, given, tables, 0)
        image, row_scale = views["x_image"], views["row_scale"]
        together = call.topk_ids.numel() <= FEW_SLOTS and source is not ScaleSource.BATCH
        if together:
            route_and_scatter(
                call.topk_ids, x, tables, image, row_scale, cfg.num_experts, ROW_UNIT, source=source, scale=scale,
                weights=input_weights, start=cfg.experts_start_idx, expert_map=call.expert_map,
                num_valid_tokens=call.num_valid_tokens, dependent=True,
            )  # fmt: skip
        else:
            self._fill(tables, call, ROW_UNIT)
            if source is ScaleSource.BATCH:
                batch_amax(x, tables.local_ids, tables.amax[:1], cfg.top_k, input_weights)
            self._place_tokens(x, views, tables, groups, source, scale, input_weights)
        gemm1 = _gemm1_config(cfg, tiling, quantize)
        grouped_gemm(
            replace(gemm1, follows_routing=together), image, row_scale if quantize else None, packed.experts, 0,
            packed.l1_gs, tables.tiles, groups, views["act"], rows=2 * cfg.intermediate_size, k=cfg.hidden_size,
            multiprocessors=self._multiprocessors, limit=cfg.swiglu_limit, topk_weights=call.topk_weights,
            result_gs=call.input_scales.l2 if call.input_scales else None, dependent=True,
        )  # fmt: skip

    def _place_tokens(
        self,
        x: Tensor,
        views: dict[str, Tensor],
        tables: RoutingBuffers,
        groups: RowGroups,
        source: ScaleSource,
        scale: Tensor | None,
        input_weights: Tensor | None,
    ) -> None:
        """Tokens to their rows, quantized where ``source`` says so."""
        from dsv4.kernels.hopper.stages import gather_rows, quantize_image, scatter_rows
        from dsv4.kernels.triton.stages import ScaleSource, stage_rows

        cfg, tokens = self.config, x.shape[0]
        image, row_scale = views["x_image"], views["row_scale"]
        if tokens <= FEW_TOKENS:
            scatter_rows(
                x, image, row_scale, groups, tables.local_ids, ROW_UNIT, cfg.top_k, source=source, scale=scale,
                weights=input_weights, dependent=True,
            )  # fmt: skip
            return
        x_scale, staged = None, ScaleSource.NONE if source is ScaleSource.EXPERT else source
        if input_weights is not None or staged is not ScaleSource.NONE:
            rows, scales = views["x_staged"][:tokens], views["x_scale"][:tokens]
            stage_rows(x, rows, scales, source=staged, scale=scale, weights=input_weights)
            x, x_scale = rows, scales if staged is not ScaleSource.NONE else None
        gather_rows(
            x, x_scale, image, row_scale, tables.tiles, groups, ROW_UNIT, cfg.top_k,
            blocks=4 if tokens > MANY_TOKENS else 8,
        )  # fmt: skip
        if source is ScaleSource.EXPERT:
            quantize_image(image, row_scale, tables.tiles, groups, ROW_UNIT, cfg.hidden_size, source, scale)


def _requantizes(config: MoEConfig) -> bool:
    """Whether GEMM 1 quantizes its result: all scales of GEMM 2's operand are known before."""
    return config.quantizes_activations and config.activation_scale in ("static", "calibrated")


def _row_tiles(config: MoEConfig) -> tuple[int, int]:
    """64s of rows of an expert's two matrices."""
    return 2 * config.intermediate_size // 64, config.hidden_size // 64


def _narrowest(line: Tiling) -> bool:
    """Whether few tiles take shapes of their own in this line."""
    return line.loops == TILINGS[0].loops


def _one_wave(even: bool) -> list[tuple[int, int, int, int]]:
    """Of ``ONE_WAVE``, those with an even number of warpgroups, if a scale group of the result is to lie in two."""
    return [shape for shape in ONE_WAVE if not (even and shape[0] % 2)]


def _gemm1_config(config: MoEConfig, tiling: Tiling, quantize: bool) -> HopperConfig:
    """GEMM 1; unless ``quantize``, of tokens as they are: W4A16's, and what calibration looks at."""
    return HopperConfig(
        tiling.loops,
        *tiling.gemm1,
        gated=True,
        row_scale=quantize,
        requantized=quantize and _requantizes(config),
        weighted=config.route_weight == "before_down",
        limited=config.swiglu_limit is not None,
    ).fitted(2 * config.intermediate_size, config.hidden_size)


def _gemm2_config(config: MoEConfig, tiling: Tiling) -> HopperConfig:
    return HopperConfig(tiling.loops, *tiling.gemm2).fitted(config.hidden_size, config.intermediate_size)


def kernels(config: MoEConfig) -> list[HopperConfig]:
    """Every kernel that a layer may launch: what is compiled ahead of time."""
    needed, fewest = [], 0.0
    for line in TILINGS:
        few = _narrowest(line)
        for shape in (*(_one_wave(_requantizes(config)) if few else ()), line.gemm1):
            quantized = (True, False) if config.quantizes_activations else (False,)
            firsts = [_gemm1_config(config, replace(line, gemm1=shape), quantize) for quantize in quantized]
            if fewest < FEW_SLOTS:
                firsts += [replace(first, follows_routing=True) for first in firsts]
            needed += firsts
        for shape in (*(ONE_WAVE if few else ()), line.gemm2):
            gemm2 = _gemm2_config(config, replace(line, gemm2=shape))
            needed += [gemm2, replace(gemm2, wide_out=True)]
        fewest = line.rows_per_expert * config.num_experts
    return list(dict.fromkeys(needed))


def _plan(config: MoEConfig) -> BufferPlan:
    from dsv4.kernels.triton.routing import histogram_size

    slots, e = config.max_slots, config.num_experts
    h, i = config.hidden_size, config.intermediate_size
    # A line of the table serves calls of so many slots at most.
    served = [(t, min(slots, int(min(t.rows_per_expert * e, slots)))) for t in TILINGS]
    rows = capacity(slots, e, ROW_UNIT)
    row_tiles = rows // ROW_UNIT
    groups = max(capacity(s, e, t.tokens) // t.tokens for t, s in served)
    staged = config.max_num_tokens * h if config.quantizes_activations or config.route_weight == "input" else 0
    buffers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "local_ids": ((slots,), torch.int32),
        "row_slot": ((rows,), torch.int32),
        "tile_expert": ((row_tiles,), torch.int32),
        "num_tiles": ((1,), torch.int32),
        "slot_row": ((slots,), torch.int32),
        "tile_start": ((row_tiles,), torch.int32),
        "tile_rows": ((row_tiles,), torch.int32),
        "group_row": ((groups + 1,), torch.int32),
        "group_expert": ((groups,), torch.int32),
        "num_groups": ((1,), torch.int32),
        "taken": ((2,), torch.int32),
        "hist": ((histogram_size(slots, e),), torch.int32),
        "amax": ((2,), torch.float32),
        "row_scale": ((rows,), torch.float32),
        "x_scale": ((config.max_num_tokens,), torch.float32),
        "act": ((max(rows * i, staged),), torch.bfloat16),
        "x_image": ((rows * h,), torch.bfloat16),
    }
    # GEMM 1's operand is dead before GEMM 2's rows are written; one plan serves both where rows >= slots.
    down = ((slots, h), torch.float32 if config.batch_invariant else torch.bfloat16)
    # Tokens are staged, and gathered, before GEMM 1 writes.
    x_staged = ((staged // h, h), torch.bfloat16)
    return BufferPlan(buffers, {"down": ("x_image", down), "x_staged": ("act", x_staged)})
