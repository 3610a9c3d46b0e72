"""Grouped GEMM over NVFP4 weights for Hopper: weights decoded in registers, wgmma, every load a plain bulk copy.

**Operands are swapped.** 64 rows of weights are wgmma's A operand, held in registers, where decoding leaves them; the
tokens of one expert are its N, 8 to 256 of them.

**Weights** of one 64-row tile are one contiguous run: for each 128 of K a *block* of 4608 bytes, ``[2][128][16]``
codes and ``[128 threads][4]`` scales, exactly what each thread of a warpgroup multiplies, in its order. A thread's
16 values of a row in 64 of K are one scale group, which takes a permutation of K (:mod:`dsv4.kernels.hopper.layout`).

**Tokens** come as an *image*, row tile by row tile: ``[tile][K/64][rows][64]`` bf16, K permuted as in the weights, the
16-byte chunks of a 128-byte row swizzled the way wgmma wants to read them. A stage of the pipeline is therefore a few
1-D bulk copies: no tensor map, no gather, no address arithmetic but a sum. GEMM 1 writes its result as such an image.

**Warps.** One producer warp keeps the pipeline full; each consumer warpgroup owns 64 rows of the tile and decodes 64 of
K while the tensor cores multiply the 64 before, from two sets of operand registers.

**Schedule.** Persistent programs walk (row tile, output tile) pairs, counted on the device.
"""

from __future__ import annotations

import re
from tempfile import TemporaryDirectory

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint32, cute
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.utils import hopper_helpers

from dsv4.kernels.cutedsl import ptx
from dsv4.kernels.cutedsl.epilogue import swiglu
from dsv4.kernels.hopper.config import PRODUCER_REGISTERS, HopperConfig
from dsv4.kernels.hopper.layout import BLOCK_BYTES, CODE_BYTES

_LANES = 0x81C081C0
_UNSCALE = 512.0


