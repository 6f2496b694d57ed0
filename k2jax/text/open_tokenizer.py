"""What a published folder says of its text: its tokenizer, with its own chat template."""

import os
from pathlib import Path

from k2jax.text import hf_tokenizer as hf
from k2jax.text import kimi_tokenizer as kimi
from k2jax.text.interface import TokenizerLike
from k2jax.text.jinja_template import FolderTemplate


def open_tokenizer(folder: str | os.PathLike[str]) -> TokenizerLike | None:
    """The tokenizer of a folder, with the folder's chat template if it has one.

    `tiktoken.model` wins over `tokenizer.json`. Kimi's tokenizer keeps K2's template where the
    folder has none; others then have none.

    Returns:
        None where the folder has no tokenizer.

    Raises:
        ConfigError: a file is malformed; one line says which.
    """
    folder = Path(folder)
    opened: TokenizerLike
    if (folder / kimi.FILE).is_file():
        opened = kimi.Tokenizer.load(folder)
    elif (folder / hf.FILE).is_file():
        opened = hf.HfTokenizer.load(folder)
    else:
        return None
    opened.template = FolderTemplate.load(folder, opened.specials) or opened.template
    return opened
