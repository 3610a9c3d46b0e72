"""The numbers: NVFP4 in plain torch, on any device. Every other file takes its arithmetic from here.

**The format.** A value is stored as ``e2m1 * sf * gs``:

* ``e2m1``: 4 bits, sign, two exponent bits, one mantissa bit: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives (codes
  0-7 and 8-15). Two codes to a byte, the one with the even K index in the low nibble.
* ``sf``: one float8 e4m3 *block scale* for 16 consecutive values along K (the last dimension).
* ``gs``: one fp32 *global scale* for a tensor (or for an expert, a row, ...), a multiplier on decode.

**Quantizing** is done in fp32 with round-to-nearest division, in exactly this order, so that every backend can give the
same bytes::

    gs = amax(tensor) / 2688                    # 2688 = 6 * 448: the largest block gets sf = 448
    sf = e4m3(min((amax(block) / 6) / gs, 448)) # round to nearest even
    q  = e2m1(x / (sf * gs))                    # round to nearest even, saturating at 6

**Corner cases**, each of them a decision that all backends share:

===========================  =========================================================================================
ties                         to even: 0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4
zero                         keeps the sign of its input (code 0 or 8), and so does a value that rounds to zero
sf rounds to 0               the block's codes are all 0, whatever the signs
subnormal sf                 used as it is: e4m3 has steps of 2^-9 down to 2^-9
all-zero tensor              gs = 1, sf = 0, codes 0
gs below 2^-100              the same (``sf * gs`` would leave fp32's normal range)
NaN or Inf in a block        sf = 0x7F (NaN), codes 0: the whole block decodes to NaN, no other block changes
NaN or Inf in a row          the row is left out of a tensor's amax
sf above 448 (static gs)     saturates at 448, and the codes at 6
===========================  =========================================================================================

**4-over-6** (an option for weights): e2m1 has no value between 4 and 6, so a block whose maximum is mapped to 6 rounds
its second-largest values badly. Each block tries both ``sf`` (maximum at 6) and ``1.5 * sf`` (maximum at 4) and keeps
the one with the lower squared error, the former on a tie. ``gs`` is then ``amax / 1536`` (6 * 256), so that 1.5 * sf
still fits e4m3. Source: Cook et al., "Four Over Six: More Accurate NVFP4 Quantization with Adaptive Block Scaling".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.errors import InputError

BLOCK = 16
"""Values along K that share one block scale."""

E2M1_MAX = 6.0
E4M3_MAX = 448.0
GS_DIVISOR = E2M1_MAX * E4M3_MAX
GS_DIVISOR_4_OVER_6 = E2M1_MAX * 256.0
GS_MIN = 2.0**-100
"""Global scales below this are replaced by 1: see the table above."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def encode_e2m1(x: Tensor) -> Tensor:
    """Round fp32 values to e2m1 codes.

    Args:
        x: fp32 ``[...]``, any values.

    Returns:
        uint8 ``[...]``, codes 0-15: round to nearest even, saturating at 6; the sign bit (8) is that of the input,
        zeros included. NaN gives magnitude 6: callers decide what a NaN means before this point.
    """
    a = torch.nan_to_num(x.abs(), nan=E2M1_MAX)
    # The magnitudes are 0 to 4 halves, then 2 whole steps to 4, then a step of two to 6: in each stretch the code
    # counts steps, and torch.round sends ties to the even one. (A table would be copied to the device: a host sync.)
    code = (a * 2).round_().clamp_(max=4)
    code += a.round().sub_(2).clamp_(0, 2)
    code += (a * 0.5).round_().sub_(2).clamp_(0, 1)
    return code.to(torch.uint8) | (torch.signbit(x).to(torch.uint8) << 3)


