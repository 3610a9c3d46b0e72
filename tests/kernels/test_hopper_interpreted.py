"""The Hopper backend's stages on a CPU, by Triton's interpreter: images bit for bit those of plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dsv4.kernels.hopper.few_slots import route_and_scatter
from dsv4.kernels.hopper.layout import to_image
from dsv4.kernels.hopper.stages import gather_rows, image_amax, quantize_image, scatter_rows
from dsv4.kernels.triton.grouped_gemm import TileMap
from dsv4.kernels.triton.routing import RowGroups
from dsv4.kernels.triton.stages import ScaleSource
from dsv4.nvfp4 import block_codes, decode_e2m1, finite_row_amax, global_scale
from dsv4.ops.routing import local_expert_ids
from kernels.interpreter import mend, run
from kernels.row_groups import Expected, assert_filled, expected, filled, poisoned_buffers
from kernels.triton_blocks import DATA, TERMS, check_quantized

POISON = 0x2AAA  # of bf16, a number like any other
EXPERTS = 4


def test_images():
    """Groups of one tile and of several, whole and cut short, K whose blocks are a power of two in number and not, an
    idle expert and dropped slots: see the functions below."""
    run(__file__)


@dataclass(frozen=True)
class Case:
    """A routing of ``T`` tokens and ``top_k`` choices, its tables, and rows of K values."""

    unit: int
    k: int
    top_k: int
    local: Tensor
    want: Expected
    x: Tensor
    tiles: TileMap
    groups: RowGroups

    @property
    def rows(self) -> int:
        return len(self.want.row_slot)

    def row_scale(self) -> Tensor:
        return torch.full((self.rows,), -7.0)

    def image(self, of_slots: Tensor | None = None) -> Tensor:
        """Bits (int16) of an image: bf16 ``[S, K]`` in the rows of the slots, poison elsewhere and after the last."""
        plain = torch.full((self.rows, self.k), POISON, dtype=torch.int16)
        if of_slots is not None:
            slots = torch.tensor(self.want.row_slot)
            plain[slots >= 0] = of_slots.view(torch.int16)[slots[slots >= 0]]
        after = torch.full((self.k,), POISON, dtype=torch.int16)
        return torch.cat([*(to_image(plain[g.start : g.stop], len(g)).flatten() for g in self.want.groups()), after])

    def scales(self, of_slots: Tensor) -> Tensor:
        """What ``row_scale`` holds in the end: fp32 ``[S]`` at the rows of the slots, and poison."""
        slots = torch.tensor(self.want.row_slot)
        return torch.where(slots >= 0, of_slots[slots.clamp(min=0)], -7.0)

    def of_slots(self, x: Tensor) -> Tensor:
        """Each slot's token, bit for bit."""
        return x.view(torch.int16).repeat_interleave(self.top_k, 0).view(torch.bfloat16)


def hard_rows(rows: int, k: int) -> Tensor:
    """bf16 rows of very different size, with zeros, subnormals, ties, NaN and Inf among them."""
    generator = torch.Generator().manual_seed(rows + k)
    x = torch.randn(rows, k, generator=generator)
    x *= torch.exp2(torch.randint(-60, 60, (rows, 1), generator=generator).float())
    x[1::7] = torch.randint(-12, 13, x[1::7].shape, generator=generator) * 0.25  # many ties
    x = x.bfloat16()
    x[2::9] = 0
    x[5, 3], x[6, 0], x[7, k - 1] = torch.nan, torch.inf, -torch.inf
    x[8, :16] = 1e-38
    return x


def cases() -> list[Case]:
    found = []
    for unit, most, tokens, top_k, k in ((8, 16, 16, 2, 192), (16, 16, 20, 1, 64)):
        generator = torch.Generator().manual_seed(tokens)
        local = torch.randint(-1, EXPERTS, (tokens * top_k,), generator=generator, dtype=torch.int32)
        local[local == 2] = 1
        local[::2] = 1  # an idle expert and a busy one
        want = expected(local.tolist(), EXPERTS, unit, most)
        assert (local < 0).any()
        assert -1 in want.row_slot
        assert most == unit or len({len(g) for g in want.groups()}) > 1
        found.append(Case(unit, k, top_k, local, want, hard_rows(tokens, k), *filled(want, most)))
    return found


