"""The command line: fit, predict, spectrum and explain."""
