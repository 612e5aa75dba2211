"""Benchmarks: each compares its sides in one run and gives ratios, not absolute times."""
