"""Benchmarks: ``python -m bench`` prints every table; ``bench/RESULTS.md`` keeps the figures."""
