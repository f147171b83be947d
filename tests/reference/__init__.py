"""Slow, plain, float64 versions of the numerics, written from the papers and the format
descriptions, not from the code under test."""
