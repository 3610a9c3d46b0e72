"""MXFP4 in numpy and float64, and by brute force what NVFP4 can hold of it. Shares no code with dsv4."""

from __future__ import annotations

import numpy as np
import torch

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
SIGNED = np.concatenate((E2M1, -E2M1))
# Every positive finite e4m3 number, from its bits.
E4M3 = np.array([m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)])[
    1:127
]

# Every number that is a code times a block scale, and with which of the block scales it is.
_PRODUCTS = np.unique(E4M3[:, None] * E2M1)
_MADE_BY = (E4M3[:, None] * E2M1 == _PRODUCTS[:, None, None]).any(-1)


def pack(codes: np.ndarray) -> torch.Tensor:
    """Codes ``[N, K]`` -> bytes ``[N, K/2]``, the even K index in the low nibble."""
    return torch.from_numpy((codes[:, 0::2] | (codes[:, 1::2] << 4)).astype(np.uint8))


def decode(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float64 ``[N, K]`` of codes ``[N, K]`` and e8m0 bytes ``[N, K/32]``, signed zeros included."""
    return SIGNED[codes] * np.exp2(scale.astype(np.float64) - 127).repeat(32, axis=1)


def halves(values: np.ndarray) -> np.ndarray:
    """``[N, K]`` -> ``[N * K / 16, 16]``: what shares one NVFP4 block scale."""
    return values.reshape(-1, 16)


def representable(blocks: np.ndarray, m: int) -> np.ndarray:
    """Which blocks ``[B, 16]`` are ``e2m1 * sf * 2^m`` for any one e4m3 ``sf``, by trying all of them: bool ``[B]``."""
    wanted = np.abs(blocks) / 2.0**m
    at = np.searchsorted(_PRODUCTS, wanted).clip(max=len(_PRODUCTS) - 1)
    possible = _MADE_BY[at] & (_PRODUCTS[at] == wanted)[..., None]
    return possible.all(axis=1).any(axis=-1)


def lossless_scales(values: np.ndarray) -> list[int]:
    """Every ``m`` with which all of ``values`` can be written, of those that may be one at all."""
    blocks = halves(values)
    magnitudes = np.abs(blocks[blocks != 0])
    if not magnitudes.size:
        return []
    low, high = int(np.floor(np.log2(magnitudes.min()))), int(np.ceil(np.log2(magnitudes.max())))
    return [m for m in range(low - 12, high + 12) if m >= -126 and representable(blocks, m).all()]


def expected_report(values: np.ndarray, scale: np.ndarray, m: int) -> tuple[int, int, int, int]:
    """(blocks, exact, shifted, requantized) for ``gs = 2^m``, by block of 32."""
    blocks = values.reshape(-1, 32)
    k = scale.reshape(-1).astype(int) - 127
    zero = (blocks == 0).all(-1)
    exact = zero | np.isin(np.exp2((k - m).astype(np.float64)), E4M3)
    lost = ~representable(halves(values), m).reshape(-1, 2).all(-1) & ~exact
    return len(blocks), int(exact.sum()), int((~exact & ~lost).sum()), int(lost.sum())
