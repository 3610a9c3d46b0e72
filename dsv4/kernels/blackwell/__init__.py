"""Blackwell (sm_100, sm_103) kernels in CuTe DSL: compiled ahead of time, checked without the chip, never run on it."""
