"""What ``dsv4 inspect`` has found, as one JSON document."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from dsv4.checkpoints.checkpoint import Checkpoint
from dsv4.checkpoints.findings import findings
from dsv4.checkpoints.index import shown
from dsv4.checkpoints.progress import progress_bar
from dsv4.checkpoints.statistics import (
    InputScales,
    LayerStatistics,
    MatrixStatistics,
    bytes_by_dtype,
    layer_statistics,
    sum_reports,
)
from dsv4.errors import ConfigError

_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")


def chosen_layers(checkpoint: Checkpoint, text: str | None) -> list[int]:
    """Layer numbers from ``"0,3,10-12"``; None is all.

    Raises:
        ConfigError: not such a list, or a layer without routed experts.
    """
    if text is None:
        return list(checkpoint.moe_layers)
    wanted: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, end = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if end < first:
            raise ConfigError(f"--layers: expected numbers and ranges such as 0,3,10-12, found {text!r}")
        known = [layer for layer in checkpoint.moe_layers if first <= layer <= end]
        if len(known) != end - first + 1:
            raise ConfigError(
                f"--layers {text}: not all of {part.strip()} have routed experts; those that have are "
                f"{shown(checkpoint.moe_layers)}"
            )
        wanted += known
    return list(dict.fromkeys(wanted))


def inspect_checkpoint(
    checkpoint: Checkpoint, layers: Sequence[int], *, headers_only: bool, progress: bool = False
) -> dict[str, Any]:
    """Look at ``layers`` and describe them.

    Args:
        checkpoint: an open checkpoint.
        layers: some of its ``moe_layers``.
        headers_only: read no tensor.
        progress: draw a progress bar.
    """
    with progress_bar(progress, f"{len(layers)} layers", len(layers) * checkpoint.num_experts) as advance:
        statistics = [
            layer_statistics(checkpoint, layer, headers_only=headers_only, advance=advance) for layer in layers
        ]
    files = sorted({info.file for info in checkpoint.source.values()})
    stated = checkpoint.quantization
    others = checkpoint.other_tensors()
    expert_dtypes: Counter[str] = sum((layer.dtypes for layer in statistics), Counter())
    recoded = sum_reports(layer.recoded for layer in statistics)
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format.name,
        "headers_only": headers_only,
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "configuration": {
            "quant_method": stated.method or None,
            "expert_algorithm": stated.expert_algorithm or None,
            "group_size": stated.group_size,
            "top_k": checkpoint.top_k,
            "swiglu_limit": checkpoint.swiglu_limit,
        },
        "moe_layers": list(checkpoint.moe_layers),
        "num_experts": checkpoint.num_experts,
        "hidden_size": checkpoint.shape.hidden_size,
        "intermediate_size": checkpoint.shape.intermediate_size,
        "expert_tensors": {"count": sum(layer.tensors for layer in statistics), "bytes_by_dtype": dict(expert_dtypes)},
        "other_tensors": {
            "count": len(others),
            "bytes_by_dtype": dict(bytes_by_dtype(checkpoint.source[name] for name in others)),
        },
        "recoded": asdict(recoded) if recoded is not None else None,
        "layers": [_layer(layer, headers_only) for layer in statistics],
        "findings": [asdict(finding) for finding in findings(checkpoint, statistics)],
    }


def _layer(layer: LayerStatistics, headers_only: bool) -> dict[str, Any]:
    document: dict[str, Any] = {
        "layer": layer.layer,
        "tensors": layer.tensors,
        "bytes": layer.nbytes,
        "unreadable_experts": sorted(layer.unreadable),
        "input_scales": {name: _input_scales(scales) for name, scales in layer.input_scales.items()},
    }
    if headers_only:
        return document
    return document | {
        "gate_up_differing": len(layer.gate_up_ratios),
        "gate_up_largest_ratio": max(layer.gate_up_ratios.values(), default=1.0),
        "projections": {name: _matrix(matrix) for name, matrix in layer.matrices.items()},
    }


def _input_scales(scales: InputScales) -> dict[str, Any]:
    return {
        "present": len(scales.present),
        "missing": len(scales.missing),
        "unusable": len(scales.unusable),
        "range": value_range(scales.values.values()),
    }


def _matrix(matrix: MatrixStatistics) -> dict[str, Any]:
    return {
        "blocks": matrix.blocks,
        "saturated_blocks": matrix.saturated_blocks,
        "subnormal_blocks": matrix.subnormal_blocks,
        "zero_blocks": matrix.zero_blocks,
        "zero_experts": len(matrix.zero_experts),
        "block_scale_range": list(matrix.scale_range() or []) or None,
        "global_scale_range": value_range(matrix.global_scales.values()),
        "largest_magnitude": max(matrix.magnitudes.values(), default=None),
        "blocks_by_power_of_two": {str(power): count for power, count in matrix.scales_by_power().items()},
        "codes": matrix.codes(),
    }


def value_range(values: Iterable[float]) -> list[float] | None:
    """``[smallest, largest]``, None of nothing."""
    values = list(values)
    return [min(values), max(values)] if values else None
