"""A small checkpoint that nothing is wrong with, for tests that then plant a defect in it."""

from __future__ import annotations

import torch
from checkpoints import make
from torch import Tensor

CONFIG = {"num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2}
Tensors = dict[str, Tensor]


def clean() -> Tensors:
    """Two layers that nothing is wrong with: normal block scales, gate and up alike, sane inputs."""
    tensors = make.layer_tensors(0) | make.layer_tensors(1)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        layer, expert = int(name.split(".")[2]), int(name.split(".")[5])
        if name.endswith("weight_scale"):
            sf = torch.randint(0x28, 0x70, tensor.shape, generator=generator, dtype=torch.uint8)
            tensors[name] = sf.view(torch.float8_e4m3fn)
        elif name.endswith("weight_scale_2"):
            tensors[name] = torch.tensor(1e-3 * (1 + expert))
        elif name.endswith("input_scale"):
            tensors[name] = torch.tensor(1e-2 * (1 + expert) + 1e-3 * layer)
    return tensors