def quantized(x: Tensor, gs: Tensor) -> Tensor:
    """``e2m1 * sf`` of rows ``[R, K]`` under ``gs [R]``, bf16."""
    codes, sf = block_codes(x, gs[:, None])
    return (decode_e2m1(codes) * sf.float()[..., None]).flatten(1).bfloat16()


def assert_same(image: Tensor, want: Tensor) -> None:
    """Of int16 that is bf16: a NaN is any NaN, and zeros of a block without codes may keep their signs."""
    got, numbers = image.view(torch.bfloat16), want.view(torch.bfloat16)
    same = (got == numbers) | (got.isnan() & numbers.isnan())
    assert bool(same.all()), (same.logical_not().nonzero(), got[~same], numbers[~same])


def sources(case: Case, x: Tensor) -> dict[ScaleSource, tuple[Tensor | None, Tensor]]:
    """What each source reads, and the global scale of each slot, from rows ``[S, K]``."""
    slots = x.shape[0]
    of_expert = torch.linspace(0.001, 0.3, EXPERTS)
    amax = finite_row_amax(x)[case.local >= 0].amax().reshape(1)
    return {
        ScaleSource.NONE: (None, torch.full((slots,), -7.0)),
        ScaleSource.ROW: (None, global_scale(finite_row_amax(x))),
        ScaleSource.GIVEN: (torch.tensor([0.0123]), torch.full((slots,), 0.0123)),
        ScaleSource.BATCH: (amax, global_scale(amax).expand(slots)),
        ScaleSource.EXPERT: (of_expert, of_expert[case.local.clamp(min=0).long()]),
    }


def check_scatter() -> None:
    """Every source, with and without input weights: each slot's row is its token, weighted, rounded, quantized; its
    scale stands beside it; rows that no slot fills, and what is behind the last, keep what they hold."""
    for case in cases():
        tokens = case.x.shape[0]
        for weights in (None, torch.rand(tokens, generator=torch.Generator().manual_seed(1)) + 0.3):
            x = case.x if weights is None else (case.x.float() * weights[:, None]).bfloat16()
            of_slots = case.of_slots(x)
            for source, (scale, gs) in sources(case, of_slots).items():
                values = of_slots if source is ScaleSource.NONE else quantized(of_slots, gs)
                image = case.image()
                row_scale = case.row_scale()
                scatter_rows(
                    case.x, image.view(torch.bfloat16), row_scale, case.groups, case.local, case.unit, case.top_k,
                    source=source, scale=scale, weights=weights,
                )  # fmt: skip
                if source is ScaleSource.NONE and weights is None:
                    assert torch.equal(image, case.image(values))
                assert_same(image, case.image(values))
                assert torch.equal(row_scale, case.scales(gs))


