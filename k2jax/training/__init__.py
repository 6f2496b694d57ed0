"""Training: a step of any objective, the loop that takes it, and what watches over a run.

Read `step.py` first, then `loop.py`. A new objective goes to `make_step`, a new concern of a run
is a `Callback` of `fit`.
"""
