"""Sizes that a launch must know too: plain numbers, so that a warm cache needs no DSL."""

MAX_EXPERTS = 512
"""Experts that the table of :mod:`dsv4.kernels.cutedsl.schedule` holds."""

TABLE_BYTES = 4 * 3 * (MAX_EXPERTS + 1)
"""Of that table."""
