"""The load warp of :mod:`dsv4.kernels.blackwell.grouped_gemm`: TMA boxes of codes and scales, stage after stage."""

from __future__ import annotations

import cutlass
from cutlass import Int32, Int64, Uint8, Uint16, cute
from cutlass.cute.nvgpu import cpasync, tcgen05

from dsv4.kernels.blackwell.config import BlackwellConfig
from dsv4.kernels.cutedsl import schedule

_SCALES = 256  # uint16 of a 128 x 4 tile of scales


class Loads:
    """Of one configuration; where things stand in dynamic shared memory."""

    def __init__(self, config: BlackwellConfig):
        self.config = config
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
