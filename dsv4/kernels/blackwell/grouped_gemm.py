"""Grouped NVFP4 GEMM for Blackwell: block-scaled tcgen05 instructions over TMA, fp32 accumulators in tensor memory.

Rows of A are tensor memory's lanes, columns of B its columns. Both operands are K-major codes as they come, two to a
byte; scales are the swizzled tiles of :mod:`dsv4.ops.layouts`, 512 bytes for 128 rows by 64 of K.

**Rows are not padded.** The tile of an expert's last rows loads rows of the next expert too, multiplies them and does
not store them: a row of A only ever reaches its own row of the result. Only tiles of scales begin at each expert.

**Warps.** Four of epilogue, one that issues tensor-core instructions and copies of scales to tensor memory, one that
issues TMA loads. Three rings of barriers join them: stages (full, empty), accumulators (full, empty).

**Two CTAs** (tiles of 256 rows) share a tile: each loads its 128 rows of A, half of B's columns, and all scales of B;
the first one issues instructions for both, and its barriers count both CTAs' bytes.

**Schedule.** Persistent programs walk the tiles of :mod:`dsv4.kernels.cutedsl.schedule`.
"""

from __future__ import annotations

import re
from tempfile import TemporaryDirectory

import cutlass
from cutlass import Float4E2M1FN, Float8E4M3FN, Float32, Int32, Int64, Uint8, Uint16, Uint32, cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.utils import blackwell_helpers, blockscaled_layout

from dsv4.errors import ConfigError
from dsv4.kernels.blackwell.config import (
    EPILOGUE_WARPS,
    SUBTILE,
    THREADS,
    TMEM_COLUMNS,
    BlackwellConfig,
)
from dsv4.kernels.cutedsl import ptx, schedule
from dsv4.kernels.cutedsl.epilogue import requantize, swiglu

_MMA_WARP, _LOAD_WARP = EPILOGUE_WARPS, EPILOGUE_WARPS + 1
_SCALES = 256  # uint16 of a 128 x 4 tile of scales


