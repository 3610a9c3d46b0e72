"""MXFP4 to NVFP4 without a change of value, wherever NVFP4 can hold it.

MXFP4 stores 32 values as ``e2m1 * 2^k`` with one exponent for all; NVFP4 stores 16 as ``e2m1 * sf * gs``. With ``gs =
2^m`` and ``sf = 2^(k-m)`` the codes stay as they are, byte for byte. e4m3 holds the 18 powers of two from 2^-9 to 2^8,
so one ``gs`` serves every block of a tensor whose exponents span at most 17.

In a tensor with a wider span, what lies outside is re-coded: ``3 * 2^k`` is also ``1.5 * 2^(k+1)``. Which exponents a
block of 16 can be written with follows from its values (``_UP`` and ``_DOWN``). Other block scales than powers of two
give nothing more: e2m1 values have the significands 1 and 1.5, and no e4m3 number but 1.5 * 2^n leads from one to the
other, at either end of its range to the same last value as 2^n. ``m`` is then the largest that loses nothing; where
there is none, the smallest that holds the largest values of the tensor, and blocks that are too small for it are
rounded to multiples of the smallest block scale.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.checkpoints.base import RecodeReport
from dsv4.nvfp4 import BLOCK, Nvfp4Tensor, decode_e2m1, encode_e2m1, pack_nibbles, unpack_nibbles

MX_BLOCK = 32
"""Values along K that share one MXFP4 scale."""

E8M0_BIAS = 127
E8M0_NAN = 255

_SF_MIN, _SF_MAX = -9, 8  # the powers of two that e4m3 has: 2^-9 (subnormal) to 2^8
_GS_MIN = -126  # fp32's smallest normal power of two
_NO_LIMIT = 255  # beyond every distance between exponents

# How far the exponent of a block with this e2m1 magnitude (code 0-7) can go down (its codes go up) or up.
_UP = (_NO_LIMIT, 3, 2, 2, 1, 1, 0, 0)  #   0.5 * 2^3 = 4; 1, 1.5: two steps; 2, 3: one; 4, 6: none
_DOWN = (_NO_LIMIT, 0, 1, 0, 2, 1, 3, 2)  # 4 / 2^3 = 0.5; 6 / 2^2 and 3 / 2 = 1.5; 2 / 2^2 and 1 / 2 = 0.5

_SHIFT_MIN, _SHIFT_MAX = -8, 3  # 6 * 2^-8 rounds to zero, and so does all below


@dataclass(frozen=True)
class _Exponents:
    """What a tensor that is not zero asks of ``m``, each over its non-zero blocks.

    Attributes:
        lowest, highest: the exponents k.
        needed: the smallest ``m`` with which every large value can be written.
        allowed: the largest ``m`` with which every small value can be written.
    """

    lowest: int
    highest: int
    needed: int
    allowed: int

    def __or__(self, other: _Exponents) -> _Exponents:
        return _Exponents(
            min(self.lowest, other.lowest),
            max(self.highest, other.highest),
            max(self.needed, other.needed),
            min(self.allowed, other.allowed),
        )

    @property
    def lossless(self) -> bool:
        return self.needed <= self.allowed

    def choose(self) -> int:
        """``m``: 2^8 as the largest block scale where that loses nothing."""
        usual = self.highest - _SF_MAX
        wanted = min(usual, self.allowed) if self.lossless else self.needed
        # Never below: m may rise to here, since no block has an exponent under -127.
        return max(wanted, _GS_MIN)


def cast_mxfp4(*matrices: tuple[Tensor, Tensor]) -> tuple[list[Nvfp4Tensor], RecodeReport]:
    """Cast matrices that should share a global scale (gate and up, or one alone).

    They share it where that loses nothing, else each gets the one that suits it best.

    Args:
        matrices: ``(codes, scale)`` each: codes uint8 ``[N, K/2]``, two e2m1 codes a byte, even K in the low nibble;
            scale uint8 ``[N, K/32]``, e8m0 (``2^(byte - 127)``) without its NaN. K is a multiple of 32.

    Returns:
        The matrices in NVFP4, in order, and what was done to their blocks.
    """
    blocks = [_Blocks(codes, scale) for codes, scale in matrices]
    asked = [each.exponents(recode=False) for each in blocks]
    together = _joint(asked)
    if together is not None and not together.lossless:
        asked = [each.exponents(recode=True) for each in blocks]
        together = _joint(asked)
    shared = together is not None and together.lossless
    report = RecodeReport()
    results = []
    for matrix, own in zip(blocks, asked, strict=True):
        wanted = together if shared or own is None else own
        tensor, did = matrix.cast(0 if wanted is None else wanted.choose())
        results.append(tensor)
        report += did
    return results, report


def _joint(asked: list[_Exponents | None]) -> _Exponents | None:
    found = [each for each in asked if each is not None]
    return functools.reduce(operator.or_, found) if found else None


class _Blocks:
    """One matrix by NVFP4's blocks of 16: two for each of MXFP4's."""

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self._codes = codes
        self._scale = scale
        # 16 codes are 8 bytes: one integer, zero when all magnitudes are.
        self._nonzero = (codes & 0x77).view(torch.int64) != 0
        self._block_nonzero = self._nonzero[..., 0::2] | self._nonzero[..., 1::2]
        low, high = torch.where(self._block_nonzero, scale, E8M0_NAN).amin(), (scale * self._block_nonzero).amax()
        self._lowest, self._highest = int(low) - E8M0_BIAS, int(high) - E8M0_BIAS

    def exponents(self, recode: bool) -> _Exponents | None:
        """What the non-zero blocks ask for: with their codes as they are, or with any that have the same values."""
        if self._lowest > self._highest:
            return None
        if not recode:
            return _Exponents(self._lowest, self._highest, self._highest - _SF_MAX, self._lowest - _SF_MIN)
        k, (up, down) = self._exponent, self._room
        needed = int((k - up)[self._nonzero].max()) - _SF_MAX
        allowed = int((k + down)[self._nonzero].min()) - _SF_MIN
        return _Exponents(self._lowest, self._highest, needed, allowed)

    def cast(self, m: int) -> tuple[Nvfp4Tensor, RecodeReport]:
        """The matrix under ``gs = 2^m``."""
        gs = torch.tensor(2.0**m, dtype=torch.float32, device=self._codes.device)
        # The block scale of each e8m0 byte, 0 where e4m3 has no such power of two: a zero half of a block keeps the
        # block's scale where there is one, a zero block has none.
        powers = [2.0**p if _SF_MIN <= p <= _SF_MAX else 0.0 for p in (byte - E8M0_BIAS - m for byte in range(256))]
        table = torch.tensor(powers, device=self._codes.device).to(torch.float8_e4m3fn).view(torch.uint8)
        sf = (table[self._scale.int()] * self._block_nonzero).repeat_interleave(2, dim=-1)
        inside = self._lowest > self._highest or (self._lowest - m >= _SF_MIN and self._highest - m <= _SF_MAX)
        if inside:
            blocks = self._scale.numel()
            return Nvfp4Tensor(self._codes, sf.view(torch.float8_e4m3fn), gs), RecodeReport(blocks, blocks)
        wanted = self._exponent - m
        exponent = wanted.clamp(_SF_MIN, _SF_MAX)
        moved = (exponent != wanted) & self._nonzero
        # The clamp is for zero blocks: an exponent that was moved stays between those of the tensor.
        sf = torch.where(moved, table[(exponent + m + E8M0_BIAS).clamp(0, 255)], sf)
        lost = moved & (exponent > wanted + self._room[1])
        codes = self._shifted(moved, wanted - exponent)
        return Nvfp4Tensor(codes, sf.view(torch.float8_e4m3fn), gs), _report(moved, lost)

    @functools.cached_property
    def _exponent(self) -> Tensor:
        """k of each block of 16, int32 ``[N, K/16]``."""
        return (self._scale.to(torch.int32) - E8M0_BIAS).repeat_interleave(MX_BLOCK // BLOCK, dim=-1)

    @functools.cached_property
    def _room(self) -> tuple[Tensor, Tensor]:
        """How far each block's exponent can go down and up, int32 ``[N, K/16]``; :data:`_NO_LIMIT` for zeros."""
        pairs = self._codes.int().unflatten(-1, (-1, BLOCK // 2))
        # By byte, that is, by two codes at a time.
        by_byte = ([min(room[byte & 7], room[byte >> 4 & 7]) for byte in range(256)] for room in (_UP, _DOWN))
        up, down = (self._codes.new_tensor(table)[pairs].amin(dim=-1).int() for table in by_byte)
        return up, down

    def _shifted(self, moved: Tensor, shift: Tensor) -> Tensor:
        """The codes with those of the ``moved`` blocks multiplied by ``2^shift`` and rounded, where they must be."""
        factors = shift.new_tensor([2.0**s for s in range(_SHIFT_MIN, _SHIFT_MAX + 1)], dtype=torch.float32)
        values = decode_e2m1(unpack_nibbles(torch.arange(256, dtype=torch.uint8, device=shift.device).unsqueeze(-1)))
        shifted = pack_nibbles(encode_e2m1(factors[:, None, None] * values)).squeeze(-1)  # [shift, byte]
        packed = self._codes.unflatten(-1, (-1, BLOCK // 2)).clone()
        row = (shift[moved].clamp(_SHIFT_MIN, _SHIFT_MAX) - _SHIFT_MIN).unsqueeze(-1)
        packed[moved] = shifted[row, packed[moved].int()]
        return packed.flatten(-2)


def _report(moved: Tensor, lost: Tensor) -> RecodeReport:
    """Counts by MXFP4 block: one is as bad as the worse of its halves."""
    by_block = [each.unflatten(-1, (-1, 2)).any(dim=-1) for each in (moved, lost)]
    touched, requantized = (int(each.sum()) for each in by_block)
    blocks = by_block[0].numel()
    return RecodeReport(blocks, blocks - touched, touched - requantized, requantized)
