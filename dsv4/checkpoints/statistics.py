"""What a layer's experts look like in numbers: from headers alone, or from every code and scale.

A matrix is counted, not kept: 256 counters for its bytes of codes and 256 for its block scales say everything that is
asked about ranges, saturation and distribution, for any size of checkpoint. An expert that cannot be read is recorded
with its error and does not stop the rest. What the numbers mean is :mod:`dsv4.checkpoints.findings`' business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv4.checkpoints.base import ExpertWeights, RecodeReport
from dsv4.checkpoints.checkpoint import Checkpoint
from dsv4.checkpoints.index import ExpertLocation
from dsv4.checkpoints.naming import PROJECTIONS
from dsv4.checkpoints.source import TensorInfo, torch_dtype
from dsv4.errors import CheckpointError, InputError
from dsv4.nvfp4 import E2M1_MAX

INPUT_SCALE_SUFFIXES = ("input_scale", "input_global_scale")
"""How the NVFP4 formats call a projection's activation scale."""

BLOCK_SCALE_SUFFIX = "weight_scale"
"""What both NVFP4 formats have: experts with it should have input scales too, others need none."""

_ZERO_SCALES = [0x00, 0x80]
_SUBNORMAL_SCALES = slice(0x01, 0x08)
_LARGEST_SCALE = 0x7E  # 448
_POWERS_OF_TWO = {*_ZERO_SCALES, 0x01, 0x02, 0x04, *range(0x08, 0x7F, 8)}


@dataclass
class MatrixStatistics:
    """One projection of all experts of a layer that could be read.

    Attributes:
        code_bytes: int64 ``[256]``: how often each byte (two e2m1 codes) occurs.
        scale_bytes: int64 ``[256]``: how often each e4m3 byte occurs among the block scales.
        global_scales: expert -> multiplier on decode.
        magnitudes: expert -> the largest value that its codes and scales could give: ``6 * max(sf) * gs``.
        zero_experts: experts all of whose values are 0.
    """

    code_bytes: Tensor = field(default_factory=lambda: torch.zeros(256, dtype=torch.int64))
    scale_bytes: Tensor = field(default_factory=lambda: torch.zeros(256, dtype=torch.int64))
    global_scales: dict[int, float] = field(default_factory=dict)
    magnitudes: dict[int, float] = field(default_factory=dict)
    zero_experts: list[int] = field(default_factory=list)

    @property
    def blocks(self) -> int:
        """Blocks of 16 values."""
        return int(self.scale_bytes.sum())

    @property
    def zero_blocks(self) -> int:
        """Blocks whose scale is 0: all their values are."""
        return int(self.scale_bytes[_ZERO_SCALES].sum())

    @property
    def subnormal_blocks(self) -> int:
        """Blocks whose scale is below 2^-6 and not 0: it has less than e4m3's three bits of precision."""
        return int(self.scale_bytes[_SUBNORMAL_SCALES].sum())

    @property
    def saturated_blocks(self) -> int:
        """Blocks whose scale is 448, the largest there is."""
        return int(self.scale_bytes[_LARGEST_SCALE])

    @property
    def all_powers_of_two(self) -> bool:
        """Every block scale is a power of two or 0, as after a cast from MXFP4: even a subnormal one is then exact."""
        return not any(count for byte, count in enumerate(self.scale_bytes.tolist()) if byte not in _POWERS_OF_TWO)

    def scale_range(self) -> tuple[float, float] | None:
        """Smallest and largest block scale that is not 0, None without any."""
        present = [byte for byte, count in enumerate(self.scale_bytes[:0x80].tolist()) if byte and count]
        if not present:
            return None
        low, high = torch.tensor([present[0], present[-1]], dtype=torch.uint8).view(torch.float8_e4m3fn).tolist()
        return low, high

    def scales_by_power(self) -> dict[int, int]:
        """n -> blocks whose scale is in ``[2^n, 2^(n+1))``, for n from -9 to 8; zero blocks are not among them."""
        powers = dict.fromkeys(range(-9, 9), 0)
        for byte, count in enumerate(self.scale_bytes[1:0x7F].tolist(), start=1):
            # Three bits of mantissa; the subnormals 1, 2-3, 4-7 are multiples of 2^-9.
            powers[(byte >> 3) - 7 if byte >= 8 else byte.bit_length() - 10] += count
        return powers

    def codes(self) -> list[int]:
        """How often each of the 16 e2m1 codes occurs."""
        pairs = self.code_bytes.view(16, 16)  # high nibble, low nibble
        counts: list[int] = (pairs.sum(dim=0) + pairs.sum(dim=1)).tolist()
        return counts

    def add(self, expert: int, codes: Tensor, sf: Tensor, gs: Tensor) -> None:
        """Count one expert's matrix: codes uint8 ``[N, K/2]``, sf e4m3 ``[N, K/16]``, gs 0-d."""
        code_bytes, scale_bytes = _byte_counts(codes), _byte_counts(sf)
        self.code_bytes += code_bytes
        self.scale_bytes += scale_bytes
        self.global_scales[expert] = float(gs)
        alone = MatrixStatistics(code_bytes, scale_bytes)
        span, counts = alone.scale_range(), alone.codes()
        self.magnitudes[expert] = E2M1_MAX * (span[1] if span else 0.0) * float(gs)
        if span is None or counts[0] + counts[8] == sum(counts):
            self.zero_experts.append(expert)


