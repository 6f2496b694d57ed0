"""How good a model is: its loss on text that it has not seen, and its answers to tasks."""
