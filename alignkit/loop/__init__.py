"""The loop: rounds, steps, checkpoints, evaluation."""
