"""Proof before use: a GPU backend must agree with the reference on this very GPU before it is given real weights.

Kernels are compiled for the machine they run on, by whatever compiler and driver it has; a combination that nobody
tested can be wrong. So each tiling of a backend first multiplies small random weights, under random, skewed and
half-empty routing, and is compared with the reference backend on the device. The verdict is kept on disk under
everything it depends on: GPU, driver, versions and the source of the kernels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dsv4.backends.base import Backend, Call, InputScales, Verdict
from dsv4.backends.reference import ReferenceBackend
from dsv4.config import MoEConfig
from dsv4.errors import BackendError
from dsv4.kernels.cutedsl.cache import dsl_version
from dsv4.nvfp4 import BLOCK
from dsv4.weights import MoEWeights

TOLERANCE = 5e-3
"""Relative L2 between two backends: each may be 3e-3 from the exact result, in independent directions."""

QUANTIZED_TOLERANCE = 5e-2
"""The same in W4A4, where a code of the intermediate may differ next to a midpoint: among 256 values, half of what a
call of one token has, one that moves from 4 to 6 is 2e-2. A scale, fragment or row in a wrong place is far above."""

_EXPERTS, _TOP_K = 64, 2
_SIZE = 1536
"""Hidden and intermediate size: so many blocks of K that every pipeline is filled more than once."""

_TOKENS = (1, 4, 48, 192, 384, 768, 1152, 1536, 2112, 3072, 4096, 8224)
"""Beside the numbers that a backend names, from which on it takes other kernels or shapes: with 64 experts and 2
choices they reach every line of the backends' tables, not at its beginning. tests/kernels compares them."""


@cache
def prove(backend: type[Backend], device: torch.device) -> Verdict:
    """The verdict on ``backend``: from this process, from disk, or from running the check now."""
    verdict = known(backend, device)
    if verdict is None:
        try:
            verdict = _check(backend, device)
        except (BackendError, OSError) as error:  # a kernel that cannot be had today: no word on those that can
            return Verdict(False, f"self-check impossible: {str(error)[:200]}")
        _keep(_path(backend, device), verdict)
    return verdict


def known(backend: type[Backend], device: torch.device) -> Verdict | None:
    """The verdict if it stands on disk; runs nothing."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        entry = json.loads(_path(backend, device).read_text())
        return Verdict(bool(entry["usable"]), str(entry["reason"]))
    return None


def _check(backend: type[Backend], device: torch.device) -> Verdict:
    worst, checked = 0.0, False
    for name, config in _configs():
        if not backend.explain(config, device).usable:  # it will decline a layer like this, too
            continue
        checked = True
        try:
            tolerance = QUANTIZED_TOLERANCE if config.quantizes_activations else TOLERANCE
            for what, got, want in _results(backend, config, device):
                error = ((got - want).norm() / want.norm()).item()
                worst = max(worst, error)
                if not error <= tolerance:  # false for NaN too
                    return Verdict(False, f"self-check failed: {name}, {what}: {error:.1e} from the reference")
        except (torch.OutOfMemoryError, BackendError, OSError):  # say nothing about the kernels, and are not kept
            raise
        except Exception as error:  # whatever a compiler or driver throws is the verdict
            return Verdict(False, f"self-check failed: {name}: {type(error).__name__}: {str(error)[:200]}")
    if not checked:
        return Verdict(False, "self-check impossible: it declines every configuration of it")
    return Verdict(True, f"self-check passed, at most {worst:.1e} from the reference")


def _configs() -> Iterator[tuple[str, MoEConfig]]:
    for name, form, scale, invariant in (
        ("W4A16", "bf16", "token", False),
        ("W4A4, token scales", "nvfp4", "token", False),
        ("W4A4, static scales", "nvfp4", "static", False),  # quantized in GEMM 1's epilogue
        ("W4A16, batch-invariant", "bf16", "token", True),
        ("W4A4, batch-invariant", "nvfp4", "token", True),
    ):
        yield (
            name,
            MoEConfig(
                _EXPERTS,
                _SIZE,
                _SIZE,
                max_num_tokens=max(_TOKENS),
                top_k=_TOP_K,
                activation_format=form,  # type: ignore[arg-type]
                activation_scale=scale,  # type: ignore[arg-type]
                swiglu_limit=2.0,
                batch_invariant=invariant,
            ),
        )


def configurations() -> list[MoEConfig]:
    """Of the layers that the check runs: what is compiled ahead of time for a machine is compiled for these, too."""
    return [config for _, config in _configs()]


def _results(backend: type[Backend], config: MoEConfig, device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    """``(what, this backend's result, the reference's)`` for each kind of call."""
    generator = torch.Generator(device).manual_seed(0)
    weights = _weights(config, device, generator)
    scales = _input_scales(device) if config.quantizes_activations and config.activation_scale == "static" else None
    runs = []
    # The reference keeps a token's bits by multiplying one row at a time: a minute of launches, to no end here.
    for cls, of_cls in ((backend, config), (ReferenceBackend, replace(config, batch_invariant=False))):
        instance = cls(of_cls, device)
        scratch = torch.empty(cls.workspace_bytes(of_cls, device), dtype=torch.uint8, device=device)
        runs.append((instance, instance.pack(weights), scratch))
    for tokens in sorted({*_TOKENS, *runs[0][0].budgets()}):
        x = torch.randn(tokens, _SIZE, dtype=torch.bfloat16, device=device, generator=generator)
        w = torch.rand(tokens, _TOP_K, dtype=torch.float32, device=device, generator=generator) + 0.1
        order = torch.rand(tokens, _EXPERTS, dtype=torch.float32, device=device, generator=generator)
        ids = order.argsort(dim=1)[:, :_TOP_K]
        half = ids % (_EXPERTS // 2)
        half[1::2] = -1
        for kind, routed in (("random", ids), ("skewed", torch.full_like(ids, 3)), ("half empty", half)):
            outs = []
            for instance, packed, scratch in runs:
                out = torch.full((tokens, _SIZE), torch.nan, dtype=torch.bfloat16, device=device)
                instance.run(packed, Call(x, w, routed.contiguous(), input_scales=scales), scratch, out)
                outs.append(out.float())
            yield f"{tokens} tokens, {kind}", outs[0], outs[1]


def _input_scales(device: torch.device) -> InputScales:
    """Different for each expert, around those of normal tokens and of SwiGLU's results under the limit."""
    scales = torch.linspace(1e-3, 2e-3, _EXPERTS, dtype=torch.float32, device=device)
    return InputScales.updated(None, scales, scales.flip(0))


