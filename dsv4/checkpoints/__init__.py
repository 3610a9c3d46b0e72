"""Reading routed experts from safetensors checkpoints, expert by expert.

::

    with open_checkpoint("folder") as checkpoint:
        weights = checkpoint.load_layer(3, range(0, 64), device="cuda")
    moe.prepare_weights_from_stacked(**weights.prepare_arguments())

``files``        which files make up a checkpoint
``header``       what is in a safetensors file, read strictly
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
=======
======================  ==============================================================================================
``files``, ``hub``      which files make up a checkpoint, here or on the Hub
``source``              named tensors over these files
``naming``              how experts' tensors are called
``index``               layer -> expert -> tensors
``base``                what a format is, and what it gives back
``checks``              what formats check alike
``modelopt``            a format: ModelOpt NVFP4, read and written
``compressed_tensors``  a format: compressed-tensors NVFP4
``nvfp4_layout``        what these two have in common
``mxfp4``               a format: DeepSeek-V4's own release, cast by ``mxfp4_cast``
``dense_format``        a format: bf16, fp16, fp32, quantized by ``dense``
``stacking``            experts into a layer's tensors, and what a missing activation scale means
``quantization``        what the configuration files say
``checkpoint``          all of it together
``statistics``          what codes and scales look like, counted
``findings``            what looks wrong with them
======================  ==============================================================================================

Needs torch and safetensors; rich only where a progress bar is asked for, huggingface_hub only for ids.
"""

from dsv4.checkpoints.base import (
    ExpertFormat,
    ExpertShape,
    ExpertWeights,
    InputScale,
    LayerWeights,
    MissingScalePolicy,
    RecodeReport,
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
    "RecodeReport",
    "TensorInfo",
    "TensorSource",
    "open_checkpoint",
]
