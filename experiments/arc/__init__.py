"""Making and judging ARC's weights: generate samples, train networks, select one, evaluate it."""

# Of a training that ARC controls, as in Section 4 of its paper.
EPOCHS = 30  # what is called so here: a thirtieth of the steps
DECISIONS = 10  # one every three epochs
