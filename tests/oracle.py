"""What the library's numbers are compared with: NVFP4 and the routed-expert block, in numpy, written from definitions.

Nothing here comes from the library, and things are done by other means than there: decoding by tables that are built
from the bit patterns, rounding by a search for the nearest value in the list of all values, everything else in float64.
Only quantizing uses fp32, because its definition is in fp32 (``docs/numerics.md``): divisions rounded to nearest, in
the given order.

Arguments may be numpy arrays or torch tensors (float8 is read as its bytes); results are numpy arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

BLOCK = 16
GS_MIN = 2.0**-100
NAN_SF = 0x7F
NEAR_TIES = (1e-6, -1e-6, 1e-5, -1e-5)
"""Relative shifts of the intermediate: 1e-5 is as near to a midpoint as the contract lets results differ; 1e-6, the
usual error of an fp32 sum of some hundred terms, leaves the farther ties of a long row alone."""


def _e2m1_value(code: int) -> float:
    """Sign, two exponent bits (bias 1), one mantissa bit; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -magnitude if sign else magnitude


def _e4m3_value(byte: int) -> float:
    """Sign, four exponent bits (bias 7), three mantissa bits; exponent 0 is subnormal, all ones is NaN, no infinity."""
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    if byte & 0x7F == NAN_SF:
        return float("nan")
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if sign else magnitude


E2M1 = np.array([_e2m1_value(code) for code in range(16)])
E4M3 = np.array([_e4m3_value(byte) for byte in range(256)])
E2M1_MIDPOINTS = (E2M1[:7] + E2M1[1:8]) / 2


def as_numpy(x: Any) -> np.ndarray:
    """An array or tensor as numpy: float8 as its bytes, bf16 as float32 (exact), all else as it is."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        if x.dtype == torch.float8_e4m3fn:
            x = x.view(torch.uint8)
        elif x.dtype == torch.bfloat16:
            x = x.float()
        return x.numpy()
    return np.asarray(x)


# Decoding.


def e2m1_decode(codes: Any) -> np.ndarray:
    """Codes 0-15 -> float64 values."""
    return E2M1[as_numpy(codes)]


def e4m3_decode(sf: Any) -> np.ndarray:
    """e4m3 bytes (or a float8 tensor) -> float64 values; 0x7F and 0xFF are NaN."""
    return E4M3[as_numpy(sf)]


def unpack(fp4: Any) -> np.ndarray:
    """Packed uint8 ``[..., K/2]`` -> codes ``[..., K]``: the even K index is in the low nibble."""
    fp4 = as_numpy(fp4)
    codes = np.empty((*fp4.shape[:-1], 2 * fp4.shape[-1]), np.uint8)
    codes[..., 0::2] = fp4 % 16
    codes[..., 1::2] = fp4 // 16
    return codes


def pack(codes: np.ndarray) -> np.ndarray:
    """The inverse of :func:`unpack`."""
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).astype(np.uint8)


def dequantize(fp4: Any, sf: Any, gs: Any) -> np.ndarray:
    """``e2m1 * sf * gs`` in float64, where it is exact; ``gs`` broadcasts against ``[..., K/16]``."""
    step = e4m3_decode(sf) * as_numpy(gs).astype(np.float64)
    return e2m1_decode(unpack(fp4)) * np.repeat(step, BLOCK, axis=-1)


# Quantizing.


def _nearest(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Index of the value nearest to each ``x``, the even index on a tie; x within the values' range."""
    indices = np.arange(len(values))
    even_first = np.concatenate([indices[::2], indices[1::2]])
    distance = np.abs(x.astype(np.float64)[..., None] - values[even_first])
    return even_first[distance.argmin(axis=-1)].astype(np.uint8)  # argmin gives the first of equals


def _blocks(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)


def _per_row(gs: Any) -> np.ndarray:
    """A scalar, ``[1]``, ``[M]`` or ``[M, 1]`` global scale as fp32 ``[1 or M, 1]``."""
    return as_numpy(gs).astype(np.float32).reshape(-1, 1)


def row_amax(x: Any) -> np.ndarray:
    """``max |x|`` of each row ``[..., K]`` as fp32, 0 for rows that hold a NaN or Inf."""
    amax = np.abs(as_numpy(x).astype(np.float32)).max(axis=-1, initial=0)
    return np.where(np.isfinite(amax), amax, np.float32(0))


def global_scale(amax: Any, divisor: float = 2688) -> np.ndarray:
    """``amax / divisor`` in fp32; 1 where that is below 2^-100."""
    gs = np.asarray(amax, np.float32) / np.float32(divisor)
    return np.where(gs < np.float32(GS_MIN), np.float32(1), gs)


