"""Models as the loop sees them: weights, scoring, the run's other models."""
