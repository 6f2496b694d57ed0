"""Routed experts of one device: sorting, grouped products, and bringing tokens to their experts."""
