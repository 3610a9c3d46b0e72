"""vLLM: :class:`~dsv4.moe.Nvfp4MoE` behind vLLM's NVFP4 experts, ModelOpt's and compressed-tensors'.

Installing dsv4 beside vLLM is all it takes: vLLM calls :func:`register` in each of its processes (entry point group
``vllm.general_plugins``). ``DSV4_VLLM=0`` in the environment leaves everything to vLLM. See ``docs/vllm.md``.

vLLM has no registry for NVFP4 expert kernels of others, but a layer class of its own can be replaced: its container of
routed experts. Ours asks vLLM for the quantization method of a layer as always. Where that is one of the two NVFP4
methods, and this library can compute what the layer computes, a subclass takes its place. Parameters, loaders, routing,
shared experts and communication stay vLLM's; what is ours is the weights after loading and the computation.

=================  ====================================================================================================
``gate``           which vLLM is known, and whether its interface is still the one we know
``parameters``     what vLLM's parameters hold, in plain torch
``takeover``       which layers are taken, why others are not
``methods``        the two quantization methods
``experts``        the kernel object that vLLM calls
``layer``          the replaced layer class
=================  ====================================================================================================

Only ``gate`` and ``parameters`` can be imported without vLLM.
"""

from __future__ import annotations

import logging
import os

from torch import nn

from dsv4.integrations.vllm.gate import interface_problem, version_problem
from dsv4.moe import Nvfp4MoE

# A child of vLLM's own logger: it has no other that is shown.
_log = logging.getLogger("vllm.dsv4")

SWITCH = "DSV4_VLLM"
"""The environment variable that turns the plug-in off (``0``)."""


def register() -> None:
    """Replace vLLM's container of routed experts. Called by vLLM, possibly more than once; never raises.

    An unknown version of vLLM, or one whose interface is not the one expected, is left as it is, with a warning.
    """
    if os.environ.get(SWITCH, "1") == "0":
        _log.info("dsv4: off (%s=0)", SWITCH)
        return
    try:
        problem = version_problem() or interface_problem() or _install()
    except Exception as error:  # an extension may not take a server down
        problem = f"{type(error).__name__}: {error}"
    if problem:
        _log.warning("dsv4: NVFP4 experts are left to vLLM: %s", problem)


def moe_layers(model: nn.Module) -> dict[str, Nvfp4MoE]:
    """The layers of a loaded vLLM model that dsv4 computes, by name: none means that vLLM computes them all.

    For ``LLM.apply_model``, which runs a function in every worker.
    """
    found = {name: getattr(module, "quant_method", None) for name, module in model.named_modules()}
    layers = {name: getattr(method, "nvfp4_moe", None) for name, method in found.items()}
    return {name: moe for name, moe in layers.items() if isinstance(moe, Nvfp4MoE)}


def _install() -> str | None:
    from dsv4.integrations.vllm.layer import install

    return install()
