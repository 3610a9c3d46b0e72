"""The reference backend: the whole pipeline in plain torch, on any device.

On a CPU it is also meant to be used, so its weight layout is made for decoding fast with torch operations alone. A byte
holds the codes of two neighbouring outputs, and a table of all 256 bytes, each with its two fp32 values, turns decoding
into one gather, which writes finished fp32 numbers in order::

    codes  uint8 [K, N/2]  --gather-->  fp32 [K, N]  --block scales [K/16, 1, N], fp32 GEMM-->  out

Weights are stored K-major for that ([K, N], the transpose of a checkpoint's), so that a block scale belongs to 16 whole
rows and the innermost loop of every operation runs over N. The weights stay at 4.5 bits; only a slab of K_SLAB rows
is ever decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dsv4.backends.base import Call, InputScales, Packed, Verdict
from dsv4.config import MoEConfig, capacity
from dsv4.nvfp4 import (
    BLOCK,
    E2M1_VALUES,
    block_codes,
    finite_row_amax,
    global_scale,
    pack_nibbles,
    unpack_nibbles,
)
from dsv4.ops.activation import clamped_swiglu
from dsv4.ops.combine import combine
from dsv4.ops.grouped_gemm import K_SLAB, Slab, grouped_gemm, row_ranges
from dsv4.ops.routing import Routing, local_expert_ids, route
from dsv4.weights import MoEWeights
from dsv4.workspace import BufferPlan

_PAIR = 2  # codes in a byte


@dataclass(frozen=True)
class _Routed:
    """A call whose slots have rows."""

    hidden_states: Tensor
    topk_weights: Tensor
    routing: Routing
    input_scales: InputScales | None


class ReferenceBackend:
    """See the module docstring; the interface is :class:`dsv4.backends.base.Backend`."""

    name = "reference"

    def __init__(self, config: MoEConfig, device: torch.device):
        self.config = config
        self.device = device
        self._plan = _plan(config, device)
        self._l1 = _ExpertLayout(0, config.hidden_size, 2 * config.intermediate_size)
        self._l2 = _ExpertLayout(self._l1.nbytes, config.intermediate_size, config.hidden_size)

    @classmethod
    def explain(cls, config: MoEConfig, device: torch.device) -> Verdict:
        if device.type not in ("cpu", "cuda"):
            return Verdict(False, f"plain torch was checked on cpu and cuda, not on {device.type}")
        if device.type == "cuda" and not torch.cuda.is_available():
            return Verdict(False, "torch sees no CUDA device")
        speed = "reads expert counts, skips idle experts" if device.type == "cpu" else "correct, not fast"
        return Verdict(True, f"plain torch, fp32 GEMMs over decoded slabs ({speed})")

    @classmethod
    def workspace_bytes(cls, config: MoEConfig, device: torch.device) -> int:
        return _plan(config, device).nbytes

    def pack(self, weights: MoEWeights, into: Packed | None = None) -> Packed:
        if into is None:
            into = Packed.empty(self.config.num_experts, self._l1.nbytes + self._l2.nbytes, self.device)
        for e in range(self.config.num_experts):  # one at a time: the peak is one expert above the result
            for layout, fp4, sf in (
                (self._l1, weights.l1_fp4[e], weights.l1_sf[e]),
                (self._l2, weights.l2_fp4[e], weights.l2_sf[e]),
            ):
                codes, scales = layout.views(into.experts)
                codes[e].copy_(pack_nibbles(unpack_nibbles(fp4.to(self.device)).t()))
                scales[e].copy_(sf.to(self.device).view(torch.uint8).t())
        into.l1_gs.copy_(weights.l1_gs)
        into.l2_gs.copy_(weights.l2_gs)
        return into

    def unpack(self, packed: Packed) -> MoEWeights:
        def restore(layout: _ExpertLayout) -> tuple[Tensor, Tensor]:
            codes, scales = layout.views(packed.experts)
            fp4 = pack_nibbles(unpack_nibbles(codes).transpose(1, 2)).contiguous()
            return fp4, scales.transpose(1, 2).contiguous().view(torch.float8_e4m3fn)

        return MoEWeights(*restore(self._l1), packed.l1_gs.clone(), *restore(self._l2), packed.l2_gs.clone())

    def budgets(self) -> Sequence[int]:
        return (1,)

    def warmup(self, packed: Packed, scratch: Tensor, calls: Sequence[Call]) -> None:
        _pair_table(self.device)
        _code_table(self.device)

    def run(self, packed: Packed, call: Call, scratch: Tensor, out: Tensor) -> None:
        cfg = self.config
        routed = self._route(call)
        buffers = self._views(scratch, routed.routing)
        weights = routed.topk_weights

        hidden = self._weighted_input(routed)
        rows = self._gemm1_rows(hidden, routed) if cfg.quantizes_activations else _gather(hidden, routed.routing)
        activated = self._gemm1(packed, routed, rows, buffers)
        operand = self._gemm2_operand(activated, routed) if cfg.quantizes_activations else _Operand(activated.float())
        slot_rows = self._gemm2(packed, routed.routing, operand, buffers)
        combine(slot_rows, routed.routing.slot_row, weights if cfg.route_weight == "output" else None, out)

    def activation_amax(self, packed: Packed, call: Call, scratch: Tensor) -> tuple[Tensor, Tensor]:
        routed = self._route(call)
        buffers = self._views(scratch, routed.routing)
        rows = _gather(self._weighted_input(routed), routed.routing)
        activated = self._gemm1(packed, routed, rows, buffers)
        return _expert_amax(rows.values, routed.routing), _expert_amax(activated, routed.routing)

    # Stages, in the order of the pipeline.

    def _route(self, call: Call) -> _Routed:
        cfg = self.config
        local = local_expert_ids(
            call.topk_ids, cfg.num_experts, cfg.experts_start_idx, call.expert_map, call.num_valid_tokens
        )
        routing = route(local, cfg.num_experts, _row_tile(self.device))
        return _Routed(call.hidden_states, call.topk_weights, routing, call.input_scales)

    def _weighted_input(self, routed: _Routed) -> Tensor:
        """The hidden states, bf16 ``[T, H]``, with the routing weight where it belongs to the input."""
        if self.config.route_weight != "input":
            return routed.hidden_states
        return (routed.hidden_states.float() * routed.topk_weights).to(torch.bfloat16)

    def _gemm1_rows(self, hidden: Tensor, routed: _Routed) -> _Operand:
        """Quantize GEMM 1's operand, each token once where its scale does not depend on the expert, and gather rows."""
        cfg, routing, scales = self.config, routed.routing, routed.input_scales
        if scales is not None and cfg.l1_scale_policy == "per_expert":
            rows = _gather(hidden, routing).values
            return _quantized(rows, _of_row(scales.l1, routing))
        if scales is not None:
            gs = scales.l1_merged
        elif cfg.activation_scale == "token":
            gs = global_scale(finite_row_amax(hidden))
        else:
            served = (routing.slot_row >= 0).any(dim=1)
            gs = _tensor_scale(hidden, served)
        return _gather_operand(_quantized(hidden, gs), routing)

    def _gemm1(self, packed: Packed, routed: _Routed, rows: _Operand, buffers: dict[str, Tensor]) -> Tensor:
        """GEMM 1, global scales, clamped SwiGLU: bf16 ``[R, I]``."""
        cfg, routing = self.config, routed.routing
        matrices = _PairMatrices(packed.experts, self._l1, buffers)
        product = grouped_gemm(
            rows.values, matrices, row_ranges(routing), buffers["gate_up"], row_by_row=cfg.batch_invariant
        )
        if rows.gs is not None:
            product *= rows.gs
        gate, up = product.chunk(2, dim=1)
        gate *= _of_row(packed.l1_gs[:, 0], routing)
        up *= _of_row(packed.l1_gs[:, 1], routing)
        weight = None
        if cfg.route_weight == "before_down":
            weight = routed.topk_weights.reshape(-1)[routing.row_slot.clamp(min=0)].unsqueeze(1)
        return clamped_swiglu(gate, up, cfg.swiglu_limit, weight)

    def _gemm2_operand(self, activated: Tensor, routed: _Routed) -> _Operand:
        routing, scales = routed.routing, routed.input_scales
        if scales is not None:
            return _quantized(activated, _of_row(scales.l2, routing))
        if self.config.activation_scale == "token":
            return _quantized(activated, global_scale(finite_row_amax(activated)))
        return _quantized(activated, _tensor_scale(activated, routing.row_slot >= 0))

    def _gemm2(self, packed: Packed, routing: Routing, operand: _Operand, buffers: dict[str, Tensor]) -> Tensor:
        matrices = _PairMatrices(packed.experts, self._l2, buffers)
        product = grouped_gemm(
            operand.values, matrices, row_ranges(routing), buffers["down"], row_by_row=self.config.batch_invariant
        )
        if operand.gs is not None:
            product *= operand.gs
        return product.mul_(_of_row(packed.l2_gs, routing))

    def _views(self, scratch: Tensor, routing: Routing) -> dict[str, Tensor]:
        views = self._plan.views(scratch)
        for name in ("gate_up", "down"):
            views[name] = views[name][: routing.num_rows]
        return views


