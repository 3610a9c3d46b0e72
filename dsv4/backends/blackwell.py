"""The Blackwell backend: grouped NVFP4 GEMMs in CuTe DSL (:mod:`dsv4.kernels.blackwell`), Triton around them.

Compiled and checked without the chip, never run on it: nothing here answers anybody before it agreed with the reference
on the very GPU (:mod:`dsv4.backends.proof`).

Rows stand in the order of their experts from the gather to GEMM 2, none of them padding. Weights keep the checkpoint's
K-major codes: rows of gate and up alternate by fours, and scales are swizzled, nothing else changes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsv4.backends.base import Call, Packed, Verdict, packing_parts
from dsv4.backends.portable import PortableBackend
from dsv4.backends.proof import configurations
from dsv4.config import MoEConfig, capacity
from dsv4.kernels.blackwell.config import BlackwellConfig, chosen, padded_scale_columns
from dsv4.kernels.blackwell.launch import ARCH_OF, Operands, Requantized, gemm_kernel, grouped_gemm, stored
from dsv4.kernels.cutedsl.cache import dsl_version
from dsv4.kernels.cutedsl.sizes import MAX_EXPERTS
from dsv4.ops.layouts import ROW_TILE, Swizzle32x4x4, round_up, swizzle_32_4_4
from dsv4.weights import MoEWeights
from dsv4.workspace import BufferPlan

if TYPE_CHECKING:
    from dsv4.kernels.triton.grouped_gemm import TileMap
    from dsv4.kernels.triton.routing import RoutingBuffers

_MULTIPLE = 32
"""H and I are multiples of it: 16 bytes of codes, what TMA reads, and the 32 columns that the epilogue stores."""

_GROUP = 4
"""Rows of gate that stand together, before as many of up."""

_ALIGNMENT = 128

MEANS = (4, 64, 255, float("inf"))
"""Rows per expert, on average, up to which one choice of tiles serves."""


@dataclass(frozen=True)
class _Matrix:
    """One projection in an expert's bytes: codes ``[N, K/2]``, then swizzled scales."""

    offset: int
    n: int
    k: int

    @property
    def scales_at(self) -> int:
        return self.offset + self.n * self.k // 2

    @property
    def swizzle(self) -> Swizzle32x4x4:
        return Swizzle32x4x4(self.n, self.k // 16)

    @property
    def end(self) -> int:
        return round_up(self.scales_at + self.swizzle.numel, _ALIGNMENT)

    def codes(self, experts: Tensor) -> Tensor:
        """View, uint8 ``[E, N, K/2]``."""
        return experts[:, self.offset : self.scales_at].unflatten(1, (self.n, self.k // 2))

    def scales(self, experts: Tensor) -> Tensor:
        """View, uint8 ``[E, pad128(N) * pad4(K/16)]``."""
        return experts[:, self.scales_at : self.scales_at + self.swizzle.numel]


def _alternating(rows: Tensor) -> Tensor:
    """``[E, gate | up, ..]`` as ``[E, I/4, 2, 4, ..]``, a view."""
    return rows.unflatten(1, (2, -1, _GROUP)).transpose(1, 2)


class BlackwellBackend(PortableBackend):
    """See the module docstring; the interface is :class:`dsv4.backends.base.Backend`."""

    name = "blackwell"
    loader = staticmethod(gemm_kernel)
    """Where the grouped GEMM comes from."""

    def __init__(self, config: MoEConfig, device: torch.device):
        self.config = config
        self.device = device
        self._plan = _plan(config)
        i, h = config.intermediate_size, config.hidden_size
        self._up = _Matrix(0, 2 * i, h)
        self._down = _Matrix(self._up.end, h, i)
        self._multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count

    @classmethod
    def explain(cls, config: MoEConfig, device: torch.device) -> Verdict:
        wanted = " or ".join(f"{major}.{minor}" for major, minor in ARCH_OF)
        if device.type != "cuda":
            return Verdict(False, f"kernels for compute capability {wanted}, found {device.type}")
        portable = PortableBackend.explain(config, device)
        if not portable.usable:
            return portable
        capability = torch.cuda.get_device_capability(device)
        if capability not in ARCH_OF:
            return Verdict(False, f"kernels for compute capability {wanted}, found {capability[0]}.{capability[1]}")
        declined = declines(config)
        if declined is not None:
            return Verdict(False, declined)
        if dsl_version() is None:
            layers = [layer for layer in (config, *configurations()) if declines(layer) is None]
            if any(stored(kernel, capability) is None for layer in layers for kernel in kernels(layer)):
                return Verdict(
                    False,
                    "no recent nvidia-cutlass-dsl is installed, and the kernel cache lacks kernels of this layer or of "
                    "the self-check",
                )
        return Verdict(True, "CuTe DSL, NVFP4 tensor cores")

    @classmethod
    def workspace_bytes(cls, config: MoEConfig, device: torch.device) -> int:
        return _plan(config).nbytes

    def pack(self, weights: MoEWeights, into: Packed | None = None) -> Packed:
        if into is None:
            into = Packed.empty(self.config.num_experts, self._down.end, self.device)
        parts = ((self._up, True, weights.l1_fp4, weights.l1_sf), (self._down, False, weights.l2_fp4, weights.l2_sf))
        for matrix, gated, fp4, sf in parts:
            for part, codes, scales in packing_parts(fp4, sf, self.device):
                experts = into.experts[part]
                target = matrix.codes(experts)
                if gated:
                    target.unflatten(1, (-1, 2, _GROUP)).copy_(_alternating(codes))
                    scales = _alternating(scales).flatten(1, 3)
                else:
                    target.copy_(codes)
                for expert, row in zip(scales, matrix.scales(experts), strict=True):
                    swizzle_32_4_4(expert, out=row)
        into.l1_gs.copy_(weights.l1_gs)
        into.l2_gs.copy_(weights.l2_gs)
        return into

    def unpack(self, packed: Packed) -> MoEWeights:
        tensors = []
        for matrix, gated in ((self._up, True), (self._down, False)):
            codes = matrix.codes(packed.experts)
            scales = torch.stack([matrix.swizzle.unswizzle(flat) for flat in matrix.scales(packed.experts)])
            for rows in (codes, scales):
                restored = rows.unflatten(1, (-1, 2, _GROUP)).transpose(1, 2).flatten(1, 3) if gated else rows
                tensors.append(restored.contiguous())
        l1_fp4, l1_sf, l2_fp4, l2_sf = tensors
        e4m3 = torch.float8_e4m3fn
        return MoEWeights(
            l1_fp4, l1_sf.view(e4m3), packed.l1_gs.clone(), l2_fp4, l2_sf.view(e4m3), packed.l2_gs.clone()
        )

    def activation_amax(self, packed: Packed, call: Call, scratch: Tensor) -> tuple[Tensor, Tensor]:
        """Calibration multiplies unquantized activations, which these tensor cores cannot: the portable kernels do it,
        on a copy of the weights that lives as long as this call."""
        portable = PortableBackend(self.config, self.device)
        own = torch.empty(
            PortableBackend.workspace_bytes(self.config, self.device), dtype=torch.uint8, device=self.device
        )
        return portable.activation_amax(portable.pack(self.unpack(packed)), call, own)

    def _run(self, packed: Packed, call: Call, views: dict[str, Tensor], out: Tensor) -> None:
        from dsv4.kernels.triton.expert_rows import expert_tables
        from dsv4.kernels.triton.stages import combine

        cfg = self.config
        tables = self._route(call, views, 1)
        rows = tables.tiles
        slots = call.topk_ids.numel()
        expert_tables(rows, views["ends"], views["ones"], views["scale_row"])
        self._stage_tokens(call, views, tables)
        self._gate_up(packed, call, views, rows)
        if call.input_scales is None:
            self._stage_activated(views, tables, slots)
        slot_rows = self._slot_rows(views, slots)
        config = replace(self._configs(call)[1], wide_out=slot_rows.dtype == torch.float32)
        operands = Operands(
            views["act_codes"][:slots],
            views["act_sf"],
            self._down.codes(packed.experts),
            self._down.scales(packed.experts),
            views["ends"],
            views["ones"] if call.input_scales is None else call.input_scales.l2,
            packed.l2_gs,
            row_scale=views["row_scale"][:slots],
            row_slot=rows.row_slot,
        )
        self._launch(config, operands, slot_rows)
        weights = call.topk_weights if cfg.route_weight == "output" else None
        combine(slot_rows, tables.local_ids, weights, out, cfg.top_k)

    def _stage_tokens(self, call: Call, views: dict[str, Tensor], tables: RoutingBuffers) -> None:
        """GEMM 1's operand: a token quantized once and gathered, or once for each slot where experts differ."""
        from dsv4.kernels.triton.expert_rows import gather_rows, quantize_rows
        from dsv4.kernels.triton.stages import ScaleSource, batch_amax

        cfg, x, slots = self.config, call.hidden_states, call.topk_ids.numel()
        weights = call.topk_weights if cfg.route_weight == "input" else None
        rows, scale_row = tables.tiles, views["scale_row"]
        operand = views["x_rows"][:slots], views["x_sf"], views["row_scale"][:slots]
        scales = call.input_scales
        if scales is not None and cfg.l1_scale_policy == "per_expert":
            quantize_rows(
                x, *operand, ScaleSource.EXPERT, scales.l1, rows=rows, scale_row=scale_row, slots_per_token=cfg.top_k,
                weights=weights,
            )  # fmt: skip
            return
        source, scale = self._scale_source(call, None if scales is None else scales.l1_merged, tables, 0)
        if source is ScaleSource.BATCH:
            batch_amax(x, tables.local_ids, tables.amax[:1], cfg.top_k, weights)
        tokens = x.shape[0]
        staged = views["x_codes"][:tokens], views["x_scales"][:tokens], views["x_scale"][:tokens]
        quantize_rows(x, *staged, source, scale, weights=weights)
        gather_rows(*staged, rows, scale_row, operand, cfg.top_k)

    def _gate_up(self, packed: Packed, call: Call, views: dict[str, Tensor], rows: TileMap) -> None:
        """GEMM 1 and SwiGLU: ``act`` in bf16, or ``act_codes`` and ``act_sf`` where the scale is known beforehand."""
        slots, scales = call.topk_ids.numel(), call.input_scales
        operands = Operands(
            views["x_rows"][:slots],
            views["x_sf"],
            self._up.codes(packed.experts),
            self._up.scales(packed.experts),
            views["ends"],
            views["ones"],
            packed.l1_gs,
            row_scale=views["row_scale"][:slots],
            row_slot=rows.row_slot,
            topk_weights=call.topk_weights,
        )
        known = Requantized(views["act_sf"], scales.l2) if scales is not None else None
        out = views["act"][:slots] if known is None else views["act_codes"][:slots]
        self._launch(self._configs(call)[0], operands, out, known)

    def _stage_activated(self, views: dict[str, Tensor], tables: RoutingBuffers, slots: int) -> None:
        """GEMM 2's operand, where its scale comes from the data."""
        from dsv4.kernels.triton.expert_rows import quantize_rows
        from dsv4.kernels.triton.stages import ScaleSource, batch_amax

        activated, rows = views["act"][:slots], tables.tiles
        source, scale = ScaleSource.ROW, None
        if self.config.activation_scale == "tensor":
            source, scale = ScaleSource.BATCH, tables.amax[1:]
            batch_amax(activated, rows.tile_expert, scale, 1)  # the expert of a row that nobody has is -1
        quantize_rows(
            activated, views["act_codes"][:slots], views["act_sf"], views["row_scale"][:slots], source, scale,
            rows=rows, scale_row=views["scale_row"],
        )  # fmt: skip

    def _launch(
        self, config: BlackwellConfig, operands: Operands, out: Tensor, requantized: Requantized | None = None
    ) -> None:
        grouped_gemm(
            config, operands, out, multiprocessors=self._multiprocessors,
            limit=self.config.swiglu_limit if config.limited else None, requantized=requantized, loader=self.loader,
        )  # fmt: skip

    def _configs(self, call: Call) -> tuple[BlackwellConfig, BlackwellConfig]:
        """Chosen by the number of tokens of the call alone, which a captured graph fixes."""
        mean = call.hidden_states.shape[0] * self.config.top_k / self.config.num_experts
        return layer_kernels(self.config, next(m for m in MEANS if mean <= m), call.input_scales is not None)


def declines(config: MoEConfig) -> str | None:
    """Why these kernels cannot compute a configuration, on whatever chip; or None."""
    if not config.quantizes_activations:
        return "NVFP4 tensor cores multiply NVFP4 by NVFP4, activation_format is bf16"
    if not config.fused_swiglu:
        return "SwiGLU is always part of GEMM 1, set_fused_swiglu(False) asks it not to be"
    if config.hidden_size % _MULTIPLE or config.intermediate_size % _MULTIPLE:
        return (
            f"hidden and intermediate size must be multiples of {_MULTIPLE}, found {config.hidden_size} and "
            f"{config.intermediate_size}"
        )
    if config.num_experts > MAX_EXPERTS:
        return f"at most {MAX_EXPERTS} experts, found {config.num_experts}"
    return None


def layer_kernels(config: MoEConfig, mean: float, fixed_scales: bool) -> tuple[BlackwellConfig, BlackwellConfig]:
    """GEMM 1's kernel and GEMM 2's, for calls of up to ``mean`` rows to an expert.

    Where a token's bits may not depend on its batch all calls have the same tiles.
    """
    mean = MEANS[1] if config.batch_invariant else min(mean, 256)
    h, i = config.hidden_size, config.intermediate_size
    gemm1 = chosen(
        mean, 2 * i, h, gated=True, requantize=fixed_scales, row_scale=True,
        weighted=config.route_weight == "before_down", limited=config.swiglu_limit is not None,
    )  # fmt: skip
    return gemm1, chosen(mean, h, i, scattered=True, row_scale=not fixed_scales)


def kernels(config: MoEConfig) -> list[BlackwellConfig]:
    """Every kernel that a layer may launch: what is compiled ahead of time."""
    needed = []
    for mean in MEANS:
        gemm1, gemm2 = layer_kernels(config, mean, config.activation_scale in ("static", "calibrated"))
        needed += [gemm1, gemm2, replace(gemm2, wide_out=True)]
    return list(dict.fromkeys(needed))


def _plan(config: MoEConfig) -> BufferPlan:
    from dsv4.kernels.triton.routing import histogram_size

    slots, e = config.max_slots, config.num_experts
    h, i, tokens = config.hidden_size, config.intermediate_size, config.max_num_tokens
    scale_rows = capacity(slots, e, ROW_TILE)
    buffers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "local_ids": ((slots,), torch.int32),
        "row_slot": ((slots,), torch.int32),
        "tile_expert": ((slots,), torch.int32),
        "num_tiles": ((1,), torch.int32),
        "hist": ((histogram_size(slots, e),), torch.int32),
        "amax": ((2,), torch.float32),
        "ends": ((e,), torch.int32),
        "ones": ((e,), torch.float32),
        "scale_row": ((slots,), torch.int32),
        "row_scale": ((slots,), torch.float32),
        "x_codes": ((tokens, h // 2), torch.uint8),
        "x_scales": ((tokens, h // 16), torch.uint8),
        "x_scale": ((tokens,), torch.float32),
        "x_rows": ((slots, h // 2), torch.uint8),
        "x_sf": ((scale_rows * padded_scale_columns(h),), torch.uint8),
        "act": ((slots if config.activation_scale in ("token", "tensor") else 0, i), torch.bfloat16),
        "act_codes": ((slots, i // 2), torch.uint8),
        "act_sf": ((scale_rows * padded_scale_columns(i),), torch.uint8),
        "down": ((slots, h), torch.float32 if config.batch_invariant else torch.bfloat16),
    }
    return BufferPlan(buffers)
