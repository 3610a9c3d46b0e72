"""The end of a tile of the Hopper grouped GEMM: SwiGLU's result as the next product's image, quantized or not, or rows.

A thread has two rows of 64 weights, two tokens of every eight: of a gated product gate and up of a feature.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int64, Uint32, cute

from dsv4.kernels.cutedsl import ptx
from dsv4.kernels.cutedsl.epilogue import block_terms, pair_maxima, quantized_pair, swiglu
from dsv4.kernels.hopper.config import HopperConfig
from dsv4.kernels.hopper.layout import maxima_place, terms_place

_UNSCALE = 512.0


class TileEnd:
    """Methods of the kernel that write what a tile's products come to."""

    config: HopperConfig

    @cute.jit
    def write(
        self, acc, tokens: cutlass.Constexpr, narrower: cutlass.Constexpr, row, width, rows, expert, table, gs, out,
        n_tiles, limit,
    ):  # fmt: skip
        """The end of a tile of ``width`` rows, more than ``narrower`` and up to ``tokens``: eight after the other."""
        cfg = self.config
        for n in cutlass.range_constexpr(tokens // 8):
            values = [acc[4 * n + i] for i in range(4)]
            if cutlass.const_expr(n * 8 <= narrower) or n * 8 < width:
                if cutlass.const_expr(cfg.gated):
                    self.write_image(values, n, row, width, rows, expert, table, gs, out, n_tiles, limit)
                else:
                    self.write_rows(values, n, rows, expert, table, gs, out, n_tiles)

    @cute.jit
    def write_image(self, acc, n, row, width, rows, expert, table, gs, out, n_tiles, limit):
        """SwiGLU's result, as the image of the next product."""
        tidx, _, _ = cute.arch.thread_idx()
        lane, warp = tidx % 32, (tidx // 32) % 4
        gate_gs = ptx.load_f32(gs + Int64(expert) * 8) * _UNSCALE
        up_gs = ptx.load_f32(gs + Int64(expert) * 8 + 4) * _UNSCALE
        block, chunk = self.image_block(warp, row, width, rows, out, n_tiles)
        word = self.activated(lane, acc, n, gate_gs, up_gs, table, limit)
        ptx.store_b32(self.pair_place(lane, block, chunk, n), word)

    @cute.jit
    def image_block(self, warp, row, width, rows, out, n_tiles):
        """Where the 64 of the result that a warpgroup has a part of begin, and which chunk is the warp's."""
        chunk = 2 * warp + rows % 2
        depth = n_tiles * self.config.warpgroups // 2  # 64s of the result
        block = out + Int64(row) * Int64(depth * 128) + Int64(rows // 2) * Int64(width * 128)
        return block, chunk

    @cute.jit
    def pair_place(self, lane, block, chunk, n):
        """Where a lane's two neighbours of a chunk stand in the image, of its one of the n-th eight tokens."""
        at = n * 8 + lane // 4
        return block + Int64(at * 128 + ((chunk ^ (at % 8)) * 16) + (lane % 4) * 4)

    @cute.jit
    def activated(self, lane, acc, n, gate_gs, up_gs, table, limit):
        """SwiGLU of gate (the thread's upper row) and up (its lower one), of eight tokens, each a chunk of a warp: the
        lane's pair of token ``lane // 4``."""
        cfg = self.config
        values = []
        for j in cutlass.range_constexpr(2):
            gate, up = acc[j] * gate_gs, acc[2 + j] * up_gs
            if cutlass.const_expr(cfg.row_scale or cfg.weighted):
                weight, factor = ptx.shared_pair(table + (n * 8 + 2 * (lane % 4) + j) * 8)
                gate, up = gate * factor, up * factor
            value = swiglu(gate, up, limit if cfg.limited else None)
            if cutlass.const_expr(cfg.weighted):
                value = value * weight.bitcast(Float32)
            values.append(value)
        return ptx.transpose_8x8(ptx.pack_bf16x2(values[0], values[1]))

    @cute.jit
    def write_requantized(
        self, acc, tokens: cutlass.Constexpr, narrower: cutlass.Constexpr, row, width, rows, expert, table, tables, gs,
        out, n_tiles, limit, result_gs,
    ):  # fmt: skip
        """The end of a tile whose result is quantized.

        A scale group is the eight chunks of one lane of four: the eight warps of two warpgroups have a pair of it each,
        in lane ``4 * token + lane of four`` of every eight tokens. So all maxima are written to shared memory, each
        thread turns some groups' eight into what quantizing them takes, in the place of the maxima, and all read that.

        The table is 1024 bytes for each 16 tokens, 32 for each lane (:mod:`dsv4.kernels.hopper.layout`). The next tile
        writes it behind a barrier at which every warp arrives after its last use of it in this tile.
        """
        cfg = self.config
        # Registers are what the main loops have least of, and nothing that is made of the thread's number is worth one.
        tidx = ptx.opaque(cute.arch.thread_idx()[0])
        lane, thread = tidx & 31, tidx & 255
        pair = 0 if cutlass.const_expr(cfg.warpgroups == 2) else cute.arch.make_warp_uniform(tidx // 32) // 8
        eights, units = cutlass.const_expr(tokens // 8), -(-tokens // 16)
        blocks = tables + 2 * cfg.tokens * 8 + pair * cfg.block_table_bytes
        gate_gs = ptx.load_f32(gs + Int64(expert) * 8) * _UNSCALE
        up_gs = ptx.load_f32(gs + Int64(expert) * 8 + 4) * _UNSCALE
        next_gs = ptx.load_f32(result_gs + Int64(expert) * 4)

        words = cute.make_rmem_tensor((2 * units,), Uint32)
        for n in cutlass.range_constexpr(2 * units):
            words[n] = Uint32(0)
        own = blocks + maxima_place(thread // 32, lane)
        for n in cutlass.range_constexpr(eights):
            values = [acc[4 * n + i] for i in range(4)]
            if cutlass.const_expr(n * 8 <= narrower) or n * 8 < width:
                words[n] = self.activated(lane, values, n, gate_gs, up_gs, table, limit)
            if cutlass.const_expr(n % 2 == 1 or n + 1 == eights):
                ptx.shared_store_word(own + n // 2 * 1024, pair_maxima(words[n & ~1], words[n | 1]))
        reciprocal_gs = ptx.divide(1.0, next_gs)
        cute.arch.barrier(barrier_id=2 + pair, number_of_threads=256)

        for i in cutlass.range_constexpr(-(-units // 8)):
            if cutlass.const_expr((i + 1) * 8 <= units) or thread < (units - i * 8) * 32:
                places = [blocks + i * 8192 + terms_place(half, thread) for half in range(2)]
                maxima = [word for place in places for word in ptx.shared_quad(place)]
                largest = maxima[0]
                for c in cutlass.range_constexpr(1, 8):
                    largest = ptx.larger_u16x2(largest, maxima[c])
                for half in cutlass.range_constexpr(2):
                    amax = largest << 16 if cutlass.const_expr(half == 0) else largest & Uint32(0xFFFF0000)
                    terms = block_terms(amax.bitcast(Float32), next_gs, reciprocal_gs)
                    ptx.shared_store_quad(places[half], terms)
        cute.arch.barrier(barrier_id=2 + pair, number_of_threads=256)

        tidx = ptx.opaque(cute.arch.thread_idx()[0])
        lane, warp = tidx & 31, (tidx & 127) // 32
        block, chunk = self.image_block(warp, row, width, rows, out, n_tiles)
        for n in cutlass.range_constexpr(eights):
            if cutlass.const_expr(n * 8 <= narrower) or n * 8 < width:
                terms = ptx.shared_quad(blocks + n // 2 * 1024 + terms_place(n % 2, lane))
                ptx.store_b32(self.pair_place(lane, block, chunk, n), quantized_pair(words[n], terms))

    @cute.jit
    def write_rows(self, acc, n, rows, expert, table, gs, out, n_tiles):
        """Results at their slots, ``[S, N]``."""
        cfg = self.config
        tidx, _, _ = cute.arch.thread_idx()
        lane, warp = tidx % 32, (tidx // 32) % 4
        columns = n_tiles * (cfg.warpgroups * 64)
        column = rows * 64 + warp * 16
        expert_gs = ptx.load_f32(gs + Int64(expert) * 4) * _UNSCALE
        odd = lane % 2 == 1
        pair = table + (n * 8 + 2 * (lane % 4)) * 8
        first_slot, first = ptx.shared_pair(pair)
        second_slot, second = ptx.shared_pair(pair + 8)
        first, second = first * expert_gs, second * expert_gs
        if cutlass.const_expr(cfg.wide_out):
            for j in cutlass.range_constexpr(2):
                slot, factor = (first_slot, first) if j == 0 else (second_slot, second)
                if slot >= 0:
                    at = out + (Int64(slot) * Int64(columns) + Int64(column + lane // 4)) * 4
                    ptx.store_f32(at, acc[j] * factor)
                    ptx.store_f32(at + 32, acc[2 + j] * factor)
        else:
            upper = ptx.transpose_8x8(ptx.pack_bf16x2(acc[0] * first, acc[1] * second))
            lower = ptx.transpose_8x8(ptx.pack_bf16x2(acc[2] * first, acc[3] * second))
            # A lane has two of the upper eight columns and two of the lower. Neighbours trade, so that each has four of
            # one eight: a row's sixteen columns are written by one instruction, a whole sector.
            theirs = cute.arch.shuffle_sync_bfly(cutlass.select_(odd, upper, lower), offset=1)
            low = cutlass.select_(odd, theirs, upper)
            high = cutlass.select_(odd, lower, theirs)
            slot, _ = ptx.shared_pair(table + (n * 8 + lane // 4) * 8)
            if slot >= 0:
                at = column + 8 * (lane % 2) + 4 * (lane % 4 // 2)
                ptx.store_b64(out + (Int64(slot) * Int64(columns) + Int64(at)) * 2, low, high)
