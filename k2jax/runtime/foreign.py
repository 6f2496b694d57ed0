"""What a file is that does not hold what its name promises."""

# By their first bytes.
FOREIGN = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file: run `git lfs pull` there",
    ),
    (b"<!doctype html", "a web page, not the file: download it again"),
    (b"<html", "a web page, not the file: download it again"),
    (b"Entry not found", "an error message of its server: download it again"),
    (b"PK\x03\x04", "a zip file or a PyTorch pickle, which k2jax does not read"),
    (b"\x80\x02", "a Python pickle, which k2jax does not read"),
    (b"GGUF", "a GGUF file, which k2jax does not read"),
    (b"\x1f\x8b", "packed by gzip: unpack it"),
    (b"\x28\xb5\x2f\xfd", "packed by Zstandard: unpack it"),
)
FOREIGN_BYTES = 32  # that `describe_foreign` needs


def describe_foreign(start: bytes) -> str:
    """What a file is that does not hold what its name promises, from its first bytes; or "".

    Ask only once the content has been refused: a text may begin with any of these bytes.
    """
    start = start.lstrip().lower()
    return next((what for mark, what in FOREIGN if start.startswith(mark.lower())), "")
