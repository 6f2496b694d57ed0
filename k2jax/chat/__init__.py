"""Tokenizer, and later chat template and tool calls."""
