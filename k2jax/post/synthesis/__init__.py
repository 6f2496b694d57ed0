"""Agentic data: typed worlds, tools that act on them, tasks, simulated users, a judge.

Every stage is a file of JSON lines; `pipeline.synthesise` makes them all. Nothing here needs jax.
Source: [K2-TR] section 3.1.1, the pipeline of tools, agents, tasks, trajectories and a filter.
"""
