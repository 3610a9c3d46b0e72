"""Reading routed experts from safetensors checkpoints, expert by expert.

::

    with open_checkpoint("folder") as checkpoint:
        weights = checkpoint.load_layer(3, range(0, 64), device="cuda")
    moe.prepare_weights_from_stacked(**weights.prepare_arguments())

===============  =====================================================================================================
``files``        which files make up a checkpoint
``source``       named tensors over these files
``naming``       how experts' tensors are called
``index``        layer -> expert -> tensors
``base``         what a format is, and what it gives back
``modelopt``     a format: one file each
``checks``       what formats check alike
``dense``        floating-point experts, quantized
``stacking``     experts into a layer's tensors, and what a missing activation scale means
``quantization`` what the configuration files say
``checkpoint``   all of it together
===============  =====================================================================================================

Needs torch and safetensors; rich only where a progress bar is asked for.
"""

from dsv4.checkpoints.base import (
    ExpertFormat,
    ExpertShape,
    ExpertWeights,
    InputScale,
    LayerWeights,
    MissingScalePolicy,
)
from dsv4.checkpoints.checkpoint import FORMATS, Checkpoint, open_checkpoint
from dsv4.checkpoints.source import TensorInfo, TensorSource

__all__ = [
    "FORMATS",
    "Checkpoint",
    "ExpertFormat",
    "ExpertShape",
    "ExpertWeights",
    "InputScale",
    "LayerWeights",
    "MissingScalePolicy",
    "TensorInfo",
    "TensorSource",
    "open_checkpoint",
]
