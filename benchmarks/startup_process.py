"""One process from importing torch to the end of its first launch: run by ``startup.py``, prints one JSON line.

The clock starts when torch is imported. Nothing else may be imported before.
"""

from __future__ import annotations

import json
import sys
import time

import torch

START = time.perf_counter()
EXPERTS = 8
"""Kernels do not depend on their number; weights of all experts would take longer to draw than what is measured."""


def main(hidden: int, intermediate: int, top_k: int, backend: str) -> None:
    """Build a layer with random weights, run one token, wait; say when what was done and what was loaded for it."""
    spawned: list[str] = []
    programs = ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.system")
    sys.addaudithook(lambda event, args: spawned.append(str(args[0])) if event in programs else None)
    marks = {}

    def mark(name: str) -> None:
        torch.cuda.synchronize()
        marks[name] = round(time.perf_counter() - START, 3)

    device = torch.device("cuda")
    torch.zeros(1, device=device)
    mark("context")

    def draw(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes = torch.randint(0, 256, (EXPERTS, n, k // 2), dtype=torch.uint8, device=device)
        scales = torch.randint(0x28, 0x50, (EXPERTS, n, k // 16), dtype=torch.uint8, device=device)
        return codes, scales.view(torch.float8_e4m3fn), torch.full((EXPERTS,), 0.01, device=device)

    weights = (*draw(2 * intermediate, hidden), *draw(hidden, intermediate))
    mark("weights drawn")

    from dsv4 import Nvfp4MoE

    layer = Nvfp4MoE(
        EXPERTS, hidden, intermediate, 64, top_k, device, backend=backend, activation_format="bf16", swiglu_limit=10.0
    )
    layer.prepare_weights_from_stacked(*weights)
    mark("weights packed")
    x = torch.randn(1, hidden, device=device).bfloat16()
    ids = torch.arange(top_k, device=device).view(1, -1)
    result = layer.run(x, torch.ones(1, top_k, device=device), ids)
    mark("first run")
    if not bool(result.isfinite().all()):
        raise SystemExit("the first result is not finite")
    loaded = [name for name in ("cutlass", "tvm_ffi") if name in sys.modules]
    print(json.dumps({"seconds": marks, "backend": layer.backend_name, "loaded": loaded, "spawned": spawned}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
