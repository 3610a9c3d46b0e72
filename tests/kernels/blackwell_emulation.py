"""The Blackwell kernel with its tensor cores replaced by one warp's arithmetic, for a GPU that has none of them.

Everything else is the kernel itself: schedule, tensor maps, TMA boxes and their swizzle, both rings of barriers, scale
addresses, epilogue and stores. Tensor memory is shared memory here, and one CTA has a tile (pairs of CTAs load with
instructions that only Blackwell has).
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, Uint32, cute
from cutlass.cute.nvgpu import cpasync

from dsv4.kernels.blackwell.grouped_gemm import GroupedGemm, compile_class
from dsv4.kernels.cutedsl import ptx, schedule
from kernels.blackwell_emulated import ARCH, EmulatedConfig


class EmulatedGemm(GroupedGemm):
    """See the module docstring."""

    wide_stores = False

    def load_op(self):
        return cpasync.CopyBulkTensorTileG2SOp()

    def allocate(self, base):
        pass

    def tensor_memory(self, base):
        return cute.recast_ptr(base + self.config.accumulators_at, dtype=Float32)

    def release(self, tmem):
        pass

    def fence_accumulator(self):
        pass

    def release_accumulator(self, barrier):
        cute.arch.mbarrier_arrive(barrier)

    def accumulators(self, tmem):
        """``[row, column]``."""
        return cute.make_tensor(tmem, cute.make_layout((128, self.config.accumulator_stride + self.config.n)))

    def accumulator_columns(self, base, tmem, row, column):
        acc = self.accumulators(tmem)
        return [acc[row, column + i] for i in range(32)]

    def bytes_at(self, base, offset):
        """Bytes of shared memory from an offset on: more than one, or every index is the first."""
        return cute.make_tensor(base + offset, cute.make_layout(self.config.shared_bytes))

    def block(self, base, operand, row, block):
        """Sixteen decoded values of a row and its block of the stage, through the swizzle's definition."""
        line = self.config.k // 2
        bits = {128: 7, 64: 3, 32: 1}[line]
        values = []
        for byte in range(8):
            offset = row * line + block * 8 + byte
            offset = offset ^ (((offset >> 7) & bits) << 4)
            pair = Uint32(self.bytes_at(base, operand)[offset])
            for code in (pair & Uint32(15), pair >> 4):
                magnitude = ((code & Uint32(7)) << 22).bitcast(Float32) * 2.0**126
                values.append((magnitude.bitcast(Uint32) | ((code & Uint32(8)) << 28)).bitcast(Float32))
        return values

    def scale(self, base, operand, row, block):
        """Of a row and a block, by the layout's own definition."""
        tile = (row // 128) * self.config.steps + block // 4
        place = tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + block % 4
        return ptx.e4m3_value(Uint32(self.bytes_at(base, operand)[place]))

    @cute.jit
    def multiply(self, base, full, empty, acc_full, acc_empty, table, tmem, first, step, total, column_tiles, chunks):
        cfg = self.config
        lane = cute.arch.lane_idx()
        acc = self.accumulators(tmem)
        tile = first
        stage = Int32(0)
        phase = Int32(0)
        buffer = Int32(0)
        acc_phase = Int32(1)
        while tile < total:
            _, _, column_tile = schedule.locate(table, column_tiles, tile)
            slot = Int32(0) if cutlass.const_expr(cfg.overlapped) else buffer
            cute.arch.mbarrier_wait(acc_empty + slot, acc_phase)
            at = buffer * cfg.accumulator_stride
            for column in cutlass.range(cfg.n, unroll=1):
                for part in cutlass.range_constexpr(4):
                    acc[lane + 32 * part, at + column] = Float32(0.0)
            shift = column_tile * cfg.n % 128
            for _ in cutlass.range(chunks, unroll=1):
                cute.arch.mbarrier_wait(full + stage, phase)
                a_at, b_at = stage * cfg.a_bytes, self.b_at + stage * cfg.b_bytes
                sfa_at = self.a_scales_at + stage * cfg.a_scale_bytes
                sfb_at = self.b_scales_at + stage * cfg.b_scale_bytes
                for block in cutlass.range(cfg.k // 16, unroll=1):
                    for part in cutlass.range_constexpr(4):
                        row = lane + 32 * part
                        a_scale = self.scale(base, sfa_at, row, block)
                        a = [value * a_scale for value in self.block(base, a_at, row, block)]
                        for column in cutlass.range(cfg.n, unroll=1):
                            b = self.block(base, b_at, column, block)
                            total_16 = Float32(0.0)
                            for i in cutlass.range_constexpr(16):
                                total_16 = total_16 + a[i] * b[i]
                            b_scale = self.scale(base, sfb_at, column + shift, block)
                            acc[row, at + column] = acc[row, at + column] + total_16 * b_scale
                cute.arch.sync_warp()
                if lane == 0:
                    cute.arch.mbarrier_arrive(empty + stage)
                stage += 1
                if stage == cfg.stages:
                    stage = Int32(0)
                    phase ^= 1
            cute.arch.sync_warp()
            if lane == 0:
                cute.arch.mbarrier_arrive(acc_full + slot)
            buffer ^= 1
            acc_phase ^= 1 if cutlass.const_expr(cfg.overlapped) else buffer ^ 1
            tile += step


def compile_emulated(config: EmulatedConfig, arch: str) -> tuple[bytes, str]:
    """Cubin and entry name."""
    return compile_class(EmulatedGemm(config), arch)[:2]


def emulated_ptx(config: EmulatedConfig) -> str:
    """For :mod:`kernels.ptx_on_cpu`."""
    return compile_class(EmulatedGemm(config), ARCH)[2]
