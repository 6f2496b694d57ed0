"""Operations with a fast path a platform and one shared test against a reference."""