def decode(quad, scales, half, fragment):
    """Sixteen code words and two scales to the A operand of a 64 x 64 tile."""
    pair = ptx.permute(scales, 0x4140 if half == 0 else 0x4342)
    pair = (pair << 4) & Uint32(0x07F007F0)
    pair = ptx.scale_bf16x2(pair, 0x7B807B80)  # 2^120
    pair = ptx.scale_bf16x2(pair, 0x7A007A00)  # 2^117
    upper, lower = ptx.permute(pair, 0x1010), ptx.permute(pair, 0x3232)
    for k in range(4):
        word = quad[k]
        fragment[4 * k] = ptx.multiply_bf16x2(word & Uint32(_LANES), upper)
        fragment[4 * k + 1] = ptx.multiply_bf16x2(ptx.rotate_right(word, 3) & Uint32(_LANES), lower)
        fragment[4 * k + 2] = ptx.multiply_bf16x2(ptx.rotate_right(word, 6) & Uint32(_LANES), upper)
        rest = (word & Uint32(0x001B001B)) * Uint32(0x4108)
        fragment[4 * k + 3] = ptx.multiply_bf16x2(rest & Uint32(_LANES), lower)


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
        tile_expert: Int64,
        num_tiles: Int64,
        row_scale: Int64,
        topk_weights: Int64,
        out: Int64,
        expert_bytes: Int64,
        k_blocks: Int32,
        n_tiles: Int32,
        limit: Float32,
        grid: Int32,
    ):
        cfg = self.config
        self.kernel(
            experts, image, gs, row_slot, tile_expert, num_tiles, row_scale, topk_weights, out, expert_bytes, k_blocks,
            n_tiles, limit,
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
        tile_expert: Int64,
        num_tiles: Int64,
        row_scale: Int64,
        topk_weights: Int64,
        out: Int64,
        expert_bytes: Int64,
        k_blocks: Int32,
        n_tiles: Int32,
        limit: Float32,
    ):
        cfg = self.config
        tokens, groups, stages = cutlass.const_expr(cfg.tokens), cutlass.const_expr(cfg.warpgroups), cfg.stages
        tidx, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(tidx // 32)

        base = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024)
        token_bytes = cfg.blocks * tokens * 256
        weight_bytes = cfg.blocks * BLOCK_BYTES
        weights_at = stages * token_bytes
        barriers_at = weights_at + stages * groups * weight_bytes
        full = cute.recast_ptr(base + barriers_at, dtype=Int64)
        empty = full + stages

        if tidx == 0:
            for i in cutlass.range_constexpr(stages):
                cute.arch.mbarrier_init(full + i, 1)
                cute.arch.mbarrier_init(empty + i, 4 * groups)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        # The next launch may begin: it waits for this one before it reads what this one writes. The tile map is older
        # than the launch before this one, and may be read already.
        cute.arch.griddepcontrol_launch_dependents()
        total = ptx.load_i32(num_tiles) * n_tiles
        chunks = k_blocks // cfg.blocks

        if warp >= 4 * groups:
            if cutlass.const_expr(cfg.producer_group):
                cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if tidx == 128 * groups:
                self.produce(base, full, empty, total, k_blocks, experts, image, tile_expert, expert_bytes, n_tiles)
        else:
            if cutlass.const_expr(cfg.producer_group):
                cute.arch.setmaxregister_increase(cfg.consumer_registers)
            self.consume(
                base, full, empty, total, chunks, gs, row_slot, tile_expert, row_scale, topk_weights, out, n_tiles,
                limit,
            )  # fmt: skip

    @cute.jit
    def produce(self, base, full, empty, total, k_blocks, experts, image, tile_expert, expert_bytes, n_tiles):
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
        if tile < total:
            # Weights depend on no other launch: the first stages are on their way before the tokens are there.
            row_tile = tile // n_tiles
            n_tile = tile - row_tile * n_tiles
            expert = ptx.load_i32(tile_expert + Int64(row_tile) * 4)
            weight = experts + Int64(expert) * expert_bytes + Int64(n_tile * groups) * Int64(run_bytes)
            token = image + Int64(row_tile) * Int64(k_blocks * (cfg.tokens * 256))
            ahead = cutlass.min(chunks, Int32(stages))
            for i in cutlass.range(ahead, unroll=1):
                cute.arch.mbarrier_arrive_and_expect_tx(full + i, cfg.stage_bytes)
                barrier = (full + i).toint()
                for g in cutlass.range_constexpr(groups):
                    ptx.bulk_load(
                        weights_at + (i * groups + g) * weight_bytes,
                        weight + Int64(run_bytes) * g + Int64(i * weight_bytes),
                        weight_bytes,
                        barrier,
                    )
            cute.arch.griddepcontrol_wait()
            for i in cutlass.range(ahead, unroll=1):
                ptx.bulk_load(
                    tokens_at + i * token_bytes, token + Int64(i * token_bytes), token_bytes, (full + i).toint()
                )
            stage = ahead
            if stage == stages:
                stage = Int32(0)
                phase = Int32(0)
        while tile < total:
            row_tile = tile // n_tiles
            n_tile = tile - row_tile * n_tiles
            expert = ptx.load_i32(tile_expert + Int64(row_tile) * 4)
            weight = experts + Int64(expert) * expert_bytes + Int64(n_tile * groups) * Int64(run_bytes)
            token = image + Int64(row_tile) * Int64(k_blocks * (cfg.tokens * 256))
            weight += Int64(ahead * weight_bytes)
            token += Int64(ahead * token_bytes)
            for _ in cutlass.range(chunks - ahead, unroll=1):
                cute.arch.mbarrier_wait(empty + stage, phase)
                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, cfg.stage_bytes)
                barrier = (full + stage).toint()
                for g in cutlass.range_constexpr(groups):
                    ptx.bulk_load(
                        weights_at + (stage * groups + g) * weight_bytes,
                        weight + Int64(run_bytes) * g,
                        weight_bytes,
                        barrier,
                    )
                ptx.bulk_load(tokens_at + stage * token_bytes, token, token_bytes, barrier)
                weight += weight_bytes
                token += token_bytes
                stage += 1
                if stage == stages:
                    stage = Int32(0)
                    phase ^= 1
            ahead = Int32(0)
            tile += programs

    @cute.jit
    def consume(
        self, base, full, empty, total, chunks, gs, row_slot, tile_expert, row_scale, topk_weights, out, n_tiles, limit
    ):  # fmt: skip
        """A consumer warpgroup."""
        cfg = self.config
        tokens, groups, stages = cutlass.const_expr(cfg.tokens), cutlass.const_expr(cfg.warpgroups), cfg.stages
        tidx, _, _ = cute.arch.thread_idx()
        program, _, _ = cute.arch.block_idx()
        programs, _, _ = cute.arch.grid_dim()
        warp = cute.arch.make_warp_uniform(tidx // 32)
        group = warp // 4
        thread = tidx % 128
        lane = tidx % 32
        token_bytes = cfg.blocks * tokens * 256
        weight_bytes = cfg.blocks * BLOCK_BYTES
        weights_at = base.toint() + stages * token_bytes + group * weight_bytes

        mma = hopper_helpers.make_trivial_tiled_mma(
            BFloat16, BFloat16, OperandMajorMode.K, OperandMajorMode.K, Float32, (1, 1, 1), (64, tokens),
            warpgroup.OperandSource.RMEM,
        )  # fmt: skip
        mma.set(warpgroup.Field.ACCUMULATE, True)
        thread_mma = mma.get_slice(thread)
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)
        layout = cute.tile_to_shape(atom, (tokens, 64, 2 * cfg.blocks * stages), order=(0, 1, 2))
        shared = cute.make_tensor(cute.recast_ptr(base, layout.inner, dtype=BFloat16), layout.outer)
        b = thread_mma.make_fragment_B(thread_mma.partition_B(shared))
        acc = cute.make_rmem_tensor(thread_mma.partition_shape_C((64, tokens)), Float32)
        a = [cute.make_rmem_tensor(thread_mma.partition_shape_A((64, 64)), BFloat16) for _ in range(2)]
        fragments = [cute.recast_tensor(x, Uint32) for x in a]

        cute.arch.griddepcontrol_wait()  # for the scales of rows
        tile = program
        stage = Int32(0)
        phase = Int32(0)
        while tile < total:
            acc.fill(0.0)
            before = Int32(-1)
            for _ in cutlass.range(chunks, unroll=1):
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
                            cute.gemm(
                                mma,
                                acc,
                                a[half][None, None, k],
                                b[None, None, k, stage * (2 * cfg.blocks) + 2 * block + half],
                                acc,
                            )
                        warpgroup.commit_group()
                        warpgroup.wait_group(1)
                        if cutlass.const_expr(block == 0 and half == 0):  # noqa: SIM102
                            # Everything of the stage before is multiplied.
                            if before >= 0 and lane == 0:
                                cute.arch.mbarrier_arrive(empty + before)
                before = stage
                stage += 1
                if stage == stages:
                    stage = Int32(0)
                    phase ^= 1
            warpgroup.wait_group(0)
            if lane == 0:
                cute.arch.mbarrier_arrive(empty + before)
            row_tile = tile // n_tiles
            rows = (tile - row_tile * n_tiles) * groups + group
            expert = ptx.load_i32(tile_expert + Int64(row_tile) * 4)
            if cutlass.const_expr(cfg.gated):
                self.write_image(
                    acc, row_tile, rows, expert, gs, row_slot, row_scale, topk_weights, out, n_tiles, limit
                )
            else:
                self.write_rows(acc, row_tile, rows, expert, gs, row_slot, row_scale, out, n_tiles)
            tile += programs

    @cute.jit
    def token_factor(self, factor, row_scale, row):
        """What decoding left out, and the token's own scale."""
        if cutlass.const_expr(self.config.row_scale):
            factor = factor * ptx.load_f32(row_scale + Int64(row) * 4)
        return factor

    @cute.jit
    def write_image(self, acc, row_tile, rows, expert, gs, row_slot, row_scale, topk_weights, out, n_tiles, limit):
        """SwiGLU of gate (the thread's upper row) and up (its lower one), as the image of the next product."""
        cfg = self.config
        tokens = cutlass.const_expr(cfg.tokens)
        tidx, _, _ = cute.arch.thread_idx()
        lane, warp = tidx % 32, (tidx // 32) % 4
        gate_gs = ptx.load_f32(gs + Int64(expert) * 8)
        up_gs = ptx.load_f32(gs + Int64(expert) * 8 + 4)
        chunk = 2 * warp + rows % 2
        depth = n_tiles * cfg.warpgroups // 2  # 64s of the result
        block = out + Int64(row_tile * depth + rows // 2) * (tokens * 128)
        for n in cutlass.range_constexpr(tokens // 8):
            values = []
            for j in cutlass.range_constexpr(2):
                row = row_tile * tokens + n * 8 + 2 * (lane % 4) + j
                factor = self.token_factor(Float32(_UNSCALE), row_scale, row)
                gate = acc[4 * n + j] * factor * gate_gs
                up = acc[4 * n + 2 + j] * factor * up_gs
                value = swiglu(gate, up, limit if cfg.limited else None)
                if cutlass.const_expr(cfg.weighted):
                    slot = ptx.load_i32(row_slot + Int64(row) * 4)
                    weight = Float32(0.0)
                    if slot >= 0:
                        weight = ptx.load_f32(topk_weights + Int64(slot) * 4)
                    value = value * weight
                values.append(value)
            word = ptx.transpose_8x8(ptx.pack_bf16x2(values[0], values[1]))
            row = n * 8 + lane // 4
            ptx.store_b32(block + Int64(row * 128 + ((chunk ^ (row % 8)) * 16) + (lane % 4) * 4), word)

    @cute.jit
    def write_rows(self, acc, row_tile, rows, expert, gs, row_slot, row_scale, out, n_tiles):
        """Results at their slots, ``[S, N]``."""
        cfg = self.config
        tokens = cutlass.const_expr(cfg.tokens)
        tidx, _, _ = cute.arch.thread_idx()
        lane, warp = tidx % 32, (tidx // 32) % 4
        width = n_tiles * (cfg.warpgroups * 64)
        column = rows * 64 + warp * 16
        expert_gs = ptx.load_f32(gs + Int64(expert) * 4) * _UNSCALE
        for n in cutlass.range_constexpr(tokens // 8):
            if cutlass.const_expr(cfg.wide_out):
                for j in cutlass.range_constexpr(2):
                    row = row_tile * tokens + n * 8 + 2 * (lane % 4) + j
                    slot = ptx.load_i32(row_slot + Int64(row) * 4)
                    if slot >= 0:
                        factor = self.token_factor(expert_gs, row_scale, row)
                        at = out + (Int64(slot) * Int64(width) + Int64(column + lane // 4)) * 4
                        ptx.store_f32(at, acc[4 * n + j] * factor)
                        ptx.store_f32(at + 32, acc[4 * n + 2 + j] * factor)
            else:
                row = row_tile * tokens + n * 8 + 2 * (lane % 4)
                first = self.token_factor(expert_gs, row_scale, row)
                second = self.token_factor(expert_gs, row_scale, row + 1)
                upper = ptx.transpose_8x8(ptx.pack_bf16x2(acc[4 * n] * first, acc[4 * n + 1] * second))
                lower = ptx.transpose_8x8(ptx.pack_bf16x2(acc[4 * n + 2] * first, acc[4 * n + 3] * second))
                slot = ptx.load_i32(row_slot + Int64(row_tile * tokens + n * 8 + lane // 4) * 4)
                if slot >= 0:
                    at = out + (Int64(slot) * Int64(width) + Int64(column + 2 * (lane % 4))) * 2
                    ptx.store_b32(at, upper)
                    ptx.store_b32(at + 16, lower)


def compile_kernel(config: HopperConfig) -> tuple[bytes, str]:
    """Cubin and entry name of one configuration: no GPU is needed."""
    with TemporaryDirectory() as folder:
        compiled = cute.compile(
            GroupedGemm(config), *[Int64(0)] * 10, Int32(0), Int32(0), Float32(0), Int32(1),
            options=f"--gpu-arch sm_90a --keep-ptx --keep-cubin --dump-dir {folder}",
        )  # fmt: skip
        entry = re.search(r"\.entry (\w+)\(", str(compiled.artifacts.PTX))
        assert entry is not None
        return compiled.artifacts.CUBIN, entry[1]
