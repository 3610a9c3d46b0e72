"""Grouped NVFP4 GEMM for Blackwell: block-scaled tcgen05 instructions over TMA, fp32 accumulators in tensor memory.

Rows of A are tensor memory's lanes, columns of B its columns. Both operands are K-major codes as they come, two to a
byte; scales are the swizzled tiles of :mod:`dsv4.ops.layouts`, 512 bytes for 128 rows by 64 of K.

**Rows are not padded.** The tile of an expert's last rows loads rows of the next expert too, multiplies them and does
not store them: a row of A only ever reaches its own row of the result. Only tiles of scales begin at each expert.

**Warps.** Four of epilogue, one that issues tensor-core instructions and copies of scales to tensor memory, one that
issues TMA loads. Two rings of barriers, each full and empty, join them: of stages and of accumulators.

**Two CTAs** (tiles of 256 rows) share a tile: each loads its 128 rows of A, half of B's columns, and all scales of B;
the first one issues instructions for both, and its barriers count both CTAs' bytes.

**Schedule.** Persistent programs walk the tiles of :mod:`dsv4.kernels.cutedsl.schedule`.
"""

from __future__ import annotations

import cutlass
from cutlass import Float4E2M1FN, Float8E4M3FN, Float32, Int32, Int64, Uint8, cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.utils import blackwell_helpers, blockscaled_layout

from dsv4.errors import ConfigError
from dsv4.kernels.blackwell.config import EPILOGUE_WARPS, THREADS, TMEM_COLUMNS, BlackwellConfig
from dsv4.kernels.blackwell.loads import Loads
from dsv4.kernels.blackwell.results import Results
from dsv4.kernels.cutedsl import compiler, ptx, schedule

_MMA_WARP, _LOAD_WARP = EPILOGUE_WARPS, EPILOGUE_WARPS + 1


class GroupedGemm(Loads, Results):
    """The kernel of one configuration; called under ``cute.compile``."""

    def __init__(self, config: BlackwellConfig):
        problem = config.problem()
        if problem:
            raise ConfigError(f"{config}: {problem}")
        super().__init__(config)

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
        chunk = schedule.chunk_ends(schedule.ends_at(ends, num_experts), num_experts, lane)
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


def sample_arguments(config: BlackwellConfig) -> tuple:
    """What ``cute.compile`` takes the types of a launch from."""
    return (*[Int64(0)] * 9, *[Int32(0)] * 4, Float32(0), Int32(config.ctas))


def compile_kernel(config: BlackwellConfig, arch: str) -> tuple[bytes, str]:
    """Cubin and entry name of one configuration: no GPU is needed."""
    return compile_class(GroupedGemm(config), arch)[:2]


def compile_class(kernel: GroupedGemm, arch: str) -> tuple[bytes, str, str]:
    """Cubin, entry name and PTX of an instance."""
    return compiler.compile_kernel(kernel, sample_arguments(kernel.config), arch)
