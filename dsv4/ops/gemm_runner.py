"""Grouped NVFP4 GEMMs over the operand layouts of block-scaled tensor cores, with a reference implementation.

The operands are those of PyTorch's and CUTLASS's "2D x 3D" grouped GEMM: the rows of all experts one after another in
one matrix A, one matrix B for each expert, and the experts' cumulative row ends on the device.

=============== ===================== ================================================================================
operand         shape                 layout
=============== ===================== ================================================================================
mat_a           ``[rows, K/2]``       uint8 (or float4_e2m1fn_x2), two codes a byte, even K low
mat_b           ``[E, K/2, N]``       the same codes; any strides, stride 1 along K is what tensor cores want
scale_a         flat                  e4m3, swizzled 32x4x4 (:mod:`dsv4.ops.layouts`) as one matrix; the rows of expert
                                      e start at the sum of ``round_up(rows, 128)`` of the experts before it
scale_b         ``[E, ...]``          e4m3, each expert's ``[N, K/16]`` swizzled, ``pad128(N) * pad4(K/16)`` elements
expert_offsets  ``[E]`` int32         cumulative ends: expert e has rows ``offsets[e-1] : offsets[e]``
global_scale_a  ``[E]`` fp32          multiplier of each expert's rows
global_scale_b  ``[E]`` or ``[E, 2]`` fp32; two when gate and up have their own
row_scale       ``[rows]`` fp32       multiplies output rows last (token scales)
=============== ===================== ================================================================================

Rows past the last end are not touched. Nothing here synchronises with the host on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from dsv4.checks import check_tensor
from dsv4.errors import InputError
from dsv4.nvfp4 import BLOCK, decode_e2m1, unpack_nibbles
from dsv4.ops.activation import clamped_swiglu
from dsv4.ops.grouped_gemm import K_SLAB, Slab, grouped_gemm, row_ranges
from dsv4.ops.layouts import ROW_TILE, Swizzle32x4x4, gate_groups, up_groups
from dsv4.ops.routing import route

Layout = Literal["half", "interleaved"]


def run_nvfp4_grouped_gemm(
    *,
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    expert_offsets: Tensor,
    global_scale_a: Tensor,
    global_scale_b: Tensor,
    row_scale: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``out[row] = (A[row] @ B[expert of row]) * global_scale_a * global_scale_b (* row_scale)``.

    Operands: see the module docstring. With ``global_scale_b [E, 2]`` the columns of B are ``[gate | up]`` halves.

    Args:
        out: bf16 or fp32 ``[rows, N]``; allocated (rows past the last end zero) if None.
        out_dtype: of a new result, bf16 or fp32.

    Returns:
        ``out [rows, N]``.

    Raises:
        InputError: a shape or dtype does not fit.
    """
    operands = _Operands(mat_a, mat_b, scale_a, scale_b, expert_offsets, global_scale_a, global_scale_b, row_scale)
    out = _result(out, (operands.rows, operands.columns), out_dtype, mat_a.device)
    product = operands.multiply()
    gate, up = product.chunk(2, dim=1) if operands.separate_gate_up else (product, product)
    operands.scale(gate, 0)
    if operands.separate_gate_up:
        operands.scale(up, 1)
    return operands.write(product, out)


