"""Hopper (sm_90a) kernels in CuTe DSL: compiled ahead of time, launched from their cubins."""
