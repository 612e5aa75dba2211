"""Experiments: training runs on real data that test the claims of the papers.

They are not part of the installed package. Run them from the root of a checkout:
``python -m experiments COMMAND``.
"""
