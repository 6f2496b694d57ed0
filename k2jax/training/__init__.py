"""One training step, the loop that runs it, and what watches over a run."""
