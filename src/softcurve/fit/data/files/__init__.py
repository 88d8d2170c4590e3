"""Readers of the rows in files of each format."""
