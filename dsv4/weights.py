"""The weights of one layer as a checkpoint has them, checked before anything computes with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.checks import check_tensor
from dsv4.config import MoEConfig
from dsv4.errors import InputError
from dsv4.nvfp4 import BLOCK


@dataclass(frozen=True)
class MoEWeights:
    """NVFP4 weights of E experts, stacked; linear (not swizzled) block scales.

    Attributes:
        l1_fp4: uint8 ``[E, 2I, H/2]``, rows of gate, then of up.
        l1_sf: float8_e4m3fn ``[E, 2I, H/16]``.
        l1_gs: fp32 ``[E, 2]``, the global scales of gate and of up.
        l2_fp4: uint8 ``[E, H, I/2]``.
        l2_sf: float8_e4m3fn ``[E, H, I/16]``.
        l2_gs: fp32 ``[E]``.
    """

    l1_fp4: Tensor
    l1_sf: Tensor
    l1_gs: Tensor
    l2_fp4: Tensor
    l2_sf: Tensor
    l2_gs: Tensor

    @classmethod
    def checked(
        cls,
        config: MoEConfig,
        l1_fp4: Tensor,
        l1_sf: Tensor,
        l1_gs: Tensor,
        l2_fp4: Tensor,
        l2_sf: Tensor,
        l2_gs: Tensor,
    ) -> MoEWeights:
        """Check shapes, dtypes and values; ``l1_gs`` may be ``[E]`` (shared by gate and up).

        Raises:
            InputError: names the tensor, what was found and what was expected.
        """
        e, h, i = config.num_experts, config.hidden_size, config.intermediate_size
        check_tensor("l1_fp4_stacked", l1_fp4, torch.uint8, (e, 2 * i, h // 2))
        check_tensor("l1_sf_stacked", l1_sf, torch.float8_e4m3fn, (e, 2 * i, h // BLOCK))
        check_tensor("l2_fp4_stacked", l2_fp4, torch.uint8, (e, h, i // 2))
        check_tensor("l2_sf_stacked", l2_sf, torch.float8_e4m3fn, (e, h, i // BLOCK))
        if isinstance(l1_gs, Tensor) and tuple(l1_gs.shape) == (e,):
            l1_gs = l1_gs.unsqueeze(1).expand(e, 2)
        check_tensor("l1_gs (gate, up)", l1_gs, torch.float32, (e, 2))
        check_tensor("l2_gs", l2_gs, torch.float32, (e,))
        for name, sf in (("l1_sf_stacked", l1_sf), ("l2_sf_stacked", l2_sf)):
            check_block_scales(name, sf)
        for name, gs in (("l1_gs", l1_gs), ("l2_gs", l2_gs)):
            check_global_scales(name, gs)
        return cls(l1_fp4, l1_sf, l1_gs, l2_fp4, l2_sf, l2_gs)


def check_block_scales(name: str, sf: Tensor) -> None:
    """Refuse NaN and negative e4m3 block scales (zero is legal). Reads values: synchronises on a GPU."""
    byte = sf.view(torch.uint8)
    # In e4m3fn only 0x7F and 0xFF are NaN; 0x80 is a zero; everything above it is negative.
    bad = ((byte & 0x7F) == 0x7F) | (byte > 0x80)
    if bool(bad.any()):
        index = tuple(int(i) for i in bad.nonzero()[0])
        raise InputError(
            f"{name}: block scales must be zero or positive numbers, found {sf[index].item()} at {list(index)} "
            f"({int(bad.sum())} such in all): the checkpoint is damaged or not in NVFP4 layout"
        )


def check_global_scales(name: str, gs: Tensor) -> None:
    """Refuse global or input scales that are NaN, Inf, zero or negative. Synchronises on a GPU."""
    bad = ~(gs.isfinite() & (gs > 0))
    if bool(bad.any()):
        index = tuple(int(i) for i in bad.nonzero()[0])
        raise InputError(
            f"{name}: scales must be positive finite numbers, found {gs[index].item()} at {list(index)} "
            f"({int(bad.sum())} such in all)"
        )


def per_expert_scales(name: str, scale: Tensor | float, num_experts: int, device: torch.device) -> Tensor:
    """An input scale given as a scalar or as one per expert, as fp32 ``[E]``.

    Raises:
        InputError: another shape, or a value that is NaN, Inf, zero or negative.
    """
    scales = torch.as_tensor(scale, dtype=torch.float32, device=device)
    if scales.numel() != 1 and tuple(scales.shape) != (num_experts,):
        raise InputError(f"{name}: expected a scalar or [{num_experts}], found shape {tuple(scales.shape)}")
    check_global_scales(name, scales)
    return scales.reshape(-1).expand(num_experts).clone()
