"""How checkpoints call the tensors of a routed expert.

A family says which path leads to an expert and what its three matrices are called there. What follows the projection's
name (``weight``, ``weight_scale``, ``weight_packed``, ...) is the *suffix*, and is the format's business, not ours.

====================  ================================================  =====================
family                tensor name                                       gate, up, down
====================  ================================================  =====================
deepseek_v4           ``[P]layers.N.ffn.experts.E.<projection>.<suffix>``  ``w1, w3, w2``
transformers          ``[P]layers.N.mlp.experts.E.<projection>.<suffix>``  ``gate_proj, ...``
transformers_fused    ``[P]layers.N.mlp.experts.<projection>``          ``gate_up_proj, down_proj``
====================  ================================================  =====================

``P`` is empty, ``model.``, ``language_model.`` or a chain of these. Other ``experts`` (those of the multi-token
prediction head under ``mtp.``, shared experts) are not routed experts of a layer and do not match.

Sources: the DeepSeek-V4 release, and ``conversion_mapping.py`` and the MoE models of Transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

PROJECTIONS = ("gate", "up", "down")
"""The three matrices of a SwiGLU expert, in the order in which everything here handles them."""


@dataclass(frozen=True)
class NameFamily:
    """One way to name expert tensors.

    Attributes:
        name: what the family is called in messages.
        block: the module between the layer and ``experts``: ``ffn`` or ``mlp``.
        projections: our name of a projection -> theirs.
        fused: all experts of a layer are one tensor, without an expert number or a suffix.
    """

    name: str
    block: str
    projections: Mapping[str, str]
    fused: bool = False

    def tensor_name(self, prefix: str, layer: int, expert: int, projection: str, suffix: str) -> str:
        """The full name of one tensor; ``expert`` and ``suffix`` are not used by a fused family."""
        start = f"{prefix}layers.{layer}.{self.block}.experts"
        if self.fused:
            return f"{start}.{self.projections[projection]}"
        return f"{start}.{expert}.{self.projections[projection]}.{suffix}"


DEEPSEEK_V4 = NameFamily("deepseek_v4", "ffn", {"gate": "w1", "up": "w3", "down": "w2"})
TRANSFORMERS = NameFamily("transformers", "mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"})
TRANSFORMERS_FUSED = NameFamily(
    "transformers_fused", "mlp", {"gate_up": "gate_up_proj", "down": "down_proj"}, fused=True
)
FAMILIES = (DEEPSEEK_V4, TRANSFORMERS, TRANSFORMERS_FUSED)


@dataclass(frozen=True)
class ExpertTensorName:
    """A parsed tensor name.

    Attributes:
        family: how it is named.
        prefix: what stands before ``layers``, with its dot: ``""``, ``"model."``, ...
        layer: the decoder layer.
        expert: the global expert id, None for a fused tensor.
        projection: ``gate``, ``up`` or ``down``; ``gate_up`` for a fused tensor.
        suffix: what the format calls this tensor, ``""`` for a fused one.
    """

    family: NameFamily
    prefix: str
    layer: int
    expert: int | None
    projection: str
    suffix: str


# One to five digits without a leading zero: two spellings of one number would be two names for one expert.
_NUMBER = r"(?:0|[1-9][0-9]{0,4})"
_START = rf"(?P<prefix>(?:(?:model|language_model)\.)*)layers\.(?P<layer>{_NUMBER})\.(?P<block>[a-z]+)\.experts\."
_PER_EXPERT = re.compile(rf"{_START}(?P<expert>{_NUMBER})\.(?P<projection>[a-z0-9_]+)\.(?P<suffix>[A-Za-z0-9_.]+)")
_FUSED = re.compile(rf"{_START}(?P<projection>[a-z_]+)")

_LOOKUP = {
    (family.fused, family.block, theirs): (family, ours)
    for family in FAMILIES
    for ours, theirs in family.projections.items()
}


def parse(name: str) -> ExpertTensorName | None:
    """The parts of ``name`` if it is a routed expert's tensor, else None."""
    if ".experts." not in name:
        return None
    for fused, pattern in ((False, _PER_EXPERT), (True, _FUSED)):
        match = pattern.fullmatch(name)
        if match is None:
            continue
        known = _LOOKUP.get((fused, match["block"], match["projection"]))
        if known is None:
            continue
        family, projection = known
        return ExpertTensorName(
            family,
            match["prefix"],
            int(match["layer"]),
            None if fused else int(match["expert"]),
            projection,
            "" if fused else match["suffix"],
        )
    return None