def check_together() -> None:
    """Routing and scatter in one launch: every table is the loop's, and rows are those of :func:`scatter_rows`. With
    one slot, as many as there may be, all of one expert and all dropped; a first expert's id, a map, a limit on tokens;
    row tiles of both sizes; compared by 16, 32 and 64."""
    shapes = (
        (1, 1, 3, 8, 8, 64), (1, 6, 8, 8, 16, 192), (5, 2, 3, 16, 32, 64), (7, 1, 2, 8, 16, 64), (4, 6, 5, 8, 24, 320)
    )  # fmt: skip
    for seed, (tokens, top_k, experts, unit, most, k) in enumerate((*shapes, (32, 2, 3, 8, 24, 64))):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(-2, experts + 4, (tokens, top_k), generator=generator)
        mapping = torch.randperm(experts + 2, generator=generator).to(torch.int32)
        mapping[mapping >= experts] = -1
        half = torch.tensor([tokens // 2], dtype=torch.int32)
        x = hard_rows(max(tokens, 9), k)[-tokens:].contiguous()
        weights = torch.rand(tokens, generator=generator) + 0.3 if top_k == 1 else None
        for topk_ids, settings in (
            (ids, {"start": 1}),
            (ids, {"expert_map": mapping}),
            (ids, {"num_valid_tokens": half}),
            (torch.full_like(ids, experts - 1).int(), {}),
            (torch.full_like(ids, -1), {}),
        ):
            local = local_expert_ids(
                topk_ids, experts, settings.get("start", 0), settings.get("expert_map"),
                settings.get("num_valid_tokens"),
            ).flatten()  # fmt: skip
            want = expected(local.tolist(), experts, unit, most)
            scales = torch.linspace(0.001, 0.3, experts)
            for source, scale in (
                (ScaleSource.NONE, None),
                (ScaleSource.ROW, None),
                (ScaleSource.GIVEN, scales[:1]),
                (ScaleSource.EXPERT, scales),
            )[: None if seed < len(shapes) else 1]:
                got = poisoned_buffers(tokens * top_k, experts, unit, most)
                rows = got.tiles.row_slot.numel()
                image = torch.full((rows * k,), POISON, dtype=torch.int16)
                row_scale = torch.full((rows,), -7.0)
                route_and_scatter(
                    topk_ids, x, got, image.view(torch.bfloat16), row_scale, experts, unit, source=source, scale=scale,
                    weights=weights, **settings,
                )  # fmt: skip
                assert_filled(got.groups, want)
                assert got.local_ids.tolist() == local.tolist()
                assert got.tiles.row_slot.tolist() == want.row_slot + [-1] * (rows - len(want.row_slot))
                assert got.tiles.tile_expert.tolist() == want.tile_expert + [-1] * (
                    rows // unit - len(want.tile_expert)
                )
                assert got.tiles.num_tiles.item() == len(want.tile_expert)
                assert got.amax.tolist() == [0.0, 0.0]
                other = torch.full_like(image, POISON)
                other_scale = torch.full_like(row_scale, -7.0)
                scatter_rows(
                    x, other.view(torch.bfloat16), other_scale, got.groups, got.local_ids, unit, top_k, source=source,
                    scale=scale, weights=weights,
                )  # fmt: skip
                assert torch.equal(image, other)
                assert torch.equal(row_scale, other_scale)


def check_gather() -> None:
    """With and without scales, by programs of a row's whole K or of a part: each slot's row is its token, bit for bit;
    the rest keeps what it holds."""
    for case in cases():
        tokens = case.x.shape[0]
        for scale, blocks in ((None, 8), (torch.rand(tokens, generator=torch.Generator().manual_seed(1)), 2)):
            image, row_scale = case.image(), case.row_scale()
            gather_rows(
                case.x, scale, image.view(torch.bfloat16), row_scale, case.tiles, case.groups, case.unit, case.top_k,
                blocks=blocks,
            )  # fmt: skip
            assert torch.equal(image, case.image(case.of_slots(case.x)))
            of_slots = torch.full((tokens,), -7.0) if scale is None else scale
            assert torch.equal(row_scale, case.scales(of_slots.repeat_interleave(case.top_k)))


def check_quantize() -> None:
    """Every source of scales within the image: the same, in place."""
    for case in cases():
        of_slots = case.of_slots(case.x)
        for source, (scale, gs) in sources(case, of_slots).items():
            if source in (ScaleSource.NONE, ScaleSource.GIVEN):
                continue
            image, row_scale = case.image(of_slots), case.row_scale()
            quantize_image(
                image.view(torch.bfloat16), row_scale, case.tiles, case.groups, case.unit, case.k, source, scale
            )
            assert_same(image, case.image(quantized(of_slots, gs)))
            assert torch.equal(row_scale, case.scales(gs))


def check_blocks() -> None:
    """Blocks that saturate, vanish, lie on ties or an ulp below a power of two, steps of ones alone: ``e2m1 * sf`` is
    the torch twin's, signs included, by both ways to a block's scale."""
    for data in DATA:
        for terms in TERMS:
            check_quantized(data, terms, "cpu")


def check_amax() -> None:
    """Of each slot with a row, or of all; a row with a NaN or Inf counts as zero; a batch's is only ever raised."""
    for case in cases():
        of_slots = case.of_slots(case.x)
        want = torch.where(case.local >= 0, finite_row_amax(of_slots), -7.0)
        image = case.image(of_slots).view(torch.bfloat16)
        amax = torch.full((of_slots.shape[0],), -7.0)
        image_amax(image, case.tiles, case.groups, case.unit, case.k, amax, of_batch=False)
        assert torch.equal(amax, want)
        for before in (0.0, 2.0**100):
            of_all = torch.tensor([before])
            image_amax(image, case.tiles, case.groups, case.unit, case.k, of_all, of_batch=True)
            assert of_all.item() == max(before, want.amax().item())


if __name__ == "__main__":
    mend()
    check_scatter()
    check_together()
    check_gather()
    check_quantize()
    check_blocks()
    check_amax()
