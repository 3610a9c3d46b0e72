"""CuTe's own layouts of what the Hopper kernels read, by functions that run on the host."""

from __future__ import annotations

import cutlass
import torch
from cutlass import BFloat16, Float32, cute
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.cute.runtime import from_dlpack
from cutlass.utils import hopper_helpers
from torch import Tensor

_HOPPER = "--gpu-arch sm_90a"


@cute.jit
def _write_image(rows: cute.Tensor, out: cute.Tensor, tokens: cutlass.Constexpr, blocks: cutlass.Constexpr):
    atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)
    layout = cute.tile_to_shape(atom, (tokens, 64, blocks), order=(0, 1, 2))
    image = cute.make_tensor(cute.recast_ptr(out.iterator, layout.inner, dtype=BFloat16), layout.outer)
    for i in cutlass.range(tokens * 64 * blocks):
        row, k, block = i // 64 % tokens, i % 64, i // 64 // tokens
        image[row, k, block] = rows[row, 64 * block + k]


def write_image(rows: Tensor, image: Tensor, tokens: int, blocks: int) -> None:
    """bf16 ``[tokens, 64 * blocks]`` through the layout that the kernel describes its tokens with.

    ``image`` has as many values and begins at a multiple of 1024 bytes.
    """
    tensors = from_dlpack(rows), from_dlpack(image, assumed_align=1024)
    cute.compile(_write_image, *tensors, tokens, blocks, options=_HOPPER)(*tensors)


@cute.jit
def _operand_places(out: cute.Tensor):
    mma = hopper_helpers.make_trivial_tiled_mma(
        BFloat16, BFloat16, OperandMajorMode.K, OperandMajorMode.K, Float32, (1, 1, 1), (64, 8),
        warpgroup.OperandSource.RMEM,
    )  # fmt: skip
    layout = mma.tv_layout_A
    for i in cutlass.range(128 * 8):
        out[i] = layout((i // 8, i % 8))


def operand_places() -> Tensor:
    """int32 ``[128 * 8]``: ``row + 64 * column`` of each thread's values of a 64 x 16 operand in registers."""
    out = torch.empty(128 * 8, dtype=torch.int32)
    cute.compile(_operand_places, from_dlpack(out), options=_HOPPER)(from_dlpack(out))
    return out
