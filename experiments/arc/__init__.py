"""The pipeline that produces and evaluates ARC's weights: generate samples, train, select, evaluate."""

# Schedule of a training run that ARC controls (Section 4 of its paper).
EPOCHS = 30  # evaluation periods per run; an "epoch" is steps / 30
DECISIONS = 10  # per run, one every three epochs
