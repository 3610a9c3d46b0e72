"""Layouts: the 32x4x4 scale swizzle, K-major weights and interleaved gate/up columns.

**The swizzle.** Block-scaled tensor cores read scales in tiles of 128 rows by 4 columns (128 rows of the operand by 64
values of K). A tile is 512 bytes; inside it the scale of row ``r`` and column ``c`` stands at ::

    (r % 32) * 16 + (r // 32) * 4 + c

that is, 32 lines of 16 bytes, a line holding rows ``r, r+32, r+64, r+96`` with 4 columns each. Tiles follow one another
row of tiles by row of tiles. A matrix is padded with zero scales to whole tiles first. Source: cuBLAS documentation,
"1D block scaling factors layout"; CUTLASS calls it the 32x4x4 (blockscaled) atom, PyTorch ``SWIZZLE_32_4_4``.

Example: for a matrix of 128 x 4 scales, the bytes begin with (0,0) (0,1) (0,2) (0,3) (32,0) (32,1) ... (96,3) (1,0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.errors import InputError
from dsv4.ops.device import has_kernel

ROW_TILE = 128
COL_TILE = 4


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up, for non-negative ``a`` and positive ``b``."""
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """The smallest multiple of ``b`` that is at least ``a``."""
    return ceil_div(a, b) * b


