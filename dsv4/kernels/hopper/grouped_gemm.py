"""Grouped GEMM over NVFP4 weights for Hopper: weights decoded in registers, wgmma, every load a plain bulk copy.

**Operands are swapped.** 64 rows of weights are wgmma's A operand, held in registers, where decoding leaves them; the
tokens of one expert are its N, 8 to 224 of them.

**Weights** of one 64-row tile are one contiguous run: for each 128 of K a *block* of 4608 bytes, ``[2][128][16]``
codes and ``[128 threads][4]`` scales, exactly what each thread of a warpgroup multiplies, in its order. A thread's
16 values of a row in 64 of K are one scale group, which takes a permutation of K (:mod:`dsv4.kernels.hopper.layout`).

**Tokens** come as an *image* for each row group, the rows of one expert that are multiplied together: ``[K/64][rows]
[64]`` bf16, K permuted as in the weights, the 16-byte chunks of a 128-byte row swizzled the way wgmma wants to read
them. A stage of the pipeline is therefore a few 1-D bulk copies: no tensor map, no gather, no address arithmetic but a
sum. GEMM 1 writes its result as such images, quantized where the scales are known ahead. A main loop is compiled for
each of several numbers of tokens; up to 8 are multiplied by ``mma``, which wants the same fragments of weights as
``wgmma``.

**Warps.** One producer thread keeps the pipeline full; each consumer warpgroup owns 64 rows of the tile and decodes 64
of K while the tensor cores multiply the 64 before, from two sets of operand registers.

One lane of a consumer warp says that a stage is free, behind a barrier of the warp. ptxas makes no instruction of that
barrier, since the warp is together, so that compute-sanitizer's racecheck takes the other lanes' reads for unordered:
for it every lane can say so for itself.

**Schedule.** Output tiles are (row group, ``64 * warpgroups`` rows of weights) pairs, counted on the device. Persistent
programs begin with the tile of their own number; each further one is the lowest that no program has taken, a counter in
global memory says which: groups differ in width, and multiprocessors in their share of the memory. The producer takes a
tile as it begins to load the one before. It writes what consumers must know of the tile beside the first stage that it
fills for it, so that the barrier they wait at anyway hands that over, and behind the last tile that there is none.
"""

from __future__ import annotations

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint32, cute
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.utils import hopper_helpers

from dsv4.kernels.cutedsl import compiler, ptx
from dsv4.kernels.cutedsl.epilogue import block_terms, pair_maxima, quantized_pair, swiglu
from dsv4.kernels.hopper.config import MMA_TOKENS, HopperConfig
from dsv4.kernels.hopper.layout import BLOCK_BYTES, CODE_BYTES, maxima_place, terms_place

_LANES = 0x81C081C0
_UNSCALE = 512.0


def decode(quad, scales, half, fragment):
    """Four words of codes and two scales to a thread's part of the A operand of a 64 x 64 tile."""
    pair = ptx.permute(scales, 0x1100 if half == 0 else 0x3322) & Uint32(0x07F007F0)
    pair = ptx.scale_bf16x2(pair, 0x7B807B80)  # 2^120
    pair = ptx.scale_bf16x2(pair, 0x7A007A00)  # 2^117
    for k in range(4):
        word = quad[k]
        rest = (word & Uint32(0x001B001B)) * Uint32(0x4108)
        for i, codes in enumerate((word, ptx.rotate_right(word, 3), ptx.rotate_right(word, 6), rest)):
            # Registers of a fragment take turns between the thread's upper row and its lower one.
            fragment[4 * k + i] = ptx.multiply_by_lane(codes & Uint32(_LANES), pair, i % 2)


