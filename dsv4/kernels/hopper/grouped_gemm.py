"""Grouped GEMM over NVFP4 weights for Hopper: weights decoded in registers, wgmma, every load a plain bulk copy.

**Operands are swapped.** 64 rows of weights are wgmma's A operand, held in registers, where decoding leaves them; the
tokens of one expert are its N, 8 to 224 of them.

**Weights** of one 64-row tile are one contiguous run: for each 128 of K a *block* of 4608 bytes, ``[2][128][16]``
codes and ``[128 threads][4]`` scales, exactly what each thread of a warpgroup multiplies, in its order. A thread's
16 values of a row in 64 of K are one scale group, which takes a permutation of K (:mod:`dsv4.kernels.hopper.layout`).

**Tokens** come as an *image* for each row group, the rows of one expert that are multiplied together: ``[K/64][rows]
[64]`` bf16, K permuted as in the weights, the 16-byte chunks of a 128-byte row swizzled the way wgmma wants to read
them. A stage of the pipeline is therefore a few 1-D bulk copies: no tensor map, no gather, no address arithmetic but a
sum. GEMM 1 writes its result as such images, quantized where the scales are known ahead. Loops are compiled for several
numbers of tokens (:mod:`dsv4.kernels.hopper.main_loops`); one for up to 8 multiplies with ``mma``, which wants the same
fragments of weights as ``wgmma``.

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

from dsv4.kernels.cutedsl import compiler, ptx
from dsv4.kernels.hopper.config import MMA_TOKENS, HopperConfig
from dsv4.kernels.hopper.layout import BLOCK_BYTES
from dsv4.kernels.hopper.main_loops import MainLoops
from dsv4.kernels.hopper.tile_end import TileEnd


class GroupedGemm(MainLoops, TileEnd):
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
        expert_scale: Int64,
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
            experts, image, gs, row_slot, group_expert, group_row, num_groups, taken, row_scale, expert_scale,
            topk_weights, out, expert_bytes, k_blocks, n_tiles, limit, result_gs,
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
        expert_scale: Int64,
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
                base, full, empty, chunks, gs, row_slot, row_scale, expert_scale, topk_weights, out, n_tiles, limit,
                result_gs,
            )  # fmt: skip

    @cute.jit
    def look_up(self, tile, n_tiles, group_expert, group_row):
        """``(place in the matrix, first row of the group, number of rows, expert)`` of an output tile."""
        group = Uint32(tile) // Uint32(n_tiles)
        place = tile - Int32(group) * n_tiles
        of_group = Int64(group) * 4
        row, end = ptx.load_i32(group_row + of_group), ptx.load_i32(group_row + of_group + 4)
        return place, row, end - row, ptx.load_i32(group_expert + of_group)

    @cute.jit
    def operands(self, experts, image, expert_bytes, run_bytes, k_blocks, place, row, expert):
        """``(weight, token)``: where the weights and the tokens of a tile begin."""
        weight = experts + Int64(expert) * expert_bytes + Int64(place * self.config.warpgroups) * Int64(run_bytes)
        return weight, image + Int64(row) * Int64(k_blocks * 256)

    @cute.jit
    def tile_of_stage(self, base, stage):
        """Where four words say which tile begins in a stage: what :meth:`look_up` says of it."""
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
        stage = Int32(0)
        phase = Int32(1)
        ahead = Int32(0)
        # Of the first tile, whether there is one or not: what waits for memory waits once. It is written down before
        # the question, behind which ptxas would put the loads.
        place, row, width, expert = self.look_up(tile, n_tiles, group_expert, group_row)
        total = ptx.load_i32(num_groups) * n_tiles
        ptx.shared_store_quad(self.tile_of_stage(base, stage), (place, row, width, expert))
        if tile < total:
            # Weights depend on no other launch: the first stages are on their way before the tokens are there.
            weight, token = self.operands(experts, image, expert_bytes, run_bytes, k_blocks, place, row, expert)
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
                ptx.shared_store_quad(self.tile_of_stage(base, stage), (place, row, width, expert))
            weight, token = self.operands(experts, image, expert_bytes, run_bytes, k_blocks, place, row, expert)
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
                stage, phase = self.next_stage(stage, phase)
            ahead = Int32(0)
            tile = before + programs
            if tile < total:
                place, row, width, expert = self.look_up(tile, n_tiles, group_expert, group_row)
        cute.arch.mbarrier_wait(empty + stage, phase)
        ptx.shared_store_word(self.tile_of_stage(base, stage), Int32(-1))
        cute.arch.mbarrier_arrive(full + stage)

    @cute.jit
    def next_tile(self, base, full, stage, phase):
        """What :meth:`look_up` says of the tile that begins in a stage; -1 for the first word if none does."""
        cute.arch.mbarrier_wait(full + stage, phase)
        return [word.bitcast(Int32) for word in ptx.shared_quad(self.tile_of_stage(base, stage))]

    @cute.jit
    def consume(
        self, base, full, empty, chunks, gs, row_slot, row_scale, expert_scale, topk_weights, out, n_tiles, limit,
        result_gs,
    ):  # fmt: skip
        """A consumer warpgroup."""
        cfg = self.config
        groups, loops = cutlass.const_expr(cfg.warpgroups), cutlass.const_expr(cfg.loops)
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
        place, row, width, expert = self.next_tile(base, full, stage, phase)
        while place >= 0:
            # What the end of this tile needs is on its way meanwhile.
            slot, factor = Int32(-1), Float32(1.0)
            if tidx < width:
                if cutlass.const_expr(not cfg.gated or cfg.weighted):
                    slot = ptx.load_i32(row_slot + Int64(row + tidx) * 4)
                    if cutlass.const_expr(cfg.weighted):
                        # Whose results are images needs no slots: a row's weight stands in the place of its slot.
                        weight = Float32(0.0)
                        if slot >= 0:
                            weight = ptx.load_f32(topk_weights + Int64(slot) * 4)
                        slot = weight.bitcast(Int32)
                if cutlass.const_expr(cfg.row_scale):
                    factor = ptx.load_f32(row_scale + Int64(row + tidx) * 4)
                elif cutlass.const_expr(not cfg.gated):
                    # One load of either: a second one to the same register waits for the first, asked for or not.
                    scale = row_scale + Int64(row + tidx) * 4
                    if expert_scale != 0:
                        scale = expert_scale + Int64(expert) * 4
                    if row_scale != 0 or expert_scale != 0:
                        factor = ptx.load_f32(scale)
            at = tables + table * (cfg.tokens * 8)
            narrower = 0
            for loop in cutlass.range_constexpr(len(loops)):
                served = loops[loop]
                tokens = served[-1]
                if width > narrower and (width <= tokens or cutlass.const_expr(loop + 1 == len(loops))):
                    if cutlass.const_expr(tokens <= MMA_TOKENS):
                        result = cute.make_rmem_tensor((4,), Float32)
                        stage, phase = self.multiply_narrow(base, full, empty, chunks, stage, phase, result)
                    else:
                        stage, phase = self.multiply(base, full, empty, chunks, stage, phase, acc, a, width, served)
                        result = acc
                    if cutlass.const_expr(not cfg.gated or cfg.weighted or cfg.row_scale or cfg.requantized):
                        if tidx < width:
                            ptx.shared_store_pair(at + tidx * 8, slot, factor)
                        cute.arch.barrier(barrier_id=1, number_of_threads=128 * groups)
                    rows = place * groups + group
                    if cutlass.const_expr(cfg.requantized):
                        self.write_requantized(
                            result, tokens, narrower, row, width, rows, expert, at, tables, gs, out, n_tiles,
                            limit, result_gs,
                        )  # fmt: skip
                    else:
                        self.write(
                            result, tokens, narrower, row, width, rows, expert, at, gs, out, n_tiles, limit,
                        )  # fmt: skip
                narrower = tokens
            table ^= 1
            place, row, width, expert = self.next_tile(base, full, stage, phase)


def compile_kernel(config: HopperConfig, arch: str) -> tuple[bytes, str, str]:
    """Cubin, entry name and PTX of one configuration: no GPU is needed."""
    arguments = (*[Int64(0)] * 13, Int32(0), Int32(0), Float32(0), Int64(0), Int32(1))
    return compiler.compile_kernel(GroupedGemm(config), arguments, arch)
