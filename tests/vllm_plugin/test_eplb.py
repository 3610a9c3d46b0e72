"""vLLM's load balancer moves our experts: its own rearrangement, between two processes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from layer_cases import BAR, inputs
from oracle import nearest_reference, random_weights, relative_l2
from vllm.distributed.eplb.eplb_communicator import (
    TorchDistGlooStagedEplbCommunicator,
    TorchDistNcclEplbCommunicator,
)
from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace

from dsv4.integrations.vllm import moe_layers
from vllm_plugin import layers
from vllm_plugin.layers import Ranks

E, H, INTER, K, LIMIT = 6, 64, 32, 2, 0.75
BEFORE = list(range(E))
AFTER = [[4, 1, 0, 2, 3, 5], [3, 5, 4, 1, 0, 2]]
"""Where experts are afterwards, layer by layer: some stay, some change their row, most their rank."""


def test_vllms_rearrangement(layout, device, tmp_path):
    """After vLLM has moved experts between ranks and rows, in place, each rank's layers give the oracle's numbers for
    the experts that they hold then: weights, block scales, global scales and input scales have moved together."""
    mp.spawn(_rank, (tmp_path, layout, device.type), nprocs=2)


def _rank(rank: int, folder: Path, layout: str, device: str) -> None:
    """One of two expert-parallel processes; what it raises is raised by the test."""
    layers.start()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    group = dist.group.WORLD
    # Each expert has input scales of its own, a hundred times apart: one that stayed behind would show.
    # Powers of two, which compressed-tensors' reciprocals keep as they are: another last bit of a scale moves codes.
    l1, l2 = (first * 2.0 ** torch.tensor([0, 7, 1, 5, 3, 6]) for first in (2.0**-8, 2.0**-12))
    weights = [random_weights(E, H, INTER, seed=7 + number, split_gate_up=True) for number in range(len(AFTER))]
    built = []
    for number, w in enumerate(weights):
        file = folder / f"{rank}-{number}.safetensors"
        layer = layers.build(
            layers.quantization(layout), experts=E, hidden=H, inter=INTER, top_k=K, device=torch.device(device),
            ranks=Ranks(ep=(2, rank), eplb=True), limit=LIMIT,
        )  # fmt: skip
        layers.load(layer, layers.write_checkpoint(file, layout, w, l1, l2))
        assert set(moe_layers(layer)) == {""}
        built.append(layer)
    moved = [list(layer.get_expert_weights()) for layer in built]
    pointers = [t.data_ptr() for rows in moved for t in rows]
    staged = TorchDistGlooStagedEplbCommunicator if device == "cuda" else TorchDistNcclEplbCommunicator
    rearrange_expert_weights_inplace(
        torch.tensor([BEFORE] * len(AFTER)),
        torch.tensor(AFTER),
        moved,
        [torch.empty_like(t) for t in moved[0]],
        group,
        staged(group),
    )
    assert [t.data_ptr() for layer in built for t in layer.get_expert_weights()] == pointers
    batch = inputs(29, H, K, E, seed=3)
    first = rank * E // 2
    for layer, w, after in zip(built, weights, AFTER, strict=True):
        held = after[first : first + E // 2]
        got = layers.run(layer, *(t.to(device) for t in batch)).float().cpu()
        want = nearest_reference(
            got, *batch, layers.local(w, held), activation_format="nvfp4", activation_scale="static",
            l1_scale_policy="per_expert", l1_input_scale=l1[held], l2_input_scale=l2[held], swiglu_limit=LIMIT,
            start=first,
        )  # fmt: skip
        assert relative_l2(got, want) <= BAR
    dist.destroy_process_group()
