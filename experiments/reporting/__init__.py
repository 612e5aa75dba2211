"""Summaries, tables, figures and HTML reports of results."""
