"""Text and tokens: tokenizers, chat templates, conversations, replies with tool calls."""
