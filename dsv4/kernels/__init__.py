"""Device kernels, by the language they are written in. Nothing here knows about layers."""