class GroupedGemm:
    """The kernel of one configuration; called under ``cute.compile``."""

    def __init__(self, config: HopperConfig):
        self.config = config

    @cute.jit
    def __call__(
        self,
        experts: Int64,
        image: Int64,
        gs: Int64,
        row_slot: Int64,
        group_expert: Int64,
        group_row: Int64,
        num_groups: Int64,
        taken: Int64,
        row_scale: Int64,
        topk_weights: Int64,
        out: Int64,
        expert_bytes: Int64,
        k_blocks: Int32,
        n_tiles: Int32,
        limit: Float32,
        result_gs: Int64,
        grid: Int32,
    ):
        cfg = self.config
        self.kernel(
            experts, image, gs, row_slot, group_expert, group_row, num_groups, taken, row_scale, topk_weights, out,
            expert_bytes, k_blocks, n_tiles, limit, result_gs,
        ).launch(
            grid=(grid, 1, 1), block=(cfg.threads, 1, 1), smem=cfg.shared_bytes, min_blocks_per_mp=cfg.programs_per_sm,
            preferred_smem_carveout=100,  # else the device is asked
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        experts: Int64,
        image: Int64,
        gs: Int64,
        row_slot: Int64,
        group_expert: Int64,
        group_row: Int64,
        num_groups: Int64,
        taken: Int64,
        row_scale: Int64,
        topk_weights: Int64,
        out: Int64,
        expert_bytes: Int64,
        k_blocks: Int32,
        n_tiles: Int32,
        limit: Float32,
        result_gs: Int64,
    ):
        cfg = self.config
        groups, stages = cutlass.const_expr(cfg.warpgroups), cfg.stages
        tidx, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(tidx // 32)

        base = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024)
        full = cute.recast_ptr(base + stages * cfg.stage_bytes, dtype=Int64)
        empty = full + stages

        if tidx == 0:
            for i in cutlass.range_constexpr(stages):
                cute.arch.mbarrier_init(full + i, 1)
                cute.arch.mbarrier_init(empty + i, groups * (128 if cfg.every_lane_releases else 4))
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        # The next launch may begin once the tables of routing are there: it reads them without waiting, and waits for
        # this one before it reads what this one writes.
        if cutlass.const_expr(cfg.follows_routing):
            cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        chunks = k_blocks // cfg.blocks

        if warp >= 4 * groups:
            if cutlass.const_expr(cfg.producer_group):
                cute.arch.setmaxregister_decrease(cfg.producer_registers)
            if tidx == 128 * groups:
                self.produce(
                    base, full, empty, k_blocks, experts, image, group_expert, group_row, num_groups, taken,
                    expert_bytes, n_tiles,
                )  # fmt: skip
        else:
            if cutlass.const_expr(cfg.producer_group):
                cute.arch.setmaxregister_increase(cfg.consumer_registers)
            self.consume(
                base, full, empty, chunks, gs, row_slot, row_scale, topk_weights, out, n_tiles, limit, result_gs,
            )  # fmt: skip

    @cute.jit
    def row_group(self, tile, n_tiles, group_expert, group_row):
        """``(first row, number of rows, expert)`` of an output tile."""
        group = Int64(tile // n_tiles) * 4
        row, end = ptx.load_i32(group_row + group), ptx.load_i32(group_row + group + 4)
        return row, end - row, ptx.load_i32(group_expert + group)

    @cute.jit
    def tile_of_stage(self, base, stage):
        """Where four words say which tile begins in a stage: its number, then what :meth:`row_group` says of it."""
        return base.toint() + self.config.tiles_at + stage * 16

    @cute.jit
    def load_weights(self, at, weight, run_bytes, barrier):
        """Copy a stage's weights: of each warpgroup's rows, ``run_bytes`` apart."""
        cfg = self.config
        size = cfg.blocks * BLOCK_BYTES
        for g in cutlass.range_constexpr(cfg.warpgroups):
            ptx.bulk_load(at + g * size, weight + Int64(run_bytes) * g, size, barrier)

    @cute.jit
    def load_tokens(self, at, token, width, barrier):
        """Copy a stage's tokens: the rows that there are of each 64 of K, each 64 at a place of its own."""
        cfg = self.config
        for half in cutlass.range_constexpr(2 * cfg.blocks):
            ptx.bulk_load(at + half * (cfg.tokens * 128), token + Int64(half * width * 128), width * 128, barrier)

    @cute.jit
    def produce(
        self, base, full, empty, k_blocks, experts, image, group_expert, group_row, num_groups, taken, expert_bytes,
        n_tiles,
    ):  # fmt: skip
        """The producer thread: copies for one stage after the other, as consumers free them."""
        cfg = self.config
        groups, stages = cutlass.const_expr(cfg.warpgroups), cfg.stages
        program, _, _ = cute.arch.block_idx()
        programs, _, _ = cute.arch.grid_dim()
        token_bytes = cfg.blocks * cfg.tokens * 256
        weight_bytes = cfg.blocks * BLOCK_BYTES
        run_bytes = k_blocks * BLOCK_BYTES  # of one 64-row tile
        chunks = k_blocks // cfg.blocks
        tokens_at = base.toint()
        weights_at = tokens_at + stages * token_bytes

        tile = program
        # Of the first tile, whether there is one or not: what waits for memory waits once.
        row, width, expert = self.row_group(tile, n_tiles, group_expert, group_row)
        total = ptx.load_i32(num_groups) * n_tiles
        stage = Int32(0)
        phase = Int32(1)
        ahead = Int32(0)
        if tile < total:
            ptx.shared_store_quad(self.tile_of_stage(base, stage), (tile, row, width, expert))
            # Weights depend on no other launch: the first stages are on their way before the tokens are there.
            weight = experts + Int64(expert) * expert_bytes + Int64((tile % n_tiles) * groups) * Int64(run_bytes)
            token = image + Int64(row) * Int64(k_blocks * 256)
            ahead = cutlass.min(chunks, Int32(stages))
            for i in cutlass.range(ahead, unroll=1):
                cute.arch.mbarrier_arrive_and_expect_tx(full + i, groups * weight_bytes + width * (cfg.blocks * 256))
                self.load_weights(
                    weights_at + i * (groups * weight_bytes),
                    weight + Int64(i * weight_bytes),
                    run_bytes,
                    (full + i).toint(),
                )
            cute.arch.griddepcontrol_wait()
            for i in cutlass.range(ahead, unroll=1):
                self.load_tokens(
                    tokens_at + i * token_bytes,
                    token + Int64(i * (width * (cfg.blocks * 256))),
                    width,
                    (full + i).toint(),
                )
            stage = ahead
            if stage == stages:
                stage = Int32(0)
                phase = Int32(0)
        while tile < total:
            before = total  # where each tile is some program's first, there is no other to be had
            if total > programs:
                before = ptx.increment(taken)
            if ahead == 0:
                cute.arch.mbarrier_wait(empty + stage, phase)
                ptx.shared_store_quad(self.tile_of_stage(base, stage), (tile, row, width, expert))
            weight = experts + Int64(expert) * expert_bytes + Int64((tile % n_tiles) * groups) * Int64(run_bytes)
            token = image + Int64(row) * Int64(k_blocks * 256)
            width_bytes = width * (cfg.blocks * 256)
            weight += Int64(ahead * weight_bytes)
            token += Int64(ahead * width_bytes)
            for _ in cutlass.range(chunks - ahead, unroll=1):
                cute.arch.mbarrier_wait(empty + stage, phase)
                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, groups * weight_bytes + width_bytes)
                barrier = (full + stage).toint()
                self.load_weights(weights_at + stage * (groups * weight_bytes), weight, run_bytes, barrier)
                self.load_tokens(tokens_at + stage * token_bytes, token, width, barrier)
                weight += weight_bytes
                token += Int64(width_bytes)
                stage += 1
                if stage == stages:
                    stage = Int32(0)
                    phase ^= 1
            ahead = Int32(0)
            tile = before + programs
            if tile < total:
                row, width, expert = self.row_group(tile, n_tiles, group_expert, group_row)
        cute.arch.mbarrier_wait(empty + stage, phase)
        ptx.shared_store_word(self.tile_of_stage(base, stage), Int32(-1))
        cute.arch.mbarrier_arrive(full + stage)

    @cute.jit
    def next_tile(self, base, full, stage, phase):
        """``(number, first row, number of rows, expert)`` of the tile that begins in a stage; the number is -1 if none
        does."""
        cute.arch.mbarrier_wait(full + stage, phase)
        return [word.bitcast(Int32) for word in ptx.shared_quad(self.tile_of_stage(base, stage))]

    @cute.jit
    def consume(
        self, base, full, empty, chunks, gs, row_slot, row_scale, topk_weights, out, n_tiles, limit, result_gs,
    ):  # fmt: skip
        """A consumer warpgroup."""
        cfg = self.config
        groups, widths = cutlass.const_expr(cfg.warpgroups), cutlass.const_expr(cfg.widths)
        tidx, _, _ = cute.arch.thread_idx()
        group = cute.arch.make_warp_uniform(tidx // 32) // 4
        tables = base.toint() + cfg.tables_at

        # For the scales of rows. And in every program, also one without a tile: this launch must not end before the one
        # that it follows, since whoever waits for this one has waited for that one, too.
        cute.arch.griddepcontrol_wait()
        acc = cute.make_rmem_tensor((cfg.tokens // 2,), Float32)
        a = [cute.make_rmem_tensor(((2, 2, 2), 1, 4), BFloat16) for _ in range(2)]
        stage = Int32(0)
        phase = Int32(0)
        table = Int32(0)
        tile, row, width, expert = self.next_tile(base, full, stage, phase)
        while tile >= 0:
            # What the end of this tile needs is on its way meanwhile.
            slot, factor = Int32(-1), Float32(1.0)
            if tidx < width:
                if cutlass.const_expr(not cfg.gated or cfg.weighted):
                    slot = ptx.load_i32(row_slot + Int64(row + tidx) * 4)
                if cutlass.const_expr(cfg.row_scale):
                    factor = ptx.load_f32(row_scale + Int64(row + tidx) * 4)
                if cutlass.const_expr(cfg.expert_scale):
                    factor = ptx.load_f32(row_scale + Int64(expert) * 4)
            at = tables + table * (cfg.tokens * 8)
            narrower = 0
            for w in cutlass.range_constexpr(len(widths)):
                tokens = widths[w]
                if width > narrower and (width <= tokens or cutlass.const_expr(w + 1 == len(widths))):
                    if cutlass.const_expr(tokens <= MMA_TOKENS):
                        result = cute.make_rmem_tensor((4,), Float32)
                        stage, phase = self.multiply_narrow(base, full, empty, chunks, stage, phase, result)
                    else:
                        stage, phase = self.multiply(base, full, empty, chunks, stage, phase, acc, a, tokens)
                        result = acc
                    if cutlass.const_expr(not cfg.gated or cfg.weighted or cfg.row_scale or cfg.requantized):
                        if tidx < width:
                            ptx.shared_store_pair(at + tidx * 8, slot, factor)
                        cute.arch.barrier(barrier_id=1, number_of_threads=128 * groups)
                    rows = (tile % n_tiles) * groups + group
                    if cutlass.const_expr(cfg.requantized):
                        self.write_requantized(
                            result, tokens, narrower, row, width, rows, expert, at, tables, gs, topk_weights, out,
                            n_tiles, limit, result_gs,
                        )  # fmt: skip
                    else:
                        self.write(
                            result, tokens, narrower, row, width, rows, expert, at, gs, topk_weights, out, n_tiles,
                            limit,
                        )  # fmt: skip
                narrower = tokens
            table ^= 1
            tile, row, width, expert = self.next_tile(base, full, stage, phase)

    @cute.jit
    def multiply(self, base, full, empty, chunks, stage, phase, acc, a, tokens: cutlass.Constexpr):
        """The main loop of a tile of up to ``tokens`` tokens: wgmma on 64 of K while the next are decoded."""
        cfg = self.config
        groups, stages = cutlass.const_expr(cfg.warpgroups), cfg.stages
        tidx, _, _ = cute.arch.thread_idx()
        group, thread, lane = cute.arch.make_warp_uniform(tidx // 32) // 4, tidx % 128, tidx % 32
        weight_bytes = cfg.blocks * BLOCK_BYTES
        weights_at = base.toint() + stages * (cfg.blocks * cfg.tokens * 256) + group * weight_bytes

        mma = hopper_helpers.make_trivial_tiled_mma(
            BFloat16, BFloat16, OperandMajorMode.K, OperandMajorMode.K, Float32, (1, 1, 1), (64, tokens),
            warpgroup.OperandSource.RMEM,
        )  # fmt: skip
        thread_mma = mma.get_slice(thread)
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)
        swizzle = cute.tile_to_shape(atom, (tokens, 64), order=(0, 1)).inner
        # Rows by eights, 64 of K, and those 64s one behind the other with the room of the most tokens.
        layout = cute.make_layout(
            ((8, tokens // 8), (64, 1), (1, 2 * cfg.blocks * stages)),
            stride=((64, 512), (1, 0), (0, cfg.tokens * 64)),
        )
        shared = cute.make_tensor(cute.recast_ptr(base, swizzle, dtype=BFloat16), layout)
        b = thread_mma.make_fragment_B(thread_mma.partition_B(shared))
        c = cute.make_tensor(acc.iterator, cute.make_layout(thread_mma.partition_shape_C((64, tokens))))
        fragments = [cute.recast_tensor(x, Uint32) for x in a]

        before = stage
        for chunk in cutlass.range(chunks, unroll=1):
            cute.arch.mbarrier_wait(full + stage, phase)
            weights = weights_at + stage * (groups * weight_bytes)
            for block in cutlass.range_constexpr(cfg.blocks):
                at = weights + block * BLOCK_BYTES
                scales = ptx.shared_word(at + CODE_BYTES + thread * 4)
                quads = [ptx.shared_quad(at + half * (CODE_BYTES // 2) + thread * 16) for half in range(2)]
                for half in cutlass.range_constexpr(2):
                    decode(quads[half], scales, half, fragments[half])
                    warpgroup.fence()
                    for k in cutlass.range_constexpr(4):
                        if cutlass.const_expr(block == 0 and half == 0 and k == 0):
                            mma.set(warpgroup.Field.ACCUMULATE, chunk > 0)
                        else:
                            mma.set(warpgroup.Field.ACCUMULATE, True)
                        cute.gemm(
                            mma,
                            c,
                            a[half][None, None, k],
                            b[None, None, k, stage * (2 * cfg.blocks) + 2 * block + half],
                            c,
                        )
                    warpgroup.commit_group()
                    warpgroup.wait_group(1)
                    if cutlass.const_expr(block == 0 and half == 0):
                        # Everything of the stage before is multiplied.
                        cute.arch.sync_warp()
                        if chunk > 0 and (cutlass.const_expr(cfg.every_lane_releases) or lane == 0):
                            cute.arch.mbarrier_arrive(empty + before)
            before = stage
            stage += 1
            if stage == stages:
                stage = Int32(0)
                phase ^= 1
        warpgroup.wait_group(0)
        cute.arch.sync_warp()
        if cutlass.const_expr(cfg.every_lane_releases) or lane == 0:
            cute.arch.mbarrier_arrive(empty + before)
        return stage, phase

    @cute.jit
    def multiply_narrow(self, base, full, empty, chunks, stage, phase, acc):
        """The main loop of a tile of up to 8 tokens: ``mma``, whose fragments of weights are those of ``wgmma``."""
        cfg = self.config
        groups, stages = cutlass.const_expr(cfg.warpgroups), cfg.stages
        tidx, _, _ = cute.arch.thread_idx()
        group, thread, lane = cute.arch.make_warp_uniform(tidx // 32) // 4, tidx % 128, tidx % 32
        token_bytes = cfg.blocks * cfg.tokens * 256
        weight_bytes = cfg.blocks * BLOCK_BYTES
        weights_at = base.toint() + stages * token_bytes + group * weight_bytes
        # A lane's row of the first four 16-byte chunks of a line; in the swizzle, the other four are 64 bytes across.
        a = cute.make_rmem_tensor((16,), Uint32)
        tokens_at = base.toint() + (lane % 8) * 128 + (((lane // 8) ^ (lane % 8)) * 16)

        for i in cutlass.range_constexpr(4):
            acc[i] = Float32(0.0)
        for _ in cutlass.range(chunks, unroll=1):
            cute.arch.mbarrier_wait(full + stage, phase)
            weights = weights_at + stage * (groups * weight_bytes)
            lines = tokens_at + stage * token_bytes
            for block in cutlass.range_constexpr(cfg.blocks):
                at = weights + block * BLOCK_BYTES
                scales = ptx.shared_word(at + CODE_BYTES + thread * 4)
                quads = [ptx.shared_quad(at + half * (CODE_BYTES // 2) + thread * 16) for half in range(2)]
                for half in cutlass.range_constexpr(2):
                    line = lines + (2 * block + half) * (cfg.tokens * 128)
                    tokens = [*ptx.load_matrices(line), *ptx.load_matrices(line ^ 64)]
                    decode(quads[half], scales, half, a)
                    for k in cutlass.range_constexpr(4):
                        result = ptx.mma_16x8x16(
                            [acc[i] for i in range(4)],
                            [a[4 * k + i] for i in range(4)],
                            [tokens[2 * k], tokens[2 * k + 1]],
                        )
                        for i in cutlass.range_constexpr(4):
                            acc[i] = result[i]
            cute.arch.sync_warp()
            if cutlass.const_expr(cfg.every_lane_releases) or lane == 0:
                cute.arch.mbarrier_arrive(empty + stage)
            stage += 1
            if stage == stages:
                stage = Int32(0)
                phase ^= 1
        return stage, phase

    @cute.jit
    def write(
        self, acc, tokens: cutlass.Constexpr, narrower: cutlass.Constexpr, row, width, rows, expert, table, gs,
        topk_weights, out, n_tiles, limit,
    ):  # fmt: skip
        """The end of a tile: eight rows after the other."""
        cfg = self.config
        for n in cutlass.range_constexpr(tokens // 8):
            values = [acc[4 * n + i] for i in range(4)]
            if cutlass.const_expr(n * 8 <= narrower) or n * 8 < width:  # fewer rows than the next width takes: none
                if cutlass.const_expr(cfg.gated):
                    self.write_image(values, n, row, width, rows, expert, table, gs, topk_weights, out, n_tiles, limit)
                else:
                    self.write_rows(values, n, rows, expert, table, gs, out, n_tiles)

    @cute.jit
    def write_image(self, acc, n, row, width, rows, expert, table, gs, topk_weights, out, n_tiles, limit):
        """SwiGLU's result, as the image of the next product."""
        tidx, _, _ = cute.arch.thread_idx()
        lane, warp = tidx % 32, (tidx // 32) % 4
        gate_gs = ptx.load_f32(gs + Int64(expert) * 8) * _UNSCALE
        up_gs = ptx.load_f32(gs + Int64(expert) * 8 + 4) * _UNSCALE
        block, chunk = self.image_block(warp, row, width, rows, out, n_tiles)
        word = self.activated(lane, acc, n, gate_gs, up_gs, table, topk_weights, limit)
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
    def activated(self, lane, acc, n, gate_gs, up_gs, table, topk_weights, limit):
        """SwiGLU of gate (the thread's upper row) and up (its lower one), of eight tokens, each a chunk of a warp: the
        lane's pair of token ``lane // 4``."""
        cfg = self.config
        values = []
        for j in cutlass.range_constexpr(2):
            gate, up = acc[j] * gate_gs, acc[2 + j] * up_gs
            slot = Int32(-1)
            if cutlass.const_expr(cfg.row_scale or cfg.weighted):
                slot, factor = ptx.shared_pair(table + (n * 8 + 2 * (lane % 4) + j) * 8)
                gate, up = gate * factor, up * factor
            value = swiglu(gate, up, limit if cfg.limited else None)
            if cutlass.const_expr(cfg.weighted):
                weight = Float32(0.0)
                if slot >= 0:
                    weight = ptx.load_f32(topk_weights + Int64(slot) * 4)
                value = value * weight
            values.append(value)
        return ptx.transpose_8x8(ptx.pack_bf16x2(values[0], values[1]))

    @cute.jit
    def write_requantized(
        self, acc, tokens: cutlass.Constexpr, narrower: cutlass.Constexpr, row, width, rows, expert, table, tables, gs,
        topk_weights, out, n_tiles, limit, result_gs,
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
                words[n] = self.activated(lane, values, n, gate_gs, up_gs, table, topk_weights, limit)
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


def compile_kernel(config: HopperConfig, arch: str) -> tuple[bytes, str, str]:
    """Cubin, entry name and PTX of one configuration: no GPU is needed."""
    arguments = (*[Int64(0)] * 12, Int32(0), Int32(0), Float32(0), Int64(0), Int32(1))
    return compiler.compile_kernel(GroupedGemm(config), arguments, arch)
