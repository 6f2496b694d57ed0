"""A file that holds something else than its name promises is called what it is."""

import json

import pytest

from k2jax.config import ConfigError
from k2jax.text.hf_tokenizer import read_json
from k2jax.text.kimi_tokenizer import Tokenizer
from k2jax.weights.hf_config import published_fields
from k2jax.weights.hf_folder import INDEX, Folder

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 4995584424\n"
READERS = {
    "model.safetensors": Folder,
    INDEX: Folder,
    "config.json": published_fields,
    "tiktoken.model": Tokenizer.load,
    "tokenizer.json": lambda folder: read_json(folder / "tokenizer.json"),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (POINTER, "a Git LFS pointer"),
        ("<!DOCTYPE html><html>Sign in</html>", "a web page"),
        ("Entry not found", "an error message of its server"),
    ],
)
def test_a_pointer_or_a_web_page_in_place_of_a_file_is_named(name, content, named, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=rf"{name} is {named}"):
        READERS[name](tmp_path)


def test_one_pointer_among_whole_files_is_named(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    (tmp_path / "model-1.safetensors").write_text(POINTER)
    with pytest.raises(ConfigError, match=r"model-1.safetensors is a Git LFS pointer"):
        Folder(tmp_path).inspect()
