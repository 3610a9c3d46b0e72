"""Triton kernels, each with the function that launches it. Importing a module here imports Triton."""