def encode_scales(scale: np.ndarray) -> np.ndarray:
    """e4m3 bytes of non-negative fp32 block scales, saturating at 448; 0x7F for a NaN."""
    finite = ~np.isnan(scale)
    sf = _nearest(np.minimum(np.where(finite, scale, 0), 448), E4M3[:NAN_SF])
    return np.where(finite, sf, np.uint8(NAN_SF))


def encode_values(x: Any, sf: Any, gs: Any) -> np.ndarray:
    """Codes of ``x [M, K]`` under block scales ``sf`` (bytes ``[M, K/16]``); 0 where a scale is 0 or NaN."""
    x = as_numpy(x).astype(np.float32)
    step = e4m3_decode(sf).astype(np.float32) * _per_row(gs)
    usable = step > 0
    quotient = _blocks(x) / np.where(usable, step, np.float32(1))[..., None]
    magnitude = _nearest(np.minimum(np.abs(np.nan_to_num(quotient)), 6), E2M1[:8])
    codes = np.where(usable[..., None], magnitude + 8 * np.signbit(quotient).astype(np.uint8), 0)
    return codes.reshape(x.shape).astype(np.uint8)


def quantize(x: Any, gs: Any = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantize ``x [M, K]``.

    Args:
        x: values, converted to fp32.
        gs: global scale(s): one, or one a row; None for the scale of the largest magnitude, rows with a NaN or Inf
            left out.

    Returns:
        ``(fp4 uint8 [M, K/2], sf bytes uint8 [M, K/16], gs fp32 as given)``.
    """
    x = as_numpy(x).astype(np.float32)
    gs = global_scale(row_amax(x).max(initial=0)) if gs is None else as_numpy(gs).astype(np.float32)
    amax = np.abs(_blocks(x)).max(axis=-1)
    with np.errstate(over="ignore"):
        scale = np.where(np.isfinite(amax), amax / np.float32(6) / _per_row(gs), np.nan)
        sf = encode_scales(scale)
        return pack(encode_values(x, sf, gs)), sf, gs


def midpoint_distance(x: Any, sf: Any, gs: Any) -> np.ndarray:
    """How near each ``x / (sf * gs)`` is to a rounding boundary of e2m1: ``|r - m| / m`` for the nearest midpoint m.

    Computed in float64 for ``x [M, K]``, ``sf [M, K/16]``. Infinite where a scale is 0 or NaN: no rounding there.
    """
    step = e4m3_decode(sf) * _per_row(gs).astype(np.float64)
    usable = step > 0
    ratio = _blocks(np.abs(as_numpy(x).astype(np.float64))) / np.where(usable, step, 1)[..., None]
    distance = (np.abs(ratio[..., None] - E2M1_MIDPOINTS) / E2M1_MIDPOINTS).min(axis=-1)
    return np.where(usable[..., None], distance, np.inf).reshape(as_numpy(x).shape)


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """float64 -> the nearest bf16, ties to even, as float64. In one step: torch's own cast rounds through fp32."""
    _, exponent = np.frexp(x)
    quantum = np.ldexp(1.0, np.maximum(exponent, -125) - 8)  # 8 significant bits; subnormals below 2^-126
    rounded = np.rint(x / quantum) * quantum
    return np.where(np.abs(rounded) >= 2.0**128, np.copysign(np.inf, x), rounded)


def wide_values(shape: tuple[int, ...], low: float, high: float, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random values with magnitudes spread evenly over 2^low .. 2^high, one in 5 a zero; both have both signs."""
    rng = np.random.default_rng(seed)
    values = 2 ** rng.uniform(low, high, shape) * (rng.integers(0, 5, shape) > 0)
    return torch.from_numpy(np.copysign(values, rng.uniform(-1, 1, shape))).to(dtype)


def assert_same_bytes(fp4: Any, sf: Any, want: tuple[np.ndarray, ...]) -> None:
    """Codes and block scales equal those of :func:`quantize`, byte by byte."""
    np.testing.assert_array_equal(as_numpy(sf), want[1], err_msg="block scales")
    np.testing.assert_array_equal(as_numpy(fp4), want[0], err_msg="codes")


# The layer.


@dataclass(frozen=True)
class OracleWeights:
    """NVFP4 weights of E experts, as ``prepare_weights_from_stacked`` takes them.

    Attributes:
        l1_fp4: uint8 ``[E, 2I, H/2]``, rows of gate, then of up.
        l1_sf: e4m3 (or its bytes) ``[E, 2I, H/16]``.
        l1_gs: fp32 ``[E]``, or ``[E, 2]`` for gate and up apart.
        l2_fp4: uint8 ``[E, H, I/2]``.
        l2_sf: e4m3 (or its bytes) ``[E, H, I/16]``.
        l2_gs: fp32 ``[E]``.
    """

    l1_fp4: torch.Tensor
    l1_sf: torch.Tensor
    l1_gs: torch.Tensor
    l2_fp4: torch.Tensor
    l2_sf: torch.Tensor
    l2_gs: torch.Tensor


def random_weights(
    num_experts: int, hidden: int, intermediate: int, seed: int, split_gate_up: bool = False
) -> OracleWeights:
    """Random valid weights, drawn in their encoded form: nothing has to quantize them first.

    All codes are equally likely. Block scales lie between 1/4 and 8, but one in 32 is zero and one in 32 subnormal.
    Global scales differ by expert (and, on request, between gate and up) by up to a factor of 4, such that a product
    with inputs of order 1 is of order 1.
    """
    rng = np.random.default_rng(seed)

    def codes(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))

    def block_scales(*shape: int) -> torch.Tensor:
        sf = rng.integers(0x28, 0x51, shape, dtype=np.uint8)
        kind = rng.integers(0, 32, shape)
        sf[kind == 0] = 0
        sf[kind == 1] = rng.integers(1, 8, int((kind == 1).sum()))
        return torch.from_numpy(sf).view(torch.float8_e4m3fn)

    def global_scales(in_features: int, *shape: int) -> torch.Tensor:
        typical = 8 * in_features**0.5  # root mean square of e2m1 * sf as drawn here is about 8
        return torch.from_numpy((2 ** rng.uniform(-1, 1, shape) / typical).astype(np.float32))

    e, h, i = num_experts, hidden, intermediate
    return OracleWeights(
        l1_fp4=codes(e, 2 * i, h // 2),
        l1_sf=block_scales(e, 2 * i, h // BLOCK),
        l1_gs=global_scales(h, e, 2) if split_gate_up else global_scales(h, e),
        l2_fp4=codes(e, h, i // 2),
        l2_sf=block_scales(e, h, i // BLOCK),
        l2_gs=global_scales(i, e),
    )


@dataclass(frozen=True)
class _Slots:
    """The (token, choice) pairs that are served: parallel arrays ``[S]``."""

    token: np.ndarray
    expert: np.ndarray
    weight: np.ndarray


def _served_slots(
    topk_weights: Any, topk_ids: Any, num_experts: int, start: int, expert_map: Any, num_valid_tokens: Any
) -> _Slots:
    ids = as_numpy(topk_ids).astype(np.int64)
    if expert_map is None:
        local = ids - start
    else:
        expert_map = as_numpy(expert_map).astype(np.int64)
        known = (ids >= 0) & (ids < len(expert_map))
        local = np.full_like(ids, -1)
        local[known] = expert_map[ids[known]]
    served = (local >= 0) & (local < num_experts)
    if num_valid_tokens is not None:
        served[int(num_valid_tokens) :] = False
    token, choice = served.nonzero()
    return _Slots(token, local[token, choice], as_numpy(topk_weights).astype(np.float32)[token, choice])


def _grouped_matmul(rows: np.ndarray, expert: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``rows [S, K]`` times the transposed ``weights [E, N, K]`` of each row's expert, float64 ``[S, N]``."""
    out = np.empty((len(rows), weights.shape[1]))
    for e in np.unique(expert):
        out[expert == e] = rows[expert == e] @ weights[e].T
    return out


def _round_trip(x: np.ndarray, gs: Any) -> np.ndarray:
    """``x`` after quantizing with ``gs`` and decoding: the operand that a W4A4 product sees, exact."""
    fp4, sf, gs = quantize(x, gs)
    return dequantize(fp4, sf, _per_row(gs))


def _swiglu(gate: np.ndarray, up: np.ndarray, limit: float | None) -> np.ndarray:
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate / (1 + np.exp(-gate)) * up


def moe_layer(
    hidden: Any,
    topk_weights: Any,
    topk_ids: Any,
    w: OracleWeights,
    *,
    activation_format: str,
    activation_scale: str,
    l1_input_scale: Any = None,
    l2_input_scale: Any = None,
    l1_scale_policy: str = "max",
    swiglu_limit: float | None = None,
    route_weight: str = "output",
    start: int = 0,
    expert_map: Any = None,
    num_valid_tokens: Any = None,
    nudge: float = 0.0,
) -> np.ndarray:
    """The routed-expert block with the documented rounding points, everything between them in float64.

    Args:
        hidden: bf16 ``[T, H]``.
        topk_weights: fp32 ``[T, k]``.
        topk_ids: ``[T, k]``, global ids; an expert may be repeated in a row.
        w: the local experts.
        activation_format: ``"nvfp4"`` or ``"bf16"``.
        activation_scale: ``"static"``, ``"token"`` or ``"tensor"``; of no meaning with ``"bf16"``.
        l1_input_scale: scalar or ``[E]``, for ``"static"``.
        l2_input_scale: scalar or ``[E]``, for ``"static"``.
        l1_scale_policy: ``"max"`` or ``"per_expert"``.
        swiglu_limit: L or None.
        route_weight: ``"output"``, ``"before_down"`` or ``"input"``.
        start: global id of local expert 0.
        expert_map: global id -> local id or -1, instead of ``start``.
        num_valid_tokens: rows from there on are padding.
        nudge: relative change of the intermediate before its rounding to bf16: see :func:`nearest_reference`.

    Returns:
        float64 ``[T, H]``, not rounded.
    """
    x = as_numpy(hidden).astype(np.float32)
    num_experts = w.l2_fp4.shape[0]
    slots = _served_slots(topk_weights, topk_ids, num_experts, start, expert_map, num_valid_tokens)

    def of_slot(per_expert: Any) -> np.ndarray:
        """A scalar or ``[E]`` -> fp32 ``[S]``."""
        return np.broadcast_to(as_numpy(per_expert).astype(np.float32), num_experts)[slots.expert]

    def operand(rows: np.ndarray, static_scale: Any) -> np.ndarray:
        """Slot rows as a product sees them."""
        if activation_format == "bf16":
            return rows
        if activation_scale == "static":
            return _round_trip(rows, of_slot(static_scale))
        if activation_scale == "token":
            return _round_trip(rows, global_scale(row_amax(rows)))
        assert activation_scale == "tensor"
        return _round_trip(rows, global_scale(row_amax(rows).max(initial=0)))

    rows = x[slots.token]
    if route_weight == "input":
        rows = round_to_bf16((rows * slots.weight[:, None]).astype(np.float64))
    if l1_input_scale is not None and l1_scale_policy == "max":
        l1_input_scale = as_numpy(l1_input_scale).max()

    with np.errstate(over="ignore", invalid="ignore"):
        gate_up = _grouped_matmul(operand(rows, l1_input_scale), slots.expert, dequantize(w.l1_fp4, w.l1_sf, 1))
        l1_gs = as_numpy(w.l1_gs).astype(np.float64)
        gate_gs, up_gs = np.broadcast_to(l1_gs.reshape(num_experts, -1), (num_experts, 2))[slots.expert].T
        gate, up = np.split(gate_up, 2, axis=1)
        inner = _swiglu(gate * gate_gs[:, None], up * up_gs[:, None], swiglu_limit)
        if route_weight == "before_down":
            inner = inner * slots.weight[:, None]
        inner = round_to_bf16(inner * (1 + nudge))

        down = _grouped_matmul(operand(inner, l2_input_scale), slots.expert, dequantize(w.l2_fp4, w.l2_sf, 1))
        down *= of_slot(w.l2_gs).astype(np.float64)[:, None]
        if route_weight == "output":
            down = down * slots.weight.astype(np.float64)[:, None]
        out = np.zeros(x.shape)
        np.add.at(out, slots.token, down)
    return out


def nearest_reference(
    got: Any, hidden: Any, topk_weights: Any, topk_ids: Any, w: OracleWeights, **settings: Any
) -> np.ndarray:
    """:func:`moe_layer`, with each row rounded at its near-ties the way that ``got [T, H]`` was.

    An intermediate that lies within fp32's accumulated error of a bf16 midpoint is rounded up by one order of summation
    and down by another. Where it is its block's largest, the block's scale can follow, and in W4A4 that single event is
    worth more than the accuracy bar on a small layer, though both results are right. So a row is the oracle's as it is,
    unless the same with the intermediate nudged by one of ``NEAR_TIES`` is nearer by a factor of 2: only a moved code
    or scale is worth as much.

    Returns:
        float64 ``[T, H]``.
    """
    got = as_numpy(got).astype(np.float64)
    candidates = np.stack(
        [moe_layer(hidden, topk_weights, topk_ids, w, nudge=nudge, **settings) for nudge in (0.0, *NEAR_TIES)]
    )
    distance = np.linalg.norm(candidates - got, axis=2)
    best = np.where(distance.min(axis=0) < 0.5 * distance[0], distance.argmin(axis=0), 0)
    return candidates[best, np.arange(len(got))]


def relative_l2(got: Any, want: Any) -> float:
    """``|got - want| / |want|`` over all elements; 0 where both are zero (or empty)."""
    got, want = as_numpy(got).astype(np.float64), as_numpy(want).astype(np.float64)
    error, size = np.linalg.norm(got - want), np.linalg.norm(want)
    if error == 0:
        return 0.0
    return float(error / size) if size else float("inf")
