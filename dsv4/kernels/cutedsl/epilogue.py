"""What is done to a product's fp32 values before they are written: plain scalar arithmetic, the same on every chip."""

from __future__ import annotations

from dsv4.kernels.cutedsl import ptx

_LOG2E = 1.4426950408889634


def swiglu(gate, up, limit=None):
    """``silu(gate) * up`` in fp32, with the clamps of DeepSeek-V4 (Transformers, ``deepseek_v4``) before it.

    The gate has no lower bound. A NaN in either operand is the result.
    """
    if limit is not None:
        gate = ptx.minimum(gate, limit)
        up = ptx.maximum(ptx.minimum(up, limit), -limit)
    return gate * ptx.reciprocal(1.0 + ptx.exponential2(-_LOG2E * gate)) * up
