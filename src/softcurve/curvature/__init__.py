"""Curvature as linear operators."""
