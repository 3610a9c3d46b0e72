"""The expert formats, stated a second time for ``hostile_oracle``: what is legal, and the values it stands for."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .hostile_folder import Stored
from .hostile_oracle import Decoded, Expert, FormatOracle, Refuse

PROJECTIONS = ("gate", "up", "down")
FP32_MAX = float(np.finfo(np.float32).max)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = np.concatenate((E2M1, -E2M1))
E4M3 = np.array([(m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)) for e in range(16) for m in range(8)])
E4M3[127] = np.nan


def _only(expert: Expert, suffixes: tuple[str, ...]) -> None:
    for (projection, suffix), name in expert.items():
        if suffix not in suffixes or projection not in PROJECTIONS:
            raise Refuse(f"{name!r:.80}: {projection} has an unknown {suffix!r}")


def _required(expert: Expert, projection: str, suffix: str) -> str:
    if (projection, suffix) not in expert:
        raise Refuse(f"{projection} has no {suffix}")
    return expert[projection, suffix]


def _matrix(tensor: Stored, dtypes: tuple[str, ...], packed: int, block: int) -> tuple[int, int]:
    if tensor.dtype not in dtypes or len(tensor.shape) != 2:
        raise Refuse("a wrong dtype, or no matrix")
    rows, columns = tensor.shape[0], packed * tensor.shape[1]
    if not rows or not columns or columns % block:
        raise Refuse("sizes that are no blocks")
    return rows, columns


def _expert_shape(shapes: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    if shapes["gate"] != shapes["up"] or shapes["gate"] != shapes["down"][::-1]:
        raise Refuse(f"matrices that do not fit: {shapes}")
    inter, hidden = shapes["gate"]
    return hidden, inter


def _codes(tensor: Stored) -> np.ndarray:
    codes = np.frombuffer(tensor.data, np.uint8).reshape(tensor.shape)
    return E2M1[np.stack((codes & 15, codes >> 4), -1)].reshape(tensor.shape[0], -1)


@dataclass(frozen=True)
class Nvfp4Oracle:
    """Codes u8, block scales e4m3, a global and an input scale f32 (the latter not judged by value)."""

    weight: str
    block: str
    scale: str
    input: str
    divisor: bool

    def shape(self, expert: Expert, tensors: Mapping[str, Stored]) -> tuple[int, int]:
        _only(expert, (self.weight, self.block, self.scale, self.input))
        shapes = {}
        for projection in PROJECTIONS:
            weight, block, scale = (
                tensors[_required(expert, projection, suffix)] for suffix in (self.weight, self.block, self.scale)
            )
            optional = expert.get((projection, self.input))
            for number in (scale, *([tensors[optional]] if optional else [])):
                if number.dtype != "F32" or number.shape not in ((), (1,)):
                    raise Refuse("a scale that is not one fp32 number")
            rows, columns = shapes[projection] = _matrix(weight, ("U8",), 2, 16)
            if block.dtype != "F8_E4M3" or block.shape != (rows, columns // 16):
                raise Refuse("block scales that do not fit")
        return _expert_shape(shapes)

    def decode(self, expert: Expert, tensors: Mapping[str, Stored], projection: str) -> Decoded:
        name = expert[projection, self.scale]
        (stored,) = struct.unpack("<f", tensors[name].data)
        if not 0 < stored < math.inf:
            raise Refuse(f"a global scale of {stored}", name)
        with np.errstate(over="ignore"):
            gs = float(np.float32(1) / np.float32(stored)) if self.divisor else stored
        if gs * 2688 > FP32_MAX:
            raise Refuse(f"a global scale of {gs}, which decodes to Inf")
        scale = tensors[expert[projection, self.block]]
        scales = np.frombuffer(scale.data, np.uint8).reshape(scale.shape)
        if ((scales & 0x7F) == 0x7F).any() or (scales > 0x80).any():
            raise Refuse("a NaN or negative block scale", expert[projection, self.block])
        values = _codes(tensors[expert[projection, self.weight]])
        return Decoded(values * E4M3[scales & 0x7F].repeat(16, 1) * gs)


class Mxfp4Oracle:
    """Codes i8 or u8, block scales e8m0 or u8 for 32 values."""

    def shape(self, expert: Expert, tensors: Mapping[str, Stored]) -> tuple[int, int]:
        _only(expert, ("weight", "scale"))
        shapes = {}
        for projection in PROJECTIONS:
            weight, scale = (tensors[_required(expert, projection, suffix)] for suffix in ("weight", "scale"))
            rows, columns = shapes[projection] = _matrix(weight, ("I8", "U8"), 2, 32)
            if scale.dtype not in ("F8_E8M0", "U8") or scale.shape != (rows, columns // 32):
                raise Refuse("block scales that do not fit")
        return _expert_shape(shapes)

    def decode(self, expert: Expert, tensors: Mapping[str, Stored], projection: str) -> Decoded:
        name = expert[projection, "scale"]
        scale = tensors[name]
        exponents = np.frombuffer(scale.data, np.uint8).astype(int).reshape(scale.shape) - 127
        if (exponents == 128).any():
            raise Refuse("a NaN block scale", name)
        values = _codes(tensors[expert[projection, "weight"]])
        used = exponents.repeat(32, 1)[values != 0]
        exact = used.size == 0 or used.max() - used.min() <= 17
        # What lies outside is rounded to a multiple of the smallest scale of a tensor with these largest values.
        coarse = 0.0 if exact else 0.5 * 2.0 ** (int(used.max()) - 17)
        doubt = "beyond fp32" if used.size and used.max() > 110 else ""
        return Decoded(values * 2.0 ** exponents.repeat(32, 1), coarse, doubt)


@dataclass(frozen=True)
class DenseOracle:
    """bf16, fp16 or fp32, one matrix a tensor or all of a layer; compared within what quantizing can cost."""

    dtypes: Mapping[str, str] = field(default_factory=lambda: {"F32": "<f4", "F16": "<f2", "BF16": "<u2"})

    def shape(self, expert: Expert, tensors: Mapping[str, Stored]) -> tuple[int, int]:
        if ("gate_up", "") not in expert and ("down", "") not in expert:
            _only(expert, ("weight",))
            stored = {projection: tensors[_required(expert, projection, "weight")] for projection in PROJECTIONS}
            return _expert_shape(
                {projection: _matrix(tensor, tuple(self.dtypes), 1, 16) for projection, tensor in stored.items()}
            )
        gate_up, down = (tensors[_required(expert, projection, "")] for projection in ("gate_up", "down"))
        if gate_up.dtype not in self.dtypes or down.dtype not in self.dtypes or len(gate_up.shape) != 3:
            raise Refuse("a wrong dtype, or no three dimensions")
        count, rows, hidden = gate_up.shape
        if not rows or not hidden or rows % 32 or hidden % 16 or down.shape != (count, hidden, rows // 2):
            raise Refuse("sizes that do not fit")
        return hidden, rows // 2

    def decode(self, expert: Expert, tensors: Mapping[str, Stored], projection: str) -> Decoded:
        if projection == "down":
            joint = values = self._values(expert, tensors, "down")
        else:
            halves = {half: self._values(expert, tensors, half) for half in ("gate", "up")}
            values, joint = halves[projection], np.concatenate(list(halves.values()))
        amax = np.abs(values.reshape(values.shape[0], -1, 16)).max(-1).repeat(16, 1)
        # Half of e2m1's widest step and the rounding of the scale; the smallest block scale; the smallest global one.
        tolerance = 0.2 * amax + 5e-6 * np.abs(joint).max() + 2688 * 2.0**-100
        return Decoded(values, tolerance, "near fp32's end" if np.abs(joint).max() > 3e38 else "")

    def _values(self, expert: Expert, tensors: Mapping[str, Stored], projection: str) -> np.ndarray:
        fused = ("down", "") in expert
        name = expert["down" if projection == "down" else "gate_up", ""] if fused else expert[projection, "weight"]
        tensor = tensors[name]
        raw = np.frombuffer(tensor.data, self.dtypes[tensor.dtype]).reshape(tensor.shape)
        if tensor.dtype == "BF16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        if fused:
            raw = raw[expert.number]
            if projection != "down":
                raw = raw[: raw.shape[0] // 2] if projection == "gate" else raw[raw.shape[0] // 2 :]
        if not np.isfinite(raw).all():
            raise Refuse("a NaN or Inf among the weights", name)
        return raw.astype(np.float64)


ORACLES: Mapping[str, FormatOracle] = {
    "modelopt-nvfp4": Nvfp4Oracle("weight", "weight_scale", "weight_scale_2", "input_scale", divisor=False),
    "compressed-tensors-nvfp4": Nvfp4Oracle(
        "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", divisor=True
    ),
    "mxfp4": Mxfp4Oracle(),
    "dense": DenseOracle(),
}
