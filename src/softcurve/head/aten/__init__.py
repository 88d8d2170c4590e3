"""The elementwise work of a tile in ATen: one module of plain functions per kind of target."""
