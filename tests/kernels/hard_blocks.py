"""Blocks of 16 bf16 values, as fp32 ``[B, 16]``, and global scales ``[B]`` under which quantizing goes wrong first."""

from __future__ import annotations

import torch


def blocks() -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 blocks and scales under which they saturate, are ordinary, vanish, and lie on ties; NaN and Inf too."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 16, generator=generator) * torch.logspace(-4, 4, 4096).unsqueeze(1)
    x[::9] = torch.randint(-12, 13, (456, 16), generator=generator) * 0.25  # ties once the scale is a power of two
    x[1::9, ::2] = -0.0
    x[2::9] = 0.0
    x[3::99, 5] = torch.nan
    x[4::99, 11] = -torch.inf
    gs = 2.0 ** torch.randint(-12, 4, (4096,), generator=generator).float()
    gs[::5] = torch.rand(820, generator=generator) + 1e-3
    gs[1::50] = 2.0**-99
    return x.bfloat16().float(), gs


def ties() -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 blocks of values that lie on the midpoints between codes, or one bf16 beside, under steps of few bits: what
    an inexact division decides wrongly. And some that saturate, by scales that round down or end at 448."""
    generator = torch.Generator().manual_seed(2)
    count = 4096
    scale = torch.randint(1, 0x7F, (count,), generator=generator, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    gs = torch.randint(1, 16, (count,), generator=generator) * 2.0 ** torch.randint(
        -90, 60, (count,), generator=generator
    )
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    x = midpoints[torch.randint(0, 7, (count, 16), generator=generator)] * (scale * gs)[:, None]
    x[:, 0] = 6 * scale * gs
    x[::7, 3] = 9 * (scale * gs)[::7]
    bits = x.bfloat16().view(torch.int16)
    bits += torch.randint(-1, 2, bits.shape, generator=generator, dtype=torch.int16) * (torch.arange(16) % 3 == 2)
    x = bits.view(torch.bfloat16).float() * (1 - 2 * torch.randint(0, 2, x.shape, generator=generator))
    return x, gs.float()


def all_ones() -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 blocks whose step has every bit of its mantissa set, of any size: the one number whose reciprocal Newton's
    iteration may leave a bit off, which shows in a value of half a code above a fourth of a power of two."""
    powers = 2.0 ** torch.arange(-90, 38)
    gs = (2 - 2**-23) * powers
    x = torch.zeros(len(gs), 16)
    x[:, 0] = 12 * powers
    x[:, 1::2], x[:, 2::4], x[:, 4::4] = (0.5 * powers)[:, None], (-0.5 * powers)[:, None], (3 * powers)[:, None]
    return x.bfloat16().float(), gs


def below_powers() -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 blocks with a value whose quotient by the block's step is one to four units of the last place below 2 or 4,
    so that the value's mantissa, if nothing clears it, reaches the next power of two with what aligns it."""
    x, gs = [], []
    for mantissa in range(128, 256):
        for power in (2, 4):
            for ulps in range(1, 5):
                step = torch.tensor(mantissa / power, dtype=torch.float32).view(torch.int32).add(ulps)
                step = step.view(torch.float32).item()
                block = torch.zeros(16)
                block[0], block[5], block[9] = 6 * step, mantissa, -mantissa
                x.append(block)
                gs.append(step)
    return torch.stack(x).bfloat16().float(), torch.tensor(gs)
