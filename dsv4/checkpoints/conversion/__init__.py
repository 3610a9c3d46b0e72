"""A checkpoint in any readable format into ModelOpt's NVFP4 layout: see :func:`convert`.

=================  ===================================================================================================
``plan``           every byte's place, from headers
``scales``         activation scales
``configuration``  what ``config.json`` and the index say afterwards
``journal``        what is finished already, and for what
``shards``         writing and comparing one shard
``workers``        shards over processes
``convert``        all of it together
=================  ===================================================================================================
"""

from dsv4.checkpoints.conversion.convert import RECORD_NAME, ConversionReport, convert
from dsv4.checkpoints.conversion.scales import Activations, Calibration, LayerScales

__all__ = ["RECORD_NAME", "Activations", "Calibration", "ConversionReport", "LayerScales", "convert"]
