"""Making and judging ARC's weights: generate samples, train networks, select one, evaluate it."""
