"""Sizes at which a computation changes its way. Read without jax: the planner counts by them."""

ATTENTION_BLOCK = 512  # queries, and keys, that meet at a time; longer rows go by blocks
LOGITS_BYTES = 2**29  # of float32 logits that a device may hold; more are made in parts
ALIGNED = 8  # rows that are sent to experts: a buffer of them is a multiple of this
ONE_ROUND = 4096  # rows of a buffer that inference grants, so that each expert is read once
LEAST_QUERIES = 64  # of a block of queries, in rows whose scores are whole

# Low-bit weights: rows and columns that share a scale of FP8, inputs that share one of INT4, and
# INT4 values in a word.
BLOCK, GROUP, PER_WORD = 128, 32, 8


def cut_into_query_blocks(length: int) -> list[slice]:
    """Cut a short row into four blocks of queries, which meet the keys up to their last.

    Together they have 5/8 of all scores.
    """
    size = max(-(-length // 4), LEAST_QUERIES)
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]
