"""Blackwell (sm_100, sm_103) kernels in CuTe DSL: compiled ahead of time and checked without the chip; never run on it."""
