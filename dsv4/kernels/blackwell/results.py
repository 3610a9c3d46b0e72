"""The epilogue warps of :mod:`dsv4.kernels.blackwell.grouped_gemm`: accumulators scaled, through SwiGLU, and stored."""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, Int64, Uint32, cute

from dsv4.kernels.blackwell.config import SUBTILE, BlackwellConfig
from dsv4.kernels.cutedsl import ptx, schedule
from dsv4.kernels.cutedsl.epilogue import requantize, swiglu


class Results:
    """Of one configuration."""

    config: BlackwellConfig
    wide_stores = True
    """Whether a thread stores 32 bytes at once, which takes sm_100."""

    def accumulator_columns(self, base, tmem, row, column):
        """``SUBTILE`` fp32 columns of the thread's row, as a list."""
        warp_lane = (row // 32) << 21  # the first lane of the warp's quarter, in bits 16 and up
        return list(ptx.tmem_columns(tmem.toint() + warp_lane + column, SUBTILE))

    @cute.jit
    def store(
        self, base, acc_full, acc_empty, table, tmem, gs_a, gs_b, row_scale, row_slot, topk_weights, out, out_scales,
        out_gs, columns, gs_b_width, limit, first, step, rank, total, column_tiles,
    ):  # fmt: skip
        """The epilogue warps: each thread has one row, 32 columns at a time."""
        cfg = self.config
        tidx, _, _ = cute.arch.thread_idx()
        tile = first
        buffer = Int32(0)
        acc_phase = Int32(0)
        while tile < total:
            expert, row_tile, column_tile = schedule.locate(table, column_tiles, tile)
            begin = table[expert, schedule.STARTS]
            inside = row_tile * cfg.m + rank * 128 + tidx  # row of the expert
            row = begin + inside
            valid = row < table[expert + 1, schedule.STARTS]
            factor = ptx.load_f32(gs_a + Int64(expert) * 4)
            gate_gs = ptx.load_f32(gs_b + Int64(expert * gs_b_width) * 4)
            up_gs = ptx.load_f32(gs_b + Int64(expert * gs_b_width + gs_b_width - 1) * 4)
            token = Float32(1.0)
            weight = Float32(1.0)
            requant_gs = Float32(1.0)
            target = row
            if valid:
                if cutlass.const_expr(cfg.row_scale):
                    token = ptx.load_f32(row_scale + Int64(row) * 4)
                if cutlass.const_expr(cfg.weighted or cfg.scattered):
                    slot = ptx.load_i32(row_slot + Int64(row) * 4)
                    if cutlass.const_expr(cfg.weighted):
                        weight = ptx.load_f32(topk_weights + Int64(slot) * 4)
                    if cutlass.const_expr(cfg.scattered):
                        target = slot
                if cutlass.const_expr(cfg.requantize):
                    requant_gs = ptx.load_f32(out_gs + Int64(expert) * 4)
            scale_row = table[expert, schedule.SCALES] * 128 + inside

            place = Int32(0) if cutlass.const_expr(cfg.overlapped) else buffer
            cute.arch.mbarrier_wait(acc_full + place, acc_phase)
            self.fence_accumulator()
            for i in cutlass.range(cfg.n // SUBTILE, unroll=1):
                # The columns that both accumulators have come first: the last of one, the first of the other.
                reversed_part = (cfg.n // SUBTILE - 1 - i) * (1 - buffer) + i * buffer
                part = reversed_part if cutlass.const_expr(cfg.overlapped) else i
                values = self.accumulator_columns(base, tmem, tidx, buffer * cfg.accumulator_stride + part * SUBTILE)
                if i == cfg.release_after - 1:
                    self.release_accumulator(acc_empty + place)
                column = column_tile * cfg.n + part * SUBTILE
                if valid & (column < columns):
                    if cutlass.const_expr(cfg.gated):
                        self.write_swiglu(
                            values, factor, token, gate_gs, up_gs, weight, limit, target, column, columns, out,
                            out_scales, scale_row, requant_gs,
                        )  # fmt: skip
                    else:
                        column_gs = gate_gs
                        if 2 * column >= columns:
                            column_gs = up_gs
                        self.write_rows(values, factor, token, column_gs, target, column, columns, out)
            buffer ^= 1
            acc_phase ^= 1 if cutlass.const_expr(cfg.overlapped) else buffer ^ 1
            tile += step

    def fence_accumulator(self):
        """Before tensor memory is read that another thread's instructions wrote."""
        ptx.tmem_fence_after()

    def release_accumulator(self, barrier):
        """Every epilogue thread, on the barrier of the CTA that issues."""
        ptx.tmem_fence_before()
        if self.config.ctas == 2:
            cute.arch.mbarrier_arrive(barrier, 0)
        else:
            cute.arch.mbarrier_arrive(barrier)

    def scaled(self, value, factor, gs, token):
        """A product with the scales that it lacks, in the order of the reference."""
        value = value * factor * gs
        return value * token if self.config.row_scale else value

    def write_words(self, address, words):
        """Whole words, 32 bytes at once where the chip can."""
        size = min(len(words), 8 if self.wide_stores else 4)
        for i in range(0, len(words), size):
            ptx.store_words(address + 4 * i, words[i : i + size])

    def write_rows(self, values, factor, token, gs, target, column, columns, out):
        """Results of a row, ``[rows, N]``."""
        values = [self.scaled(value, factor, gs, token) for value in values]
        at = Int64(target) * Int64(columns) + Int64(column)
        if self.config.wide_out:
            self.write_words(out + at * 4, [value.bitcast(Uint32) for value in values])
        else:
            words = [ptx.pack_bf16x2(values[i], values[i + 1]) for i in range(0, len(values), 2)]
            self.write_words(out + at * 2, words)

    def write_swiglu(
        self, values, factor, token, gate_gs, up_gs, weight, limit, target, column, columns, out, out_scales, scale_row,
        requant_gs,
    ):  # fmt: skip
        """SwiGLU of a row's gates and ups, rounded once to bf16; then stored, or quantized."""
        cfg = self.config
        results = []
        for i in range(0, len(values), 8):
            for j in range(i, i + 4):
                gate = self.scaled(values[j], factor, gate_gs, token)
                up = self.scaled(values[j + 4], factor, up_gs, token)
                result = swiglu(gate, up, limit if cfg.limited else None)
                results.append(result * weight if cfg.weighted else result)
        words = [ptx.pack_bf16x2(results[i], results[i + 1]) for i in range(0, len(results), 2)]
        if cfg.requantize:
            rounded = []
            for word in words:
                rounded += [(word << 16).bitcast(Float32), (word & Uint32(0xFFFF0000)).bitcast(Float32)]
            low, high, scale = requantize(rounded, requant_gs)
            at = Int64(target) * Int64(columns // 4) + Int64(column // 4)
            ptx.store_words(out + at, [low, high])
            self.write_scale(out_scales, scale_row, column // 32, columns // 32, scale)
        elif cfg.interleaved:
            at = out + (Int64(target) * Int64(columns) + Int64(column)) * 2
            for i in range(0, len(words), 2):
                ptx.store_words(at + 8 * i, words[i : i + 2])
        else:
            at = Int64(target) * Int64(columns // 2) + Int64(column // 2)
            self.write_words(out + at * 2, words)

    @cute.jit
    def write_scale(self, out_scales, row, block, blocks, scale):
        """The scale of a row's block; behind its last one zeros, which the next product multiplies with its own."""
        width = (blocks + 3) // 4 * 4
        ptx.store_b8(out_scales + Int64(schedule.scale_offset(row, block, width)), scale)
        if block == blocks - 1:
            for padding in cutlass.range_constexpr(1, 4):
                if block + padding < width:
                    ptx.store_b8(out_scales + Int64(schedule.scale_offset(row, block + padding, width)), Uint32(0))
