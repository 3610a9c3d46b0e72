"""One verb a file: quantize, layouts, routing, combine, the grouped GEMM runners and the torch custom op."""
