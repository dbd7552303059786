"""Training: state, step, loop, optimizers, schedules, checkpoints, metrics, progress."""
