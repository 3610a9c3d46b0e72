"""Peers by name, one file each. Nothing of theirs is imported until they are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peers.base import Peer, Setup


@dataclass(frozen=True)
class Entry:
    """One peer.

    Attributes:
        module: in this package, and the class in it.
        label: what tables and pictures call it.
        quantizes: it quantizes activations: ours in W4A4 is compared with it, else ours in W4A16.
        color: in pictures.
    """

    module: tuple[str, str]
    label: str
    quantizes: bool = False
    color: str = "#888888"


# In the order of loading: vLLM last, whose bootstrap puts stand-ins before packages that it does not need.
PEERS = {
    "humming": Entry(("humming", "Humming"), "Humming W4A16", color="#D55E00"),
    "grouped-mm": Entry(("grouped_mm", "GroupedMM"), "torch grouped_mm bf16 (products)", color="#999999"),
    "transformers": Entry(("transformers_experts", "TransformersExperts"), "Transformers bf16", color="#666666"),
    "vllm-marlin": Entry(("vllm_layers", "Marlin"), "vLLM Marlin W4A16", color="#56B4E9"),
    "vllm-humming": Entry(("vllm_layers", "VllmHumming"), "vLLM Humming W4A16", color="#F0E442"),
    "vllm-dsv4-w4a16": Entry(("vllm_layers", "PluginW4A16"), "dsv4 in vLLM W4A16", color="#0072B2"),
    "vllm-dsv4-w4a4": Entry(("vllm_layers", "PluginW4A4"), "dsv4 in vLLM W4A4", quantizes=True, color="#009E73"),
    "vllm-emulation": Entry(("vllm_layers", "Emulation"), "vLLM emulation W4A4", quantizes=True, color="#CC79A7"),
}
"""A contender belongs to the peer whose name it is, or begins with (``humming-grouped``)."""


def peer_of(contender: str) -> str | None:
    """The peer that a contender belongs to, None for our own modes."""
    return next((name for name in PEERS if contender == name or contender.startswith(f"{name}-")), None)


def load(names: Iterable[str], setup: Setup) -> tuple[dict[str, Peer], dict[str, str]]:
    """Those peers that can run here, and why the others cannot."""
    wanted = set(names)
    found: dict[str, Peer] = {}
    skipped: dict[str, str] = {}
    for name, entry in PEERS.items():
        if name not in wanted:
            continue
        module, cls = entry.module
        try:
            found[name] = getattr(import_module(f"peers.{module}"), cls)(setup)
        except Exception as reason:  # other people's code raises what it likes, and must not cost the others' times
            skipped[name] = str(reason) or type(reason).__name__
    return found, skipped


def best(times: dict[str, float], peer: str) -> float | None:
    """The time of the peer's faster contender, None where it has none."""
    return min((us for name, us in times.items() if peer_of(name) == peer), default=None)
