"""Rows in files, one module for each format; what they hold is a part of a source."""
