"""The command ``dsv4``: ``generate``, ``doctor``, ``bench``, ``inspect`` and ``verify``.

=================  ===================================================================================================
``app``            the command line: which commands there are, and how errors leave it
``generate``       a command: options and what is printed; likewise ``doctor``, ``bench``, ...
``_shapes``        the layer shapes that commands know by name
``_modes``         the number formats that are compared, with their labels and colours
``_output``        JSON, tables and files
``_timing``        how anything here is timed
``_layer``         random weights and routings for timing one layer
``_machine``       what this machine is
``_generation``    text from a model, streamed
``_evaluate``      perplexity of a model, and how far it is from another
``_inspection``    what is in a checkpoint, as a document
``_verification``  a backend beside the oracle, stage by stage
``_probes``        weights that make a stage visible
``_oracle``        the experts in float64, from the definitions alone
``_figures``       pictures; likewise ``_histograms``
=================  ===================================================================================================

Nothing heavier than typer is imported before a command runs: ``dsv4 --help`` is quick.
"""

from __future__ import annotations

import sys


def main() -> None:
    """The entry point."""
    try:
        from dsv4.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f'error: the command needs {error.name}: pip install "dsv4[hf]"')
    app(prog_name="dsv4")
