"""Rows to fit a head to: from memory, from files and from directories of shards, walked block by block."""