def run_fused_swiglu_grouped_gemm(
    *,
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    expert_offsets: Tensor,
    global_scale_a: Tensor,
    global_scale_b: Tensor,
    swiglu_limit: float = 0.0,
    layout: Layout | None = None,
    row_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """GEMM 1 with clamped SwiGLU in its epilogue; the columns of B are interleaved, ``[g*4, u*4, ...]``.

    Gate and up stay fp32, are scaled, clamped and multiplied in fp32, and the product is rounded once to bf16. A
    ``row_scale`` is part of the operand's scale: it multiplies gate and up, before the clamp.

    Args:
        swiglu_limit: L, 0.0 for no clamp.
        layout: ``"half"`` (default) gives ``[rows, I]``; ``"interleaved"`` gives ``[rows, 2I]`` with the results in the
            gate groups and the up groups left alone. When None, an ``out`` with 2I columns means interleaved.
        out: bf16, ``[rows, I]`` or ``[rows, 2I]``; allocated (zeros where nothing is written) if None.

    Returns:
        ``out``.

    Raises:
        InputError: a shape, dtype or layout does not fit, or the limit is negative.
    """
    operands = _Operands(mat_a, mat_b, scale_a, scale_b, expert_offsets, global_scale_a, global_scale_b, row_scale)
    columns = operands.columns
    if columns % 8:
        raise InputError(f"mat_b: interleaved gate/up columns come in groups of 8, found N = {columns}")
    check_limit(swiglu_limit)
    layout = resolved_layout(layout, out, columns)
    width = columns if layout == "interleaved" else columns // 2
    out = _result(out, (operands.rows, width), torch.bfloat16, mat_a.device)
    product = operands.multiply()
    gate, up = gate_groups(product), up_groups(product)
    operands.scale(gate, 0)
    operands.scale(up, 1 if operands.separate_gate_up else 0)
    result = clamped_swiglu(gate, up, swiglu_limit or None)
    if layout == "half":
        return operands.write(result, out)
    target = out.unflatten(1, (-1, 2, 4))[:, :, 0]  # a view: the up groups are never touched
    operands.write(result.unflatten(1, (-1, 4)), target)
    return out


def warmup_compilation(num_experts: int, k_packed: int, n_packed: int, device: torch.device | str) -> None:
    """Compile what :func:`run_nvfp4_grouped_gemm` needs for these shapes. The reference needs nothing compiled.

    Args:
        num_experts: E.
        k_packed: bytes of a row along K, K/2.
        n_packed: columns of mat_b, N (only K is packed).
        device: where it will run.

    Raises:
        InputError: a size is not positive, or K is not a multiple of 16.
    """
    for name, value in (("E", num_experts), ("K_packed", k_packed), ("N_packed", n_packed)):
        if value < 1:
            raise InputError(f"warmup_compilation: {name} must be positive, found {value}")
    if (2 * k_packed) % BLOCK:
        raise InputError(f"warmup_compilation: K must be a multiple of {BLOCK}, found {2 * k_packed}")
    torch.device(device)


def warmup_fused_swiglu_compilation(
    num_experts: int, k_packed: int, n_packed: int, device: torch.device | str, swiglu_limit: float = 0.0
) -> None:
    """:func:`warmup_compilation` for :func:`run_fused_swiglu_grouped_gemm`."""
    check_limit(swiglu_limit)
    warmup_compilation(num_experts, k_packed, n_packed, device)


def check_limit(swiglu_limit: float) -> None:
    """Refuse a negative limit; 0.0 is off."""
    if swiglu_limit < 0:
        raise InputError(f"swiglu_limit: expected a positive number, or 0.0 for no clamp, found {swiglu_limit}")


def resolved_layout(layout: Layout | None, out: Tensor | None, columns: int) -> Layout:
    """The layout asked for, or what ``out`` says by its width; ``columns`` are those of mat_b."""
    if layout is None:
        layout = "interleaved" if out is not None and out.shape[-1] == columns else "half"
    if layout not in ("half", "interleaved"):
        raise InputError(f'layout: expected "half" or "interleaved", found {layout!r}')
    return layout


class _Operands:
    """Checked operands of one grouped GEMM, and the row bookkeeping that both entry points share."""

    def __init__(
        self,
        mat_a: Tensor,
        mat_b: Tensor,
        scale_a: Tensor,
        scale_b: Tensor,
        expert_offsets: Tensor,
        global_scale_a: Tensor,
        global_scale_b: Tensor,
        row_scale: Tensor | None,
    ):
        a, b = _codes("mat_a", mat_a, 2), _codes("mat_b", mat_b, 3)
        self.rows = a.shape[0]
        self.experts, k_packed, self.columns = b.shape
        k = 2 * k_packed
        if a.shape[1] != k_packed or k % BLOCK:
            raise InputError(
                f"mat_a, mat_b: expected [rows, K/2] and [E, K/2, N] with the same K, a multiple of {BLOCK}, "
                f"found {list(a.shape)} and {list(b.shape)}"
            )
        check_tensor("expert_offsets", expert_offsets, (torch.int32, torch.int64), (self.experts,))
        check_tensor("global_scale_a", global_scale_a, torch.float32, (self.experts,))
        self.separate_gate_up = global_scale_b.dim() == 2
        check_tensor(
            "global_scale_b",
            global_scale_b,
            torch.float32,
            (self.experts, 2) if self.separate_gate_up else (self.experts,),
        )
        if self.separate_gate_up and self.columns % 2:
            raise InputError(f"global_scale_b [E, 2] needs an even number of columns, found N = {self.columns}")
        if row_scale is not None:
            check_tensor("row_scale", row_scale, torch.float32, (self.rows,))
        self._a = a
        self._offsets = expert_offsets
        self._row_scale = row_scale
        self._scale_a = _scales("scale_a", scale_a)
        swizzle_b = Swizzle32x4x4(self.columns, k // BLOCK)
        scales_b = _scales("scale_b", scale_b)
        if scales_b.numel() != self.experts * swizzle_b.numel:
            raise InputError(
                f"scale_b: expected [{self.experts}, {swizzle_b.numel}] swizzled scales for N = {self.columns}, "
                f"K = {k}, found shape {list(scale_b.shape)}"
            )
        self._matrices = _ColumnMatrices(b, scales_b.reshape(self.experts, -1), swizzle_b)
        # Rows past the last end belong to expert E: every table gets one spare entry.
        row = torch.arange(self.rows, device=a.device, dtype=expert_offsets.dtype)
        self._expert = torch.searchsorted(expert_offsets, row, right=True)
        self.valid = self._expert < self.experts
        self._alpha = global_scale_a.unsqueeze(1), global_scale_b.reshape(self.experts, -1)

    def multiply(self) -> Tensor:
        """``A @ B`` without global scales, fp32 ``[rows, N]``; rows past the last end are undefined."""
        if not self.rows:
            return torch.empty(0, self.columns, dtype=torch.float32, device=self._a.device)
        expert = torch.where(self.valid, self._expert, -1).to(torch.int32)
        routing = route(expert.unsqueeze(1), self.experts, 1 if self._a.device.type == "cpu" else ROW_TILE)
        # Rows past the last end have no place: they share a spare one behind the others.
        position = routing.slot_row[:, 0].long()
        position = torch.where(position >= 0, position, routing.num_rows)
        x = torch.zeros(routing.num_rows + 1, 2 * self._a.shape[1], dtype=torch.float32, device=self._a.device)
        x[position] = self._decoded_rows()
        product = torch.zeros(routing.num_rows + 1, self.columns, dtype=torch.float32, device=self._a.device)
        grouped_gemm(x, self._matrices, row_ranges(routing), product)
        return product[position]

    def _decoded_rows(self) -> Tensor:
        """``e2m1 * sf`` of A, fp32 ``[rows, K]``; zero past the last end, where no scales need exist."""
        cols = self._a.shape[1] * 2 // BLOCK
        starts = torch.nn.functional.pad(self._offsets.long(), (1, 0))
        tiles = torch.div(starts.diff() + ROW_TILE - 1, ROW_TILE, rounding_mode="floor")
        padded_starts = torch.nn.functional.pad(tiles.cumsum(0) * ROW_TILE, (1, 0))
        tile_numel = Swizzle32x4x4(ROW_TILE, cols).numel
        buffer_rows = self._scale_a.numel() // tile_numel * ROW_TILE
        # On a GPU the number of rows in use is not known here, and a buffer that is too small cannot be told.
        needed = int(padded_starts[-1]) if self._a.device.type == "cpu" else buffer_rows
        if self._scale_a.numel() % tile_numel or buffer_rows < needed:
            raise InputError(
                f"scale_a: expected whole swizzled tiles of {tile_numel} scales with at least {needed} rows (each "
                f"expert's rows rounded up to {ROW_TILE}), found {self._scale_a.numel()} scales"
            )
        if not buffer_rows:
            return torch.zeros(self.rows, 2 * self._a.shape[1], dtype=torch.float32, device=self._a.device)
        linear = Swizzle32x4x4(buffer_rows, cols).unswizzle(self._scale_a)
        row = torch.arange(self.rows, device=self._a.device)
        place = torch.where(self.valid, padded_starts[self._expert] + row - starts[self._expert], 0)
        sf = linear.view(torch.uint8)[place].view(torch.float8_e4m3fn).float()
        values = decode_e2m1(unpack_nibbles(self._a)).unflatten(1, (cols, BLOCK)) * sf.unsqueeze(2)
        return torch.where(self.valid.unsqueeze(1), values.flatten(1), 0.0)

    def scale(self, product: Tensor, half: int) -> None:
        """Apply the global scales and row scale to fp32 columns of one half (0 gate or all, 1 up), in place."""
        expert = self._expert.clamp(max=self.experts - 1)
        product *= self._alpha[0][expert]
        product *= self._alpha[1][expert, half].unsqueeze(1)
        if self._row_scale is not None:
            product *= self._row_scale.unsqueeze(1)

    def write(self, result: Tensor, out: Tensor) -> Tensor:
        """Write the valid rows to ``out``, leaving the others as they are."""
        valid = self.valid.view(-1, *[1] * (result.dim() - 1))
        return out.copy_(torch.where(valid, result.to(out.dtype), out))


class _ColumnMatrices:
    """:class:`dsv4.ops.grouped_gemm.ExpertMatrices` over ``mat_b`` and swizzled scales."""

    def __init__(self, codes: Tensor, scales: Tensor, swizzle: Swizzle32x4x4):
        self.in_features = 2 * codes.shape[1]
        self.out_features = codes.shape[2]
        self._codes, self._scales, self._swizzle = codes, scales, swizzle

    def slabs(self, expert: int | Tensor) -> Iterator[Slab]:
        if isinstance(expert, int):
            codes, scales = self._codes[expert], self._scales[expert]
        else:
            codes = self._codes.index_select(0, expert)[0]
            scales = self._scales.view(torch.uint8).index_select(0, expert)[0].view(torch.float8_e4m3fn)
        sf = self._swizzle.unswizzle(scales).t().float().unsqueeze(1)
        for start in range(0, self.in_features, K_SLAB):
            stop = min(start + K_SLAB, self.in_features)
            values = decode_e2m1(unpack_nibbles(codes[start // 2 : stop // 2].t())).t()
            yield Slab(start, values.unflatten(0, (-1, BLOCK)), sf[start // BLOCK : stop // BLOCK])


def _codes(name: str, tensor: Tensor, dim: int) -> Tensor:
    """Packed codes as uint8; float4_e2m1fn_x2 is viewed."""
    if tensor.dim() != dim or tensor.dtype not in (torch.uint8, torch.float4_e2m1fn_x2):
        raise InputError(
            f"{name}: expected packed uint8 or float4_e2m1fn_x2 codes with {dim} dimensions, "
            f"found {tensor.dtype} {list(tensor.shape)}"
        )
    return tensor.view(torch.uint8)


def _scales(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in (torch.float8_e4m3fn, torch.uint8):
        raise InputError(f"{name}: expected float8_e4m3fn block scales, found {tensor.dtype}")
    return tensor.view(torch.float8_e4m3fn)


def _result(out: Tensor | None, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if out is None:
        if dtype not in (torch.bfloat16, torch.float32):
            raise InputError(f"out_dtype: expected bfloat16 or float32, found {dtype}")
        return torch.zeros(shape, dtype=dtype, device=device)
    check_tensor("out", out, (torch.bfloat16, torch.float32), shape)
    return out