def decode_e2m1(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of e2m1 codes: uint8 ``[...]`` in 0-15 -> ``dtype`` ``[...]``. Exact in every floating dtype."""
    magnitude = codes & 7
    exponent = (magnitude >> 1).clamp(min=1)
    # Twice the value is an integer: the subnormals 0 and 1 as they are, else (2 + mantissa) << (exponent - 1).
    doubled = torch.where(magnitude < 2, magnitude, ((magnitude & 1) | 2) << (exponent - 1))
    value = doubled.to(dtype) * 0.5
    return torch.where(codes < 8, value, -value)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes ``[..., K]`` -> packed uint8 ``[..., K/2]``, the even K index in the low nibble."""
    pairs = codes.unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Packed uint8 ``[..., K/2]`` -> uint8 codes ``[..., K]``. The inverse of :func:`pack_nibbles`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def finite_row_amax(x: Tensor) -> Tensor:
    """``max |x|`` of each row, 0 for a row that holds a NaN or Inf: ``[..., K]`` -> fp32 ``[...]``."""
    amax = x.abs().amax(dim=-1).float()
    return torch.where(amax < torch.inf, amax, 0.0)  # false for NaN too


def global_scale(amax: Tensor, divisor: float = GS_DIVISOR) -> Tensor:
    """The global scale of data whose largest magnitude is ``amax``: fp32 of the same shape.

    ``amax / divisor``, or 1 where that is below 2^-100 (all-zero data included).
    """
    gs = _divide(amax.float(), divisor)
    return torch.where(gs >= GS_MIN, gs, 1.0)


def _divide(x: Tensor, divisor: float) -> Tensor:
    """``x / divisor`` rounded to nearest. On CUDA, torch divides by a Python number by multiplying with its reciprocal,
    which is off by one bit for some values: enough to move a code. A divisor on the device is divided by."""
    return x / x.new_full((), divisor)


def check_quantizable(x: Tensor) -> None:
    """Require floating-point ``[..., K]`` with K a multiple of 16.

    Raises:
        InputError: it is not.
    """
    if x.dim() < 1 or x.shape[-1] % BLOCK:
        raise InputError(f"quantize: the last dimension must be a multiple of {BLOCK}, found shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise InputError(f"quantize: expected a floating-point tensor, found {x.dtype}")


def _blocks(x: Tensor) -> Tensor:
    check_quantizable(x)
    return x.float().unflatten(-1, (-1, BLOCK))


def _encode_blocks(blocks: Tensor, sf: Tensor, gs: Tensor) -> Tensor:
    """Codes of ``blocks [..., B, 16]`` under ``sf`` (e4m3 ``[..., B]``); ``gs`` broadcasts against ``sf``."""
    step = sf.float() * gs
    usable = (step > 0) & (step < torch.inf)  # false for sf = 0 and for the NaN of a non-finite block
    step = torch.where(usable, step, 1.0).unsqueeze(-1)
    codes = encode_e2m1(blocks / step)
    return torch.where(usable.unsqueeze(-1), codes, 0)


def _codes_under(blocks: Tensor, amax: Tensor, scale: Tensor, gs: Tensor) -> tuple[Tensor, Tensor]:
    """Round the wanted block scales ``[..., B]`` to e4m3 and encode ``blocks [..., B, 16]`` under them."""
    # NaN is put in last and by hand: how a cast to e4m3 treats Inf and out-of-range values differs between devices.
    sf = torch.where(amax < torch.inf, torch.clamp(scale, max=E4M3_MAX), torch.nan).to(torch.float8_e4m3fn)
    return _encode_blocks(blocks, sf, gs), sf


def block_codes(x: Tensor, gs: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`quantize_blocks` without packing: ``(codes uint8 [..., K/16, 16], sf float8_e4m3fn [..., K/16])``."""
    blocks = _blocks(x)
    amax = blocks.abs().amax(dim=-1)
    return _codes_under(blocks, amax, _divide(amax, E2M1_MAX) / gs, gs)


def quantize_blocks(x: Tensor, gs: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize with a given global scale.

    Args:
        x: any floating dtype ``[..., K]``, K a multiple of 16.
        gs: fp32, broadcastable against ``[..., K/16]``: 0-d for one scale, ``[M, 1]`` for one scale a row.

    Returns:
        ``(packed uint8 [..., K/2], sf float8_e4m3fn [..., K/16])``.

    Raises:
        InputError: K is not a multiple of 16, or x is not floating point.
    """
    codes, sf = block_codes(x, gs)
    return pack_nibbles(codes.flatten(-2)), sf


def quantize_blocks_4_over_6(x: Tensor, gs: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`quantize_blocks` that chooses per block between its maximum at 6 and at 4: see the module docstring."""
    blocks = _blocks(x)
    amax = blocks.abs().amax(dim=-1)
    scale = _divide(amax, E2M1_MAX) / gs
    # Errors in units of gs: the squares of very small or large ones would leave fp32's range, and all would be ties.
    target = blocks / gs.unsqueeze(-1)

    def candidate(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, sf = _codes_under(blocks, amax, scale, gs)
        error = (decode_e2m1(codes) * sf.float().unsqueeze(-1) - target).square().sum(dim=-1)
        return codes, sf, error

    codes_6, sf_6, error_6 = candidate(scale)
    codes_4, sf_4, error_4 = candidate(scale * 1.5)
    take_4 = error_4 < error_6  # strict: a tie, or a NaN, keeps the maximum at 6
    codes = torch.where(take_4.unsqueeze(-1), codes_4, codes_6)
    sf = torch.where(take_4, sf_4.view(torch.uint8), sf_6.view(torch.uint8)).view(torch.float8_e4m3fn)
    return pack_nibbles(codes.flatten(-2)), sf


@dataclass(frozen=True)
class Nvfp4Tensor:
    """Codes, block scales and global scale, kept together: they mean nothing apart.

    Attributes:
        codes: uint8 ``[..., K/2]``, two e2m1 codes a byte, even K in the low nibble.
        sf: float8_e4m3fn ``[..., K/16]``.
        gs: fp32, 0-d or broadcastable against ``[..., K/16]``; a multiplier on decode.
    """

    codes: Tensor
    sf: Tensor
    gs: Tensor

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.sf.dtype != torch.float8_e4m3fn:
            raise InputError(
                f"Nvfp4Tensor: expected uint8 codes and float8_e4m3fn scales, "
                f"found {self.codes.dtype} and {self.sf.dtype}"
            )
        if self.codes.shape[:-1] != self.sf.shape[:-1] or self.codes.shape[-1] != self.sf.shape[-1] * (BLOCK // 2):
            raise InputError(
                f"Nvfp4Tensor: codes {tuple(self.codes.shape)} and scales {tuple(self.sf.shape)} do not belong "
                f"together: expected [..., K/2] and [..., K/16] with the same K"
            )

    @property
    def shape(self) -> torch.Size:
        """The shape of the decoded tensor, ``[..., K]``."""
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 2))

    @classmethod
    def quantize(cls, x: Tensor, *, four_over_six: bool = False) -> Nvfp4Tensor:
        """Quantize ``x [..., K]`` with one global scale from its largest magnitude (non-finite rows left out)."""
        amax = finite_row_amax(x).amax() if x.numel() else torch.zeros((), dtype=torch.float32, device=x.device)
        if four_over_six:
            gs = global_scale(amax, GS_DIVISOR_4_OVER_6)
            return cls(*quantize_blocks_4_over_6(x, gs), gs)
        gs = global_scale(amax)
        return cls(*quantize_blocks(x, gs), gs)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode to ``dtype [..., K]``: ``(e2m1 * sf) * gs``, the first product exact in fp32, bf16 and fp16."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        values = decode_e2m1(unpack_nibbles(self.codes), wide).unflatten(-1, (-1, BLOCK))
        scaled = values * self.sf.to(wide).unsqueeze(-1) * self.gs.to(wide).unsqueeze(-1)
        return scaled.flatten(-2).to(dtype)