def _weights(config: MoEConfig, device: torch.device, generator: torch.Generator) -> MoEWeights:
    e, h, i = config.num_experts, config.hidden_size, config.intermediate_size

    def draw(n: int, k: int) -> tuple[Tensor, Tensor]:
        codes = torch.randint(0, 256, (e, n, k // 2), dtype=torch.uint8, device=device, generator=generator)
        # Every e4m3 bit pattern from zero over the subnormals to 1.875.
        sf = torch.randint(0, 0x40, (e, n, k // BLOCK), dtype=torch.uint8, device=device, generator=generator)
        return codes, sf.view(torch.float8_e4m3fn)

    gs = torch.rand(e, 3, dtype=torch.float32, device=device, generator=generator) * 0.1 + 0.05
    return MoEWeights(*draw(2 * i, h), gs[:, :2].contiguous(), *draw(h, i), gs[:, 2].contiguous())


def _path(backend: type[Backend], device: torch.device) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "dsv4" / "proof" / f"{backend.name}-{_key(device)}.json"


def _key(device: torch.device) -> str:
    """A digest of everything that the verdict depends on."""
    properties = torch.cuda.get_device_properties(device)
    chip = f"{properties.major}.{properties.minor}, {properties.multi_processor_count} multiprocessors"
    facts = [properties.name, chip, _driver(), torch.__version__, f"DSL {dsl_version()}"]
    try:
        import triton

        facts.append(triton.__version__)
    except ImportError:
        facts.append("no triton")
    return hashlib.sha256("\n".join([*facts, _sources()]).encode()).hexdigest()[:24]


def _driver() -> str:
    """The kernel driver's own word, where it gives one."""
    with contextlib.suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    return "unknown driver"


@cache
def _sources() -> str:
    package = Path(__file__).parents[1]
    files = sorted([*package.glob("kernels/**/*.py"), *package.glob("backends/*.py")])
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _keep(path: Path, verdict: Verdict) -> None:
    """Write beside, then rename; a directory that cannot be written costs the next process a check, nothing more."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({"usable": verdict.usable, "reason": verdict.reason}, file)
        os.replace(file.name, path)
