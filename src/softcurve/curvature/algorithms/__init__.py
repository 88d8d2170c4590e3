"""Estimates, spectra and solutions of a symmetric matrix that is known by its products, as functions of the matrix."""
