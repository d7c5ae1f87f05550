"""Training: the step, the loop and the curriculum."""
