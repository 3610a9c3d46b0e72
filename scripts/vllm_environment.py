"""Fill the environment that runs this with a vLLM release, without what only a GPU can use: for ``make test-vllm``.

    .venv-vllm/0.33.0/bin/python scripts/vllm_environment.py 0.33.0

vLLM pins a torch for its kernels. The plug-in's tests run none of these, only vLLM's Python code, so torch is the
repository's own, of which pip finds a CPU build where there is one. vLLM's extension modules cannot be loaded beside
that (they need CUDA's libraries); vLLM then imports, warns, and has no kernels and no platform, which the tests make up
for in one place (``tests/vllm_plugin/layers.py``). Everything else that vLLM requires is installed as it asks.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

GPU_ONLY = frozenset(
    {
        "torch",  # installed first
        "torchaudio",
        "torchcodec",
        "torchvision",
        "fastsafetensors",
        "flashinfer-cubin",
        "flashinfer-python",
        "humming-kernels",
        "instanttensor",
        "nvidia-cudnn-frontend",
        "nvidia-cutlass-dsl",
        "nvtx",
        "pynvvideocodec",
        "quack-kernels",
        "tilelang",
        "tokenspeed-mla",
    }
)


def needed(requirements: list[str]) -> list[str]:
    """The requirements of a release that its Python code imports without a GPU; extras are left out."""
    kept = []
    for requirement in requirements:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if name is None or "extra ==" in requirement:
            continue
        if re.sub(r"[-_.]+", "-", name[0]).lower() not in GPU_ONLY:
            kept.append(requirement)
    return kept


def install(*arguments: str) -> None:
    """pip, in this environment, from wherever it is configured to look."""
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("version", help="of vLLM")
    version = parser.parse_args().version
    install("-c", str(ROOT / "constraints.txt"), "torch")
    install("--no-deps", f"vllm=={version}")
    install(*needed(requires("vllm") or []))
    install("pytest", "pytest-timeout", "hypothesis")
    install("--no-deps", "-e", str(ROOT))


if __name__ == "__main__":
    main()
