"""Which vLLM this is, and whether what we touch of it is still there. Imports nothing of vLLM by itself."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

OLDEST, NEWEST = (0, 24), (0, 33)
"""The first and the last minor version that the plug-in is tested with."""


def version_problem(installed: str | None = None) -> str | None:
    """Why this version of vLLM is not served, or None.

    Args:
        installed: a version, by default that of the installed vLLM.
    """
    if installed is None:
        try:
            installed = version("vllm")
        except PackageNotFoundError:
            return "vLLM is not installed as a package, so that its version is not known"
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers is None or not OLDEST <= (int(numbers[1]), int(numbers[2])) <= NEWEST:
        low, high = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
        return f"vLLM {installed} was never tested with this dsv4, which knows {low} to {high}; update dsv4, or vLLM"
    return None


def interface_problem() -> str | None:
    """What of vLLM's interface is not as expected, or None. A missing name raises whatever importing it raises."""
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk
    from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from dsv4.integrations.vllm.experts import Nvfp4Experts
    from dsv4.integrations.vllm.methods import METHODS

    expected: list[tuple[Callable[..., Any], tuple[str, ...]]] = [
        (RoutedExperts._get_quant_method, ("prefix", "quant_config", "moe_config")),
        (
            maybe_make_prepare_finalize,
            ("moe", "quant_config", "routing_tables", "allow_new_interface", "use_monolithic"),
        ),
        (mk.FusedMoEKernel.__init__, ("prepare_finalize", "fused_experts")),
        (mk.FusedMoEExpertsModular.apply, tuple(inspect.signature(Nvfp4Experts.apply).parameters)),
    ]
    theirs: Any
    for theirs in METHODS:
        expected += [
            (theirs.create_weights, ("layer",)),
            (theirs.process_weights_after_loading, ("layer",)),
            (theirs.get_fused_moe_quant_config, ("layer",)),
        ]
    problems = [problem for function, names in expected if (problem := missing_parameters(function, names))]
    if Nvfp4Experts.__abstractmethods__:
        problems.append(f"experts are asked for {', '.join(sorted(Nvfp4Experts.__abstractmethods__))}")
    return "; ".join(problems) or None


def missing_parameters(function: Callable[..., Any], names: tuple[str, ...]) -> str | None:
    """What ``function`` does not take of ``names``, as a sentence, or None."""
    found = inspect.signature(function).parameters
    missing = [name for name in names if name not in found]
    if missing:
        return f"{function.__qualname__} does not take {', '.join(missing)}: found {', '.join(found)}"
    return None
