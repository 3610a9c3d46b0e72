"""The main loops of the Hopper grouped GEMM: weights decoded in registers, and multiplied while the next are decoded.

A thread's fragment of 64 x 64 weights is 16 registers of two bf16, four for each ``wgmma`` of 16 of K. Two fragments
take turns: one is decoded while the tensor cores multiply with the other, and a batch of four ``wgmma`` is waited for
when its registers are wanted again.

**Several numbers of tokens.** ``wgmma`` has the number of tokens in its name, and row groups differ in theirs. ptxas
wants 16 registers, in the whole kernel, for each loop that has asynchronous products under way at its end, although one
loop runs at a time. But any number of ``wgmma`` in branches of one loop share the registers of the fragments that they
read, if each branch begins and commits its own batch. Branches cost a warp time in each 64 of K, which four warpgroups
hide and two do not. So where registers are scarce a loop has two widths or more, and where they are not the frequent
widths have loops of their own.
"""

from __future__ import annotations

import cutlass
from cutlass import BFloat16, Float32, Int32, Uint32, cute
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.utils import hopper_helpers

from dsv4.kernels.cutedsl import ptx
from dsv4.kernels.hopper.config import HopperConfig
from dsv4.kernels.hopper.layout import BLOCK_BYTES, CODE_BYTES

_LANES = 0x81C081C0


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


class MainLoops:
    """Methods of the kernel that take a tile's weights and tokens out of the pipeline and multiply them."""

    config: HopperConfig

    @cute.jit
    def next_stage(self, stage, phase):
        """The pipeline's next stage, and the phase of its barriers: each time around it is the other one."""
        stage += 1
        if stage == self.config.stages:
            stage = Int32(0)
            phase ^= 1
        return stage, phase

    @cute.jit
    def release(self, empty, stage, lane, there=True):
        """Say that a consumer warp has read a stage, if there is one: a lane for all, unless each is to for itself."""
        cute.arch.sync_warp()
        if there and (cutlass.const_expr(self.config.every_lane_releases) or lane == 0):
            cute.arch.mbarrier_arrive(empty + stage)

    @cute.jit
    def block_of_stage(self, at, thread):
        """A thread's part of the block of 128 of K at an address: two scales of each half, and four words of codes."""
        scales = ptx.shared_word(at + CODE_BYTES + thread * 4)
        return scales, [ptx.shared_quad(at + half * (CODE_BYTES // 2) + thread * 16) for half in range(2)]

    @cute.jit
    def multiply(self, base, full, empty, chunks, stage, phase, acc, a, width, widths: cutlass.Constexpr):
        """The main loop of a tile: wgmma on 64 of K while the next are decoded."""
        cfg = self.config
        groups, stages = cutlass.const_expr(cfg.warpgroups), cfg.stages
        tidx, _, _ = cute.arch.thread_idx()
        group, thread, lane = cute.arch.make_warp_uniform(tidx // 32) // 4, tidx % 128, tidx % 32
        weight_bytes = cfg.blocks * BLOCK_BYTES
        weights_at = base.toint() + stages * (cfg.blocks * cfg.tokens * 256) + group * weight_bytes
        fragments = [cute.recast_tensor(x, Uint32) for x in a]

        before = stage
        for chunk in cutlass.range(chunks, unroll=1):
            cute.arch.mbarrier_wait(full + stage, phase)
            weights = weights_at + stage * (groups * weight_bytes)
            for block in cutlass.range_constexpr(cfg.blocks):
                scales, quads = self.block_of_stage(weights + block * BLOCK_BYTES, thread)
                for half in cutlass.range_constexpr(2):
                    decode(quads[half], scales, half, fragments[half])
                    depth = (stage * cfg.blocks + block) * 2 + half
                    begun = chunk > 0 if cutlass.const_expr(block == 0 and half == 0) else True
                    self.multiply_half(base, acc, a[half], depth, begun, width, widths)
                    warpgroup.wait_group(1)
                    if cutlass.const_expr(block == 0 and half == 0):
                        # Everything of the stage before is multiplied.
                        self.release(empty, before, lane, chunk > 0)
            before = stage
            stage, phase = self.next_stage(stage, phase)
        warpgroup.wait_group(0)
        self.release(empty, before, lane)
        return stage, phase

    @cute.jit
    def multiply_half(self, base, acc, a, depth, begun, width, widths: cutlass.Constexpr):
        """Begin a batch of wgmma for 64 of K, the ``depth``-th in shared memory, of the first of ``widths`` that holds
        all rows.

        Each width begins and commits its own batch: ptxas then keeps the same registers for all, and waits for none.
        """
        if cutlass.const_expr(len(widths) == 1):
            self.begin_batch(base, acc, a, depth, begun, widths[0])
        else:
            middle = cutlass.const_expr(len(widths) // 2)
            if width <= widths[middle - 1]:
                self.multiply_half(base, acc, a, depth, begun, width, widths[:middle])
            else:
                self.multiply_half(base, acc, a, depth, begun, width, widths[middle:])

    @cute.jit
    def begin_batch(self, base, acc, a, depth, begun, tokens: cutlass.Constexpr):
        """Multiply a fragment of 64 of K with ``tokens`` tokens."""
        cfg = self.config
        tidx, _, _ = cute.arch.thread_idx()
        mma = hopper_helpers.make_trivial_tiled_mma(
            BFloat16, BFloat16, OperandMajorMode.K, OperandMajorMode.K, Float32, (1, 1, 1), (64, tokens),
            warpgroup.OperandSource.RMEM,
        )  # fmt: skip
        thread_mma = mma.get_slice(tidx % 128)
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)
        swizzle = cute.tile_to_shape(atom, (tokens, 64), order=(0, 1)).inner
        # Rows by eights, 64 of K, and those 64s one behind the other with the room of the most tokens.
        layout = cute.make_layout(
            ((8, tokens // 8), (64, 1), (1, 2 * cfg.blocks * cfg.stages)),
            stride=((64, 512), (1, 0), (0, cfg.tokens * 64)),
        )
        shared = cute.make_tensor(cute.recast_ptr(base, swizzle, dtype=BFloat16), layout)
        b = thread_mma.make_fragment_B(thread_mma.partition_B(shared))
        c = cute.make_tensor(acc.iterator, cute.make_layout(thread_mma.partition_shape_C((64, tokens))))
        warpgroup.fence()
        for k in cutlass.range_constexpr(4):
            mma.set(warpgroup.Field.ACCUMULATE, begun if cutlass.const_expr(k == 0) else True)
            cute.gemm(mma, c, a[None, None, k], b[None, None, k, depth], c)
        warpgroup.commit_group()

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
                scales, quads = self.block_of_stage(weights + block * BLOCK_BYTES, thread)
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
            self.release(empty, stage, lane)
            stage, phase = self.next_stage(stage, phase)
        return stage, phase
