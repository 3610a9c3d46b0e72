"""Hopper kernels compiled without a GPU: what instructions they are made of, what they occupy, how they are cached."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from dsv4.backends.hopper import TILINGS
from dsv4.errors import BackendError
from dsv4.kernels.hopper import cache
from dsv4.kernels.hopper.config import HopperConfig

SHARED_OF_SM = 228 * 1024
RESERVED = 1024  # of shared memory, for each program

CONFIGS = [HopperConfig(*tiling.gemm1, gated=True, limited=True) for tiling in TILINGS]


def disassembly(cubin: bytes, folder: Path) -> str:
    triton = pytest.importorskip("triton")
    (folder / "kernel.cubin").write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return subprocess.run([tool, folder / "kernel.cubin"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.tokens}x{64 * c.warpgroups}")
def test_main_loop_is_made_of_the_instructions_meant(config: HopperConfig, tmp_path: Path) -> None:
    """One wgmma for each 16 of K, one 16-byte load for each 64, one packed multiplication for each two weights and two
    for the scales; nothing in local memory."""
    pytest.importorskip("cutlass")
    from dsv4.kernels.hopper.grouped_gemm import compile_kernel

    cubin, _ = compile_kernel(config)
    text = disassembly(cubin, tmp_path)
    count = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*(?:\.128)?)", text, re.M))
    halves = 2 * config.blocks  # 64s of K in a stage
    assert count["HGMMA"] == 4 * halves
    assert count["LDS.128"] == halves
    assert count["HMUL2"] == (16 + 2) * halves
    assert count["UBLKCP"] >= 2 * (config.warpgroups + 1)  # ahead of the tokens, and in the loop
    assert not {"LDL", "STL"} & set(count)
    assert f"HGMMA.64x{config.tokens}x16.F32.BF16" in text


@pytest.mark.parametrize("tiling", TILINGS, ids=lambda t: str(t.rows_per_expert))
def test_programs_fit_a_multiprocessor(tiling) -> None:
    """The programs that a configuration counts on are resident together: shared memory, threads, swizzle alignment."""
    assert tiling.gemm1[0] == tiling.gemm2[0]
    for shape in (tiling.gemm1, tiling.gemm2):
        config = HopperConfig(*shape)
        assert config.programs_per_sm * (config.shared_bytes + RESERVED) <= SHARED_OF_SM
        assert config.programs_per_sm * config.threads <= 2048
        assert config.tokens % 8 == 0
        assert 8 <= config.tokens <= 256


def test_small_matrices_take_the_nearest_configuration() -> None:
    """Where whole tiles do not fit, warpgroups and K blocks are halved until they do."""
    fitted = HopperConfig(8, 4, 4, 2, 1).fitted(rows=128, k=384)
    assert (fitted.warpgroups, fitted.blocks) == (2, 1)


class TestCache:
    """Kernels on disk."""

    @pytest.fixture(autouse=True)
    def stub(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[HopperConfig]:
        """A compiler that only counts."""
        compiled: list[HopperConfig] = []
        monkeypatch.setenv("DSV4_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(cache, "dsl_version", lambda: "1.0")
        monkeypatch.setattr(cache, "_compile", lambda c: (compiled.append(c), (b"cubin", "entry"))[1])
        return compiled

    def test_a_kernel_is_compiled_once(self, stub: list[HopperConfig]) -> None:
        """The second load reads the first one's file; another configuration has its own."""
        assert cache.load(CONFIGS[0]) == cache.load(CONFIGS[0]) == (b"cubin", "entry")
        cache.load(CONFIGS[1])
        assert stub == CONFIGS[:2]

    def test_a_damaged_file_is_built_again(self, stub: list[HopperConfig]) -> None:
        """A flipped bit, a cut file and an empty one are not used."""
        for damage in (lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:40], lambda b: b""):
            cache.load(CONFIGS[0])
            (path,) = cache.folder().iterdir()
            path.write_bytes(damage(path.read_bytes()))
            before = len(stub)
            assert cache.load(CONFIGS[0]) == (b"cubin", "entry")
            assert len(stub) == before + 1

    def test_without_the_dsl_any_version_serves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A cache filled elsewhere is enough; without one the error says what to do."""
        cache.load(CONFIGS[0])
        monkeypatch.setattr(cache, "dsl_version", lambda: None)
        assert cache.load(CONFIGS[0]) == (b"cubin", "entry")
        with pytest.raises(BackendError, match="DSV4_CACHE_DIR"):
            cache.load(CONFIGS[1])

    def test_a_directory_that_cannot_be_written_is_no_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It costs a compilation each time."""
        monkeypatch.setenv("DSV4_CACHE_DIR", "/proc/nowhere")
        assert cache.load(CONFIGS[0]) == (b"cubin", "entry")
