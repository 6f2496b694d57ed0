"""Weights on disk, ours or published: what is in a folder, how it is stored, where it goes."""
