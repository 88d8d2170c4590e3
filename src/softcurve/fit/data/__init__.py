"""Sources of rows in memory, in files and in directories of shards, which are read block by block."""
