"""The Blackwell kernel without its tensor cores, and the backend around it, run on the CPU: a Hopper GPU's tests.

The emulated kernel's PTX (:mod:`kernels.blackwell_emulation`) is translated to C (:mod:`kernels.ptx_on_cpu`): schedule,
boxes, barriers, ragged ends and stores are the compiled kernel's, in random orders of threads and loads. The backend's
Triton kernels are interpreted.
"""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import replace
from functools import cache
from itertools import product
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("cutlass")
pytest.importorskip("triton")

from dsv4.kernels.blackwell import launch
from kernels import ptx_on_cpu
from kernels import test_blackwell_cuda as cuda
from kernels.blackwell_emulated import PLAIN, TILES, EmulatedConfig, needed
from kernels.blackwell_emulation import emulated_ptx
from kernels.interpreter import mend, run

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

MULTIPROCESSORS = 3
"""Fewer than tiles, so that programs have several."""


@cache
def kernel_on_cpu(config: EmulatedConfig, device_index: int) -> ptx_on_cpu.Kernel:
    """What a launch takes for its loader; a GPU machine gets no kernels but those that are needed."""
    assert config in needed()
    return ptx_on_cpu.Kernel(emulated_ptx(config), config.shared_bytes)


def replace_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device, the driver's tensor maps and cubins."""
    monkeypatch.setattr(cuda, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(cuda, "emulated_kernel", kernel_on_cpu)
    monkeypatch.setattr(cuda.EmulatedBackend, "loader", staticmethod(kernel_on_cpu))
    monkeypatch.setattr(launch, "tensor_map", ptx_on_cpu.tensor_map)
    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    replace_gpu(monkeypatch)


@pytest.mark.parametrize("counts", cuda.COUNTS)
@pytest.mark.parametrize(
    "tiles", [name if name in ("64x64", "192x64") else pytest.param(name, marks=pytest.mark.kernels) for name in TILES]
)
def test_plain_products(tiles, counts):
    """As there."""
    cuda.test_plain_products(tiles, counts)


@pytest.mark.kernels
@pytest.mark.parametrize("separate", [False, True])
def test_scales_of_rows_and_halves(separate):
    """As there."""
    cuda.test_scales_of_rows_and_halves(separate)


@pytest.mark.kernels
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("limit", [0.0, 3.0])
def test_swiglu(layout, limit):
    """As there."""
    cuda.test_swiglu(layout, limit)


@pytest.mark.parametrize("tiles", ["64x64", pytest.param("overlapped", marks=pytest.mark.kernels)])
def test_requantization_gives_the_twin_s_bytes(tiles):
    """As there."""
    cuda.test_requantization_gives_the_twin_s_bytes(tiles)


def test_many_experts():
    """As there."""
    cuda.test_many_experts()


LAYERS = list(product(("w4a4-static", "w4a4-token", "w4a4-tensor"), ("output", "before_down")))


@pytest.mark.parametrize(
    ("mode", "place"), [LAYERS[0], *(pytest.param(*layer, marks=pytest.mark.kernels) for layer in LAYERS[1:])]
)
def test_the_layer_matches_the_oracle(mode, place):
    """As there: routing, staging, both products, requantization, combine."""
    run(__file__, mode, place)


@pytest.mark.parametrize(
    ("right", "wrong", "what"),
    [
        (rf"(mov\.b32\s+%r\d+, ){PLAIN.stage_bytes};", rf"\g<1>{PLAIN.stage_bytes + 16};", "nobody goes on"),
        (r"bar\.warp\.sync.*;", "", "AssertionError|more arrivals"),
    ],
    ids=["bytes of a stage", "a warp's signal"],
)
def test_a_broken_kernel_is_found(right, wrong, what, monkeypatch):
    """A barrier that waits for too much; a stage that is freed while lanes still read it."""
    config = replace(PLAIN, wide_out=True)
    text, count = re.subn(right, wrong, emulated_ptx(config))
    assert count
    kernel = ptx_on_cpu.Kernel(text, config.shared_bytes)
    monkeypatch.setattr(cuda, "emulated_kernel", lambda config, device_index: kernel)
    with pytest.raises((RuntimeError, AssertionError)) as error:
        cuda.test_plain_products("64x64", "ragged")
    assert re.search(what, repr(error.value))


if __name__ == "__main__":
    mend()
    with pytest.MonkeyPatch.context() as patch:
        replace_gpu(patch)
        cuda.test_the_layer_matches_the_oracle(*sys.argv[1:], patch)