@dataclass
class InputScales:
    """One projection's activation scales in a layer.

    Attributes:
        present: experts that have the tensor.
        missing: experts that have not.
        values: expert -> usable value (positive, finite); empty where only headers were read.
        unusable: expert -> why its value cannot be used.
    """

    present: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    values: dict[int, float] = field(default_factory=dict)
    unusable: dict[int, str] = field(default_factory=dict)


@dataclass
class LayerStatistics:
    """One layer. Everything from ``matrices`` on is empty where only headers were read.

    Attributes:
        layer: the decoder layer.
        tensors: how many tensors its experts have.
        dtypes: safetensors' name of a dtype -> bytes stored in it.
        scaled: its experts have block scales of their own in NVFP4's way, and so should have input scales.
        unreadable: expert -> the error that names what is wrong.
        input_scales: projection -> its activation scales.
        matrices: projection -> counts.
        gate_up_ratios: expert -> larger over smaller global scale of gate and up, where these differ.
        recoded: the sum of the experts' reports of a cast from MXFP4; None where none has one.
    """

    layer: int
    tensors: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)
    scaled: bool = False
    unreadable: dict[int, str] = field(default_factory=dict)
    input_scales: dict[str, InputScales] = field(default_factory=lambda: {name: InputScales() for name in PROJECTIONS})
    matrices: dict[str, MatrixStatistics] = field(
        default_factory=lambda: {name: MatrixStatistics() for name in PROJECTIONS}
    )
    gate_up_ratios: dict[int, float] = field(default_factory=dict)
    recoded: RecodeReport | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its experts' tensors."""
        return sum(self.dtypes.values())


def layer_statistics(
    checkpoint: Checkpoint, layer: int, *, headers_only: bool, advance: Callable[[], None] = lambda: None
) -> LayerStatistics:
    """Look at every expert of ``layer``.

    Args:
        checkpoint: an open checkpoint.
        layer: one of its ``moe_layers``.
        headers_only: read no values: shapes, dtypes, bytes and which scales are there.
        advance: called after each expert.
    """
    result = LayerStatistics(layer)
    names: set[str] = set()
    for expert in range(checkpoint.num_experts):
        location = checkpoint.location(layer, expert)
        names.update(location.tensors.values())
        _add_header(result, location)
        try:
            if checkpoint.format.shape(checkpoint.source, location) != checkpoint.shape:
                raise CheckpointError(f"{location}: found another shape than {checkpoint.shape}, the first expert's")
            if not headers_only:
                _add_values(result, expert, checkpoint.read_expert(layer, expert))
        except (CheckpointError, InputError) as error:
            result.unreadable[expert] = str(error)
        advance()
    result.tensors = len(names)
    result.dtypes = bytes_by_dtype(checkpoint.source[name] for name in names)
    return result


def bytes_by_dtype(tensors: Iterable[TensorInfo]) -> Counter[str]:
    """Stored bytes of each dtype; those of a dtype that torch lacks are not counted."""
    count: Counter[str] = Counter()
    for info in tensors:
        try:
            size = torch_dtype(info).itemsize
        except CheckpointError:
            size = 0
        for dimension in info.shape:
            size *= dimension
        count[info.dtype] += size
    return count


def _add_header(result: LayerStatistics, location: ExpertLocation) -> None:
    suffixes = set(location.tensors)
    result.scaled |= any(suffix == BLOCK_SCALE_SUFFIX for _, suffix in suffixes)
    for projection, scales in result.input_scales.items():
        there = any((projection, suffix) in suffixes for suffix in INPUT_SCALE_SUFFIXES)
        (scales.present if there else scales.missing).append(location.expert)


def _add_values(result: LayerStatistics, expert: int, weights: ExpertWeights) -> None:
    for projection in PROJECTIONS:
        matrix = weights.projection(projection)
        result.matrices[projection].add(expert, matrix.codes, matrix.sf, matrix.gs)
        scales, scale = result.input_scales[projection], weights.input_scales.get(projection)
        if scale is None:
            continue
        if scale.value is not None:
            scales.values[expert] = scale.value
        elif expert in scales.present:
            scales.unusable[expert] = scale.problem
    gate, up = float(weights.gate.gs), float(weights.up.gs)
    if gate != up:
        result.gate_up_ratios[expert] = max(gate, up) / min(gate, up)
    result.recoded = sum_reports((result.recoded, weights.recoded))


def sum_reports(reports: Iterable[RecodeReport | None]) -> RecodeReport | None:
    """The sum of those that there are, None of none."""
    present = [report for report in reports if report is not None]
    return sum(present, RecodeReport()) if present else None


def _byte_counts(x: Tensor) -> Tensor:
    return x.cpu().contiguous().view(torch.uint8).flatten().bincount(minlength=256)
