"""The laboratory: real training runs that put the claims of the papers to an honest test."""
