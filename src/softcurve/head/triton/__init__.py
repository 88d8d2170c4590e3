"""The tile kernels in Triton. ``import triton`` stands in this package alone, which is imported when wanted."""
