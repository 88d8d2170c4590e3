"""Benchmarks. ``python -m bench`` prints the tables; ``bench/RESULTS.md`` contains the measurements."""
