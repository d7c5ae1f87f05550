"""The step, the loop and the curriculum."""
