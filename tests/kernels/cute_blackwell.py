"""CuTe's own layouts of what the Blackwell kernel loads and multiplies, by functions that run on the host."""

from __future__ import annotations

import cutlass
import torch
from cutlass import Float4E2M1FN, Float8E4M3FN, Int32, cute
from cutlass.cute.nvgpu import tcgen05
from cutlass.cute.runtime import from_dlpack
from cutlass.utils import blackwell_helpers, blockscaled_layout
from torch import Tensor

from dsv4.kernels.blackwell.config import BlackwellConfig
from dsv4.kernels.blackwell.grouped_gemm import GroupedGemm

_OPTIONS = "--gpu-arch sm_100a"


class _Probe(GroupedGemm):
    """What the kernel's layouts say, and what the tensor core's do."""

    def tiler(self):
        return (self.config.m, self.config.n, self.config.k)

    @cute.jit
    def codes(self, ours: cute.Tensor, theirs: cute.Tensor, operand: cutlass.Constexpr, swizzles: cutlass.Constexpr):
        cfg = self.config
        rows = (128, cfg.b_rows)[operand]
        make = (blackwell_helpers.make_smem_layout_a, blackwell_helpers.make_smem_layout_b)[operand]
        box, layout = self.code_box(rows), make(self.tiled_mma(), self.tiler(), Float4E2M1FN, cfg.stages)
        swizzles.extend((str(box.inner), str(layout.inner)))
        line = cfg.k // 2
        for i in cutlass.range(rows * line * cfg.stages):
            row, byte, stage = i % rows, i // rows % line, i // rows // line
            ours[i] = Int32(box.outer((row, byte, 0, stage)))
            k = 2 * byte
            theirs[i] = Int32(layout.outer(((row, k % 64), 0, k // 64, stage)))

    @cute.jit
    def scales(self, ours: cute.Tensor, theirs: cute.Tensor, operand: cutlass.Constexpr):
        cfg = self.config
        tiles = (1, cfg.b_scale_tiles)[operand]
        make = (blockscaled_layout.make_smem_layout_sfa, blockscaled_layout.make_smem_layout_sfb)[operand]
        box, layout = self.scale_box(tiles), make(self.tiled_mma(), self.tiler(), 16, cfg.stages)
        size = 128 * tiles * 4 * cfg.steps
        for i in cutlass.range(size // 2 * cfg.stages):
            word, step, tile = i % 256, i // 256 % cfg.steps, i // 256 // cfg.steps % tiles
            ours[i] = Int32(box((word, step, tile, 0, i // 256 // cfg.steps // tiles)))
        for i in cutlass.range(size * cfg.stages):
            row, block = i % (128 * tiles), i // (128 * tiles) % (4 * cfg.steps)
            stage = i // size
            theirs[i] = Int32(layout((((row % 128, row // 128), (0, block % 4)), 0, block // 4, stage)))

    @cute.jit
    def columns(self, out: cute.Tensor):
        mma = self.tiled_mma()
        tiler = self.tiler()
        sfa = blockscaled_layout.make_smem_layout_sfa(mma, tiler, 16, 1)
        sfb = blockscaled_layout.make_smem_layout_sfb(mma, tiler, 16, 1)
        stage = (None, None, None, 0)
        layouts = (
            blockscaled_layout.make_tmem_layout_sfa(mma, tiler, 16, cute.slice_(sfa, stage)),
            blockscaled_layout.make_tmem_layout_sfb(mma, tiler, 16, cute.slice_(sfb, stage)),
        )
        for i in cutlass.range_constexpr(2):
            pointer = cute.make_ptr(Float8E4M3FN, Int32(0), cute.AddressSpace.tmem, assumed_align=16)
            out[i] = Int32(tcgen05.find_tmem_tensor_col_offset(cute.make_tensor(pointer, layouts[i])))
        acc = mma.make_fragment_C(mma.partition_shape_C((self.config.m, self.config.n)))
        out[2] = Int32(tcgen05.find_tmem_tensor_col_offset(acc))
        out[3] = Int32(cute.size(mma.shape_mnk, mode=[2]))
        for row in cutlass.range(128):
            for column in cutlass.range(self.config.n):
                out[4 + row * self.config.n + column] = Int32(acc.layout(((row, column), 0, 0)))


def code_places(config: BlackwellConfig, operand: int) -> tuple[Tensor, Tensor, list[str]]:
    """Byte offsets of all bytes of all stages before the swizzle: ours, twice those of the tensor core's layout in
    codes; and both swizzles."""
    count = (128, config.b_rows)[operand] * config.k // 2 * config.stages
    ours, theirs, swizzles = torch.zeros(count, dtype=torch.int32), torch.zeros(count, dtype=torch.int32), []
    arguments = from_dlpack(ours), from_dlpack(theirs)
    cute.compile(_Probe(config).codes, *arguments, operand, swizzles, options=_OPTIONS)(*arguments)
    return ours, theirs, swizzles


def scale_places(config: BlackwellConfig, operand: int) -> tuple[Tensor, Tensor]:
    """Offsets of our box's uint16 ``[stage, tile, step, 256]``, and of tcgen05's scales ``[stage, block, row]``."""
    tiles = (1, config.b_scale_tiles)[operand]
    size = 512 * tiles * config.steps * config.stages
    ours, theirs = torch.zeros(size // 2, dtype=torch.int32), torch.zeros(size, dtype=torch.int32)
    arguments = from_dlpack(ours), from_dlpack(theirs)
    cute.compile(_Probe(config).scales, *arguments, operand, options=_OPTIONS)(*arguments)
    return ours, theirs.view(config.stages, 4 * config.steps, 128 * tiles)


def tensor_memory(config: BlackwellConfig) -> tuple[list[int], Tensor]:
    """Columns of A's scales, B's and an accumulator, K of an instruction; addresses of an accumulator's elements."""
    out = torch.zeros(4 + 128 * config.n, dtype=torch.int32)
    argument = from_dlpack(out)
    cute.compile(_Probe(config).columns, argument, options=_OPTIONS)(argument)
    return out[:4].tolist(), out[4:].view(128, config.n)