class GroupedGemm:
    """The kernel of one configuration; called under ``cute.compile``."""

    wide_stores = True
    """Whether a thread stores 32 bytes at once, which takes sm_100."""

    def __init__(self, config: BlackwellConfig):
        problem = config.problem()
        if problem:
            raise ConfigError(f"{config}: {problem}")
        self.config = config
        # Where things stand in dynamic shared memory.
        self.b_at = config.stages * config.a_bytes
        self.a_scales_at = self.b_at + config.stages * config.b_bytes
        self.b_scales_at = self.a_scales_at + config.stages * config.a_scale_bytes
        self.barriers_at = self.b_scales_at + config.stages * config.b_scale_bytes
        self.holder_at = self.barriers_at + 8 * config.barriers
        self.table_at = self.holder_at + 16

    def load_op(self):
        """The TMA instruction: of a pair, every load is counted by the first CTA's barrier."""
        return cpasync.CopyBulkTensorTileG2SOp(tcgen05.CtaGroup.TWO if self.config.ctas == 2 else tcgen05.CtaGroup.ONE)

    def code_box(self, rows):
        """Shared layout of codes, ``(rows, bytes of a stage, expert, stage)``: a row is one line of the swizzle."""
        line = self.config.k // 2
        swizzle = cute.make_swizzle({128: 3, 64: 2, 32: 1}[line], 4, 3)
        outer = cute.make_layout(
            (rows, line, 1, self.config.stages), stride=(line, 1, rows * line, rows * line)
        )  # fmt: skip
        return cute.make_composed_layout(swizzle, 0, outer)

    def scale_box(self, tiles):
        """Shared layout of scales, ``(uint16 of a tile, K tiles, row tiles, expert, stage)``."""
        steps = self.config.steps
        size = tiles * steps * _SCALES
        return cute.make_layout(
            (_SCALES, steps, tiles, 1, self.config.stages), stride=(1, _SCALES, steps * _SCALES, size, size)
        )

    def load_atoms(self):
        """``(atom, tensor)`` of A, B, and their scales.

        The launch replaces the tensor maps by its own, so that the sizes here mean nothing: two tiles each way.
        """
        cfg, op = self.config, self.load_op()
        line = cfg.k // 2
        anywhere = cute.make_ptr(Uint8, Int64(0), cute.AddressSpace.gmem, assumed_align=16)
        results = []
        for rows in (128, cfg.b_rows):
            whole = cute.make_layout((2 * rows, 2 * line, 2), stride=(2 * line, 1, 4 * rows * line))
            box = cute.slice_(self.code_box(rows), (None, None, None, 0))
            results.append(cpasync.make_tiled_tma_atom(op, cute.make_tensor(anywhere, whole), box, (rows, line, 1)))
        scales = cute.recast_ptr(anywhere, dtype=Uint16)
        for tiles in (1, cfg.b_scale_tiles):
            whole = cute.make_layout(
                (_SCALES, 2 * cfg.steps, 2 * tiles, 2),
                stride=(1, _SCALES, 2 * cfg.steps * _SCALES, 4 * tiles * cfg.steps * _SCALES),
            )
            box = cute.slice_(self.scale_box(tiles), (None, None, None, None, 0))
            results.append(
                cpasync.make_tiled_tma_atom(op, cute.make_tensor(scales, whole), box, (_SCALES, cfg.steps, tiles, 1))
            )
        return results

    @cute.jit
    def __call__(
        self,
        ends: Int64,
        gs_a: Int64,
        gs_b: Int64,
        row_scale: Int64,
        row_slot: Int64,
        topk_weights: Int64,
        out: Int64,
        out_scales: Int64,
        out_gs: Int64,
        num_experts: Int32,
        columns: Int32,
        k: Int32,
        gs_b_width: Int32,
        limit: Float32,
        grid: Int32,
    ):
        cfg = self.config
        (a, a_tensor), (b, b_tensor), (sfa, sfa_tensor), (sfb, sfb_tensor) = self.load_atoms()
        self.kernel(
            a, a_tensor, b, b_tensor, sfa, sfa_tensor, sfb, sfb_tensor, ends, gs_a, gs_b, row_scale, row_slot,
            topk_weights, out, out_scales, out_gs, num_experts, columns, k, gs_b_width, limit,
        ).launch(
            grid=(grid, 1, 1), block=(THREADS, 1, 1), cluster=(cfg.ctas, 1, 1), smem=cfg.shared_bytes,
            min_blocks_per_mp=1, preferred_smem_carveout=100,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        a: cute.CopyAtom,
        a_tensor: cute.Tensor,
        b: cute.CopyAtom,
        b_tensor: cute.Tensor,
        sfa: cute.CopyAtom,
        sfa_tensor: cute.Tensor,
        sfb: cute.CopyAtom,
        sfb_tensor: cute.Tensor,
        ends: Int64,
        gs_a: Int64,
        gs_b: Int64,
        row_scale: Int64,
        row_slot: Int64,
        topk_weights: Int64,
        out: Int64,
        out_scales: Int64,
        out_gs: Int64,
        num_experts: Int32,
        columns: Int32,
        k: Int32,
        gs_b_width: Int32,
        limit: Float32,
    ):
        cfg = self.config
        tidx, _, _ = cute.arch.thread_idx()
        program, _, _ = cute.arch.block_idx()
        programs, _, _ = cute.arch.grid_dim()
        warp = cute.arch.make_warp_uniform(tidx // 32)
        rank = program % cfg.ctas
        first = program // cfg.ctas
        step = programs // cfg.ctas

        base = cute.arch.get_dyn_smem(Uint8, alignment=1024)
        full = cute.recast_ptr(base + self.barriers_at, dtype=Int64)
        empty = full + cfg.stages
        acc_full = empty + cfg.stages
        acc_empty = acc_full + 2
        table = cute.make_tensor(cute.recast_ptr(base + self.table_at, dtype=Int32), schedule.table_layout())

        if tidx == 0:
            for i in cutlass.range_constexpr(cfg.stages):
                cute.arch.mbarrier_init(full + i, 1)
                cute.arch.mbarrier_init(empty + i, 1)
            for i in cutlass.range_constexpr(2):
                cute.arch.mbarrier_init(acc_full + i, 1)
                cute.arch.mbarrier_init(acc_empty + i, 32 * EPILOGUE_WARPS * cfg.ctas)
        cute.arch.mbarrier_init_fence()
        if warp == 0:
            self.fill_table(table, ends, num_experts)
        if warp == _LOAD_WARP:
            for atom in (a, b, sfa, sfb):
                cpasync.prefetch_descriptor(atom)
        if warp == _MMA_WARP:
            self.allocate(base)
        self.meet()
        tmem = self.tensor_memory(base)

        column_tiles = (columns + (cfg.n - 1)) // cfg.n
        chunks = (k + (cfg.k - 1)) // cfg.k
        total = table[schedule.MAX_EXPERTS, schedule.TILES] * column_tiles

        if warp == _LOAD_WARP:
            self.load(
                base, full, empty, table, a, a_tensor, b, b_tensor, sfa, sfa_tensor, sfb, sfb_tensor, first, step, rank,
                total, column_tiles, chunks,
            )  # fmt: skip
        elif warp == _MMA_WARP:
            if rank == 0:
                self.multiply(
                    base, full, empty, acc_full, acc_empty, table, tmem, first, step, total, column_tiles, chunks
                )
        else:
            self.store(
                base, acc_full, acc_empty, table, tmem, gs_a, gs_b, row_scale, row_slot, topk_weights, out, out_scales,
                out_gs, columns, gs_b_width, limit, first, step, rank, total, column_tiles,
            )  # fmt: skip
        # No CTA ends while its peer may still signal it, and nobody reads tensor memory any more.
        self.meet()
        if warp == _MMA_WARP:
            self.release(tmem)

    @cute.jit
    def fill_table(self, table, ends, num_experts):
        """The first warp: every lane sums its own experts, then those before them."""
        lane = cute.arch.lane_idx()
        pointer = cute.make_ptr(Int32, ends, cute.AddressSpace.gmem, assumed_align=4)
        chunk = schedule.chunk_ends(cute.make_tensor(pointer, cute.make_layout(1)), num_experts, lane)
        own_tiles = schedule.chunk_tiles(chunk, self.config.m)
        own_scales = schedule.chunk_tiles(chunk, 128)
        tiles, scales = own_tiles, own_scales
        for shift in cutlass.range_constexpr(5):
            tiles_before = cute.arch.shuffle_sync_up(tiles, 1 << shift, mask_and_clamp=0)
            scales_before = cute.arch.shuffle_sync_up(scales, 1 << shift, mask_and_clamp=0)
            if lane >= (1 << shift):
                tiles += tiles_before
                scales += scales_before
        schedule.fill_chunk(table, chunk, lane, tiles - own_tiles, scales - own_scales, self.config.m)

    # Tensor memory.

    @cute.jit
    def meet(self):
        """All threads of the tile's CTAs."""
        if cutlass.const_expr(self.config.ctas == 2):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    def allocate(self, base):
        """One warp: all of tensor memory."""
        two = self.config.ctas == 2
        cute.arch.alloc_tmem(TMEM_COLUMNS, cute.recast_ptr(base + self.holder_at, dtype=Int32), is_two_cta=two)
        cute.arch.relinquish_tmem_alloc_permit(is_two_cta=two)
        ptx.tmem_fence_before()

    def tensor_memory(self, base):
        """What :meth:`allocate` got, as a pointer to fp32 columns."""
        ptx.tmem_fence_after()
        holder = cute.recast_ptr(base + self.holder_at, dtype=Int32)
        return cute.arch.retrieve_tmem_ptr(Float32, 16, holder)

    def release(self, tmem):
        """The warp that allocated."""
        cute.arch.dealloc_tmem(tmem, TMEM_COLUMNS, is_two_cta=self.config.ctas == 2)

    # Loads.

    @cute.jit
    def load(
        self, base, full, empty, table, a, a_tensor, b, b_tensor, sfa, sfa_tensor, sfb, sfb_tensor, first, step, rank,
        total, column_tiles, chunks,
    ):  # fmt: skip
        """The load warp: boxes for one stage after the other, as the tensor cores free them."""
        cfg = self.config
        line = cfg.k // 2
        a_codes, b_codes = self.code_box(128), self.code_box(cfg.b_rows)
        shared = (
            cute.make_tensor(cute.recast_ptr(base, a_codes.inner, dtype=Uint8), a_codes.outer),
            cute.make_tensor(cute.recast_ptr(base + self.b_at, b_codes.inner, dtype=Uint8), b_codes.outer),
            cute.make_tensor(cute.recast_ptr(base + self.a_scales_at, dtype=Uint16), self.scale_box(1)),
            cute.make_tensor(cute.recast_ptr(base + self.b_scales_at, dtype=Uint16), self.scale_box(cfg.b_scale_tiles)),
        )
        shapes = (
            (128, line, 1),
            (cfg.b_rows, line, 1),
            (_SCALES, cfg.steps, 1, 1),
            (_SCALES, cfg.steps, cfg.b_scale_tiles, 1),
        )
        tile = first
        stage = Int32(0)
        phase = Int32(1)
        while tile < total:
            expert, row_tile, column_tile = schedule.locate(table, column_tiles, tile)
            row = table[expert, schedule.STARTS] + row_tile * cfg.m + rank * 128
            row_scales = table[expert, schedule.SCALES] + row_tile * cfg.ctas + rank
            column = column_tile * cfg.n
            for chunk in cutlass.range(chunks, unroll=1):
                cute.arch.mbarrier_wait(empty + stage, phase)
                if rank == 0:
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(full + stage, cfg.stage_bytes * cfg.ctas)
                places = (
                    (row, chunk * line, 0),
                    (column + rank * cfg.b_rows, chunk * line, expert),
                    (0, chunk * cfg.steps, row_scales, 0),
                    (0, chunk * cfg.steps, column // 128, expert),
                )
                for i in cutlass.range_constexpr(4):
                    atom = (a, b, sfa, sfb)[i]
                    whole = (a_tensor, b_tensor, sfa_tensor, sfb_tensor)[i]
                    modes = len(shapes[i])
                    box = cute.local_tile(cute.domain_offset(places[i], whole), shapes[i], (0,) * modes)
                    target, source = cpasync.tma_partition(
                        atom,
                        0,
                        cute.make_layout(1),
                        cute.group_modes(shared[i], 0, modes),
                        cute.group_modes(box, 0, modes),
                    )
                    cute.copy(atom, source, target[(None, stage)], tma_bar_ptr=full + stage)
                stage += 1
                if stage == cfg.stages:
                    stage = Int32(0)
                    phase ^= 1
            tile += step
        # The last signals must find this CTA's barriers still there.
        for _ in cutlass.range(cfg.stages, unroll=1):
            cute.arch.mbarrier_wait(empty + stage, phase)
            stage += 1
            if stage == cfg.stages:
                stage = Int32(0)
                phase ^= 1

    # Products.

    def tiled_mma(self):
        """Codes from shared memory, scales and accumulators in tensor memory."""
        cfg = self.config
        group = tcgen05.CtaGroup.TWO if cfg.ctas == 2 else tcgen05.CtaGroup.ONE
        return blackwell_helpers.make_blockscaled_trivial_tiled_mma(
            Float4E2M1FN, Float4E2M1FN, OperandMajorMode.K, OperandMajorMode.K, Float8E4M3FN, 16, group, (cfg.m, cfg.n)
        )

    def scale_copy(self, shared, tensor):
        """The copy of a stage's scales to tensor memory: ``(copy, its sources by stage, its target)``."""
        group = tcgen05.CtaGroup.TWO if self.config.ctas == 2 else tcgen05.CtaGroup.ONE
        source, target = cute.filter_zeros(shared), cute.filter_zeros(tensor)
        atom = cute.make_copy_atom(tcgen05.Cp4x32x128bOp(group), Float8E4M3FN)
        copy = tcgen05.make_s2t_copy(atom, target)
        part = copy.get_slice(0)
        return copy, tcgen05.get_s2t_smem_desc_tensor(copy, part.partition_S(source)), part.partition_D(target)

    @cute.jit
    def multiply(self, base, full, empty, acc_full, acc_empty, table, tmem, first, step, total, column_tiles, chunks):
        """The warp that issues: scales to tensor memory, then one instruction for each 64 of K."""
        cfg = self.config
        mma = self.tiled_mma()
        group = tcgen05.CtaGroup.TWO if cfg.ctas == 2 else tcgen05.CtaGroup.ONE
        mask = 3 if cfg.ctas == 2 else None
        tiler = (cfg.m, cfg.n, cfg.k)
        a_layout = blackwell_helpers.make_smem_layout_a(mma, tiler, Float4E2M1FN, cfg.stages)
        b_layout = blackwell_helpers.make_smem_layout_b(mma, tiler, Float4E2M1FN, cfg.stages)
        sfa_layout = blockscaled_layout.make_smem_layout_sfa(mma, tiler, 16, cfg.stages)
        sfb_layout = blockscaled_layout.make_smem_layout_sfb(mma, tiler, 16, cfg.stages)
        a = mma.make_fragment_A(
            cute.make_tensor(cute.recast_ptr(base, a_layout.inner, dtype=Float4E2M1FN), a_layout.outer)
        )
        b = mma.make_fragment_B(
            cute.make_tensor(cute.recast_ptr(base + self.b_at, b_layout.inner, dtype=Float4E2M1FN), b_layout.outer)
        )
        shared_sfa = cute.make_tensor(cute.recast_ptr(base + self.a_scales_at, dtype=Float8E4M3FN), sfa_layout)
        shared_sfb = cute.make_tensor(cute.recast_ptr(base + self.b_scales_at, dtype=Float8E4M3FN), sfb_layout)
        acc_layout = mma.make_fragment_C(mma.partition_shape_C((cfg.m, cfg.n))).layout
        one_stage = (None, None, None, 0)
        sfa_tmem = blockscaled_layout.make_tmem_layout_sfa(mma, tiler, 16, cute.slice_(sfa_layout, one_stage))
        sfb_tmem = blockscaled_layout.make_tmem_layout_sfb(mma, tiler, 16, cute.slice_(sfb_layout, one_stage))
        sfb_column = cfg.scale_base + cfg.a_scale_columns
        sfa = cute.make_tensor(cute.recast_ptr(tmem + cfg.scale_base, dtype=Float8E4M3FN), sfa_tmem)
        sfb = cute.make_tensor(cute.recast_ptr(tmem + sfb_column, dtype=Float8E4M3FN), sfb_tmem)
        copy_a, from_a, to_a = self.scale_copy(shared_sfa, sfa)
        copy_b, from_b, to_b = self.scale_copy(shared_sfb, sfb)

        tile = first
        stage = Int32(0)
        phase = Int32(0)
        buffer = Int32(0)
        acc_phase = Int32(1)
        while tile < total:
            _, _, column_tile = schedule.locate(table, column_tiles, tile)
            # One barrier alone where accumulators share columns: the next product waits for the last one's subtiles.
            slot = Int32(0) if cutlass.const_expr(cfg.overlapped) else buffer
            cute.arch.mbarrier_wait(acc_empty + slot, acc_phase)
            ptx.tmem_fence_after()
            acc = cute.make_tensor(tmem + buffer * cfg.accumulator_stride, acc_layout)
            # A tile of 64 or 192 columns may begin in the middle of a tile of scales: two columns of tensor memory on.
            shift = column_tile * cfg.n % 128 // 32
            sfb_tile = cute.make_tensor(cute.recast_ptr(tmem + (sfb_column + shift), dtype=Float8E4M3FN), sfb_tmem)
            mma.set(tcgen05.Field.ACCUMULATE, False)
            for _ in cutlass.range(chunks, unroll=1):
                cute.arch.mbarrier_wait(full + stage, phase)
                ptx.tmem_fence_after()
                cute.copy(copy_a, from_a[(None, None, None, None, stage)], to_a)
                cute.copy(copy_b, from_b[(None, None, None, None, stage)], to_b)
                for i in cutlass.range_constexpr(cfg.steps):
                    place = (None, None, i)
                    cute.gemm(
                        mma,
                        acc,
                        [a[(None, None, i, stage)], sfa[place]],
                        [b[(None, None, i, stage)], sfb_tile[place]],
                        acc,
                    )
                    mma.set(tcgen05.Field.ACCUMULATE, True)
                with cute.arch.elect_one():
                    tcgen05.commit(empty + stage, mask, group)
                stage += 1
                if stage == cfg.stages:
                    stage = Int32(0)
                    phase ^= 1
            with cute.arch.elect_one():
                tcgen05.commit(acc_full + slot, mask, group)
            buffer ^= 1
            acc_phase ^= 1 if cutlass.const_expr(cfg.overlapped) else buffer ^ 1
            tile += step

    # Results.

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
            scale_columns = (columns // 32 + 3) // 4 * 4
            ptx.store_b8(out_scales + Int64(schedule.scale_offset(scale_row, column // 32, scale_columns)), scale)
        elif cfg.interleaved:
            at = out + (Int64(target) * Int64(columns) + Int64(column)) * 2
            for i in range(0, len(words), 2):
                ptx.store_words(at + 8 * i, words[i : i + 2])
        else:
            at = Int64(target) * Int64(columns // 2) + Int64(column // 2)
            self.write_words(out + at * 2, words)


def sample_arguments(config: BlackwellConfig) -> tuple:
    """What ``cute.compile`` takes the types of a launch from."""
    return (*[Int64(0)] * 9, *[Int32(0)] * 4, Float32(0), Int32(config.ctas))


def compile_kernel(config: BlackwellConfig, arch: str) -> tuple[bytes, str]:
    """Cubin and entry name of one configuration: no GPU is needed."""
    return compile_class(GroupedGemm(config), arch)


def compile_class(kernel: GroupedGemm, arch: str) -> tuple[bytes, str]:
    """The same of an instance."""
    with TemporaryDirectory() as folder:
        options = f"--gpu-arch {arch} --keep-ptx --keep-cubin --dump-dir {folder}"
        compiled = cute.compile(kernel, *sample_arguments(kernel.config), options=options)
        entry = re.search(r"\.entry (\w+)\(", str(compiled.artifacts.PTX))
        assert entry is not None
        return compiled.artifacts.CUBIN, entry[1]
