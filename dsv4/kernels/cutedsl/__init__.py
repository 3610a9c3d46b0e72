"""What the CuTe DSL kernels of all chips share."""
