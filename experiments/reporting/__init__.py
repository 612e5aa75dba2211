"""How results are shown: summaries, tables, figures and HTML pages."""
