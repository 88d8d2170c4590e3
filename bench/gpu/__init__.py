"""Benchmark of the losses on features and a head on a CUDA device: ``python -m bench gpu``."""