def _row_tile(device: torch.device) -> int:
    """Rows by tile: exact counts on a CPU, device tiles of a size that keeps launches few on a GPU."""
    return 1 if device.type == "cpu" else 128


def _plan(config: MoEConfig, device: torch.device) -> BufferPlan:
    rows = capacity(config.max_slots, config.num_experts, _row_tile(device))
    h, i = config.hidden_size, config.intermediate_size
    slab = max(min(h, K_SLAB) * 2 * i, min(i, K_SLAB) * h)
    return BufferPlan(
        {
            "gate_up": ((rows, 2 * i), torch.float32),
            "down": ((rows, h), torch.float32),
            "index": ((slab // _PAIR,), torch.int64),
            "pairs": ((slab // _PAIR,), torch.complex64),
        }
    )


@dataclass(frozen=True)
class _ExpertLayout:
    """Where one projection stands in an expert's bytes: codes ``[K, N/2]``, then e4m3 scales ``[K/16, N]``."""

    offset: int
    in_features: int
    out_features: int

    @property
    def _code_bytes(self) -> int:
        return self.in_features * self.out_features // _PAIR

    @property
    def nbytes(self) -> int:
        return self._code_bytes + self.in_features // BLOCK * self.out_features

    def views(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """``(codes uint8 [E, K, N/2], scales uint8 [E, K/16, N])`` of the packed bytes."""
        k, n = self.in_features, self.out_features
        middle, end = self.offset + self._code_bytes, self.offset + self.nbytes
        codes, scales = experts[:, self.offset : middle], experts[:, middle:end]
        return codes.unflatten(1, (k, n // _PAIR)), scales.unflatten(1, (k // BLOCK, n))


class _PairMatrices:
    """:class:`dsv4.ops.grouped_gemm.ExpertMatrices` over packed pairs of codes."""

    def __init__(self, experts: Tensor, layout: _ExpertLayout, buffers: dict[str, Tensor]):
        self.in_features = layout.in_features
        self.out_features = layout.out_features
        self._codes, self._scales = layout.views(experts)
        # Views for every slab but a shorter last one: making them takes longer than decoding a small slab.
        rows = min(self.in_features, K_SLAB)
        self._full = self._scratch(buffers, rows)
        self._last = self._scratch(buffers, self.in_features % K_SLAB) if self.in_features % K_SLAB else self._full

    def _scratch(self, buffers: dict[str, Tensor], rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For ``rows`` of K: index ``[rows, N/2]``, table, gathered pairs, and these as fp32 ``[rows/16, 16, N]``."""
        n = self.out_features
        index, pairs = (buffers[name][: rows * n // _PAIR].view(rows, n // _PAIR) for name in ("index", "pairs"))
        # One table row for each row of the index: gather is parallel over rows.
        table = _pair_table(index.device).expand(rows, -1)
        return index, table, pairs, pairs.view(torch.float32).view(-1, BLOCK, n)

    def slabs(self, expert: int | Tensor) -> Iterator[Slab]:
        if isinstance(expert, int):
            codes, scales = self._codes[expert], self._scales[expert]
        else:
            codes, scales = (t.index_select(0, expert)[0] for t in (self._codes, self._scales))
        sf = _decode_scales(scales).unsqueeze(1)
        for start in range(0, self.in_features, K_SLAB):
            stop = min(start + K_SLAB, self.in_features)
            index, table, pairs, values = self._last if stop == self.in_features else self._full
            index.copy_(codes[start:stop])
            torch.gather(table, 1, index, out=pairs)
            yield Slab(start, values, sf[start // BLOCK : stop // BLOCK])


@cache
def _code_table(device: torch.device) -> Tensor:
    """``[16]`` fp32: the value of every code."""
    return torch.tensor(E2M1_VALUES, dtype=torch.float32, device=device)


@cache
def _pair_table(device: torch.device) -> Tensor:
    """``[1, 256]``: the two fp32 values of every byte, as one 8-byte element (complex64)."""
    pairs = [[E2M1_VALUES[byte & 0xF], E2M1_VALUES[byte >> 4]] for byte in range(256)]
    values = torch.tensor(pairs, dtype=torch.float32)
    return values.view(torch.complex64).view(1, -1).to(device)


def _decode_scales(scales: Tensor) -> Tensor:
    """Finite e4m3 bytes, none below (minus) zero, -> fp32, exactly, subnormals included.

    The fields of e4m3 fit those of fp16, seven bits to the left, with an exponent bias that differs by 8. On a CPU that
    is several times as fast as torch's own cast.
    """
    return ((scales & 0x7F).to(torch.int16) << 7).view(torch.float16).float().mul_(256.0)


@dataclass(frozen=True)
class _Operand:
    """A GEMM's left side.

    Attributes:
        values: fp32 ``[n, K]``: ``e2m1 * sf``, exact, or plain activations.
        gs: fp32 ``[n, 1]`` or ``[1]``, what the product is still to be multiplied with; None for plain activations.
    """

    values: Tensor
    gs: Tensor | None = None


def _quantized(x: Tensor, gs: Tensor) -> _Operand:
    """Quantize ``x [n, K]`` under one scale ``[1]`` or one a row (``[n]`` or ``[n, 1]``) and stage it for the GEMM."""
    gs = gs.reshape(-1, 1)
    codes, sf = block_codes(x, gs)
    values = _code_table(x.device)[codes.int()]
    return _Operand(values.mul_(sf.float().unsqueeze(2)).flatten(1), gs)


def _tensor_scale(x: Tensor, valid: Tensor) -> Tensor:
    """One scale, ``[1]``, from the rows of ``x [n, K]`` where ``valid [n]``; non-finite rows are left out."""
    if not x.shape[0]:
        return x.new_ones(1, dtype=torch.float32)
    return global_scale(torch.where(valid, finite_row_amax(x), 0.0).amax().reshape(1))


def _gather(x: Tensor, routing: Routing) -> _Operand:
    """Rows of GEMM 1 from tokens ``x [T, H]``, as fp32."""
    return _Operand(x[routing.row_token()].float())


def _gather_operand(x: _Operand, routing: Routing) -> _Operand:
    token = routing.row_token()
    gs = x.gs[token] if x.gs is not None and x.gs.shape[0] > 1 else x.gs
    return _Operand(x.values[token], gs)


def _of_row(per_expert: Tensor, routing: Routing) -> Tensor:
    """``[E]`` -> ``[R, 1]``; rows beyond the last tile get expert 0's."""
    return per_expert[routing.row_expert().clamp(min=0)].unsqueeze(1)


def _expert_amax(rows: Tensor, routing: Routing) -> Tensor:
    """``rows [R, K]`` -> fp32 ``[E]``: each expert's largest magnitude, padding and non-finite rows left out."""
    amax = torch.where(routing.row_slot >= 0, finite_row_amax(rows), 0.0)
    result = torch.zeros(routing.num_experts, dtype=torch.float32, device=rows.device)
    return result.scatter_reduce_(0, routing.row_expert().clamp(min=0).long(), amax, "amax")