@dataclass(frozen=True)
class Swizzle32x4x4:
    """The swizzled layout of a ``[rows, cols]`` scale matrix, and its inverse.

    Attributes:
        rows: rows of the matrix (operand rows).
        cols: columns (blocks of 16 along K).
    """

    rows: int
    cols: int

    @property
    def padded_rows(self) -> int:
        return round_up(self.rows, ROW_TILE)

    @property
    def padded_cols(self) -> int:
        return round_up(self.cols, COL_TILE)

    @property
    def numel(self) -> int:
        """Elements of the swizzled buffer, padding included."""
        return self.padded_rows * self.padded_cols

    def offset(self, row: int, col: int) -> int:
        """Where the scale of (row, col) stands in the swizzled buffer."""
        tile = (row // ROW_TILE) * (self.padded_cols // COL_TILE) + col // COL_TILE
        r, c = row % ROW_TILE, col % COL_TILE
        return tile * (ROW_TILE * COL_TILE) + (r % 32) * 16 + (r // 32) * 4 + c

    def swizzle(self, sf: Tensor) -> Tensor:
        """One-byte scales ``[rows, cols]`` -> the same dtype, flat ``[numel]``, padding zero."""
        if tuple(sf.shape) != (self.rows, self.cols):
            raise InputError(f"swizzle: expected scales [{self.rows}, {self.cols}], found {tuple(sf.shape)}")
        # float8 has no pad or zeros kernel everywhere: work on the bytes.
        padded = torch.nn.functional.pad(_bytes(sf), (0, self.padded_cols - self.cols, 0, self.padded_rows - self.rows))
        tiles = padded.reshape(-1, 4, 32, self.padded_cols // COL_TILE, COL_TILE)
        return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(sf.dtype)

    def unswizzle(self, flat: Tensor) -> Tensor:
        """The inverse: ``[numel]`` (any shape) -> ``[rows, cols]``, padding dropped."""
        if flat.numel() != self.numel:
            raise InputError(
                f"unswizzle: expected {self.numel} scales for a [{self.rows}, {self.cols}] matrix, "
                f"found shape {tuple(flat.shape)}"
            )
        tiles = _bytes(flat).reshape(-1, self.padded_cols // COL_TILE, 32, 4, COL_TILE)
        matrix = tiles.permute(0, 3, 2, 1, 4).reshape(self.padded_rows, self.padded_cols)
        return matrix[: self.rows, : self.cols].contiguous().view(flat.dtype)


def _check_one_byte(sf: Tensor) -> None:
    if sf.element_size() != 1:
        raise InputError(f"scales: expected a one-byte dtype (float8_e4m3fn or uint8), found {sf.dtype}")


def _bytes(sf: Tensor) -> Tensor:
    _check_one_byte(sf)
    return sf.contiguous().view(torch.uint8)


def pad_and_swizzle_single(sf: Tensor) -> Tensor:
    """Scales ``[N, K_sf]`` -> swizzled, flat ``[pad128(N) * pad4(K_sf)]``, padding zero."""
    return swizzle_32_4_4(sf)


def swizzle_32_4_4(sf: Tensor, out: Tensor | None = None) -> Tensor:
    """Swizzle a whole buffer of scales on its device, safe under CUDA-graph capture. Moves two bytes a scale there.

    Args:
        sf: one-byte scales ``[rows, K_sf]``.
        out: where to write, ``pad128(rows) * pad4(K_sf)`` elements of the same dtype, contiguous; allocated if None.

    Returns:
        ``out``, or a flat tensor of that many elements.

    Raises:
        InputError: shapes, dtypes or devices do not fit.
    """
    if sf.dim() != 2:
        raise InputError(f"swizzle: expected scales [N, K_sf], found shape {tuple(sf.shape)}")
    layout = Swizzle32x4x4(*sf.shape)
    if out is not None and (out.numel() != layout.numel or out.dtype != sf.dtype or not out.is_contiguous()):
        raise InputError(
            f"swizzle_32_4_4: out must be contiguous {sf.dtype} with {layout.numel} elements, "
            f"found {out.dtype} {tuple(out.shape)}"
        )
    if out is not None and out.device != sf.device:
        raise InputError(f"swizzle_32_4_4: out must be on the scales' device {sf.device}, found {out.device}")
    if has_kernel(sf):
        _check_one_byte(sf)
        out = torch.empty(layout.numel, dtype=sf.dtype, device=sf.device) if out is None else out
        torch.ops.nvfp4.swizzle(sf, out)
        return out
    flat = layout.swizzle(sf)
    if out is None:
        return flat
    _bytes(out).view(-1).copy_(_bytes(flat))
    return out


def make_b_k_major(b: Tensor) -> Tensor:
    """``[E, K/2, N]`` -> the same values and shape with stride 1 along K, as tensor-core B operands want it."""
    if b.dim() != 3:
        raise InputError(f"make_b_k_major: expected [E, K/2, N], found shape {tuple(b.shape)}")
    return b.transpose(1, 2).contiguous().transpose(1, 2)


def interleave_l1_weights(w: Tensor, granularity: int = 4) -> Tensor:
    """Last dimension ``[gate | up]`` -> groups ``[g * granularity, u * granularity, ...]``.

    A tile of interleaved columns holds gate and up of the same features, so that SwiGLU can be applied to it alone.

    Raises:
        InputError: half of the last dimension is not a multiple of ``granularity``.
    """
    return w.unflatten(-1, (2, _groups(w, granularity), granularity)).transpose(-3, -2).flatten(-3)


def deinterleave_l1_weights(w: Tensor, granularity: int = 4) -> Tensor:
    """The inverse of :func:`interleave_l1_weights`."""
    return w.unflatten(-1, (_groups(w, granularity), 2, granularity)).transpose(-3, -2).flatten(-3)


def gate_groups(x: Tensor, granularity: int = 4) -> Tensor:
    """The gate halves of interleaved columns: ``[..., 2I]`` -> ``[..., I]``."""
    return x.unflatten(-1, (_groups(x, granularity), 2, granularity))[..., 0, :].flatten(-2)


def up_groups(x: Tensor, granularity: int = 4) -> Tensor:
    """The up halves of interleaved columns: ``[..., 2I]`` -> ``[..., I]``."""
    return x.unflatten(-1, (_groups(x, granularity), 2, granularity))[..., 1, :].flatten(-2)


def _groups(w: Tensor, granularity: int) -> int:
    if granularity < 1 or w.shape[-1] % (2 * granularity):
        raise InputError(
            f"interleaved gate/up: the last dimension ({w.shape[-1]}) must be a multiple of 2 * granularity "
            f"({2 * granularity})"
        )
    return w.shape[-1] // (2 * granularity)


def assemble_scales_3d_side(scales: Sequence[Tensor]) -> Tensor:
    """Per-expert scales ``(K_sf, N)`` -> swizzled ``[E, pad128(N) * pad4(K_sf)]``, the B side of the grouped GEMM."""
    return assemble_raw_scales_2d3d_3d_side([sf.t() for sf in scales])


def assemble_raw_scales_2d3d_3d_side(scales: Sequence[Tensor]) -> Tensor:
    """Per-expert scales ``(N, K_sf)`` -> swizzled ``[E, pad128(N) * pad4(K_sf)]``."""
    if not scales:
        raise InputError("assemble scales: expected at least one expert")
    return torch.stack([pad_and_swizzle_single(sf) for sf in scales])
