"""Benchmarks. Each times its variants in one process, in random order, and reports ratios."""
