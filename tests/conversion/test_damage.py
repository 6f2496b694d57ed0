"""Damaged folders: one line for every structural fault, never a traceback, never a hang."""

import json
import shutil

import numpy as np
import pytest
from made_up import CONFIG, FP8_CONFIG, content, quantised, read, save, tensors

from k2jax.config import ConfigError
from k2jax.conversion import convert
from k2jax.weights import manifest
from k2jax.weights.hf_folder import INDEX

FAST, ALL = 24, 200
# What no structure tells: only a manifest knows the bytes that should be there.
VALUES = ("data", "config")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    fields = CONFIG | {"quantization_config": FP8_CONFIG}
    folder = save(tmp_path_factory.mktemp("sound") / "src", quantised(tensors(), "fp8"), fields)
    return folder, manifest.make(folder).rename(folder.parent / "sums")


@pytest.fixture(scope="module")
def converted(source):
    target = source[0].parent / "ours"
    convert(source[0], target, format="keep", verify=True)
    return target


def pick(rng, items):
    return items[rng.integers(len(items))]


def flip(rng, path, low, high):
    """Another value for one byte of a file."""
    data = bytearray(path.read_bytes())
    at = int(rng.integers(low, min(high, len(data))))
    data[at] ^= int(rng.integers(1, 256))
    path.write_bytes(data)


BYTES = ("data", "length", "header", "header", "header", "index", "index", "config")
FILES = ("cut", "tail", "empty", "gone", "twin", "swap")
ENTRIES = ("lost entry", "renamed entry", "moved entry")


def damage_source(rng, folder):
    """Change one thing; what kind of thing."""
    kind = pick(rng, [*BYTES, *FILES, *ENTRIES])
    file = pick(rng, sorted(folder.glob("part-*.safetensors")))
    change = damage_bytes if kind in BYTES else damage_file if kind in FILES else damage_entry
    change(rng, kind, file)
    return kind


def damage_bytes(rng, kind, file):
    length = int.from_bytes(file.read_bytes()[:8], "little")
    ranges = {"data": (8 + length, 10**9), "length": (0, 8), "header": (8, 8 + length)}
    others = {"index": INDEX, "config": "config.json"}
    path = file.with_name(others[kind]) if kind in others else file
    flip(rng, path, *ranges.get(kind, (0, 10**9)))


def damage_file(rng, kind, file):
    data = file.read_bytes()
    if kind == "gone":
        file.unlink()
    elif kind == "twin":
        shutil.copyfile(file, file.with_name("part-9.safetensors"))
    elif kind == "swap":
        other = next(f for f in sorted(file.parent.glob("part-*")) if f != file)
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)
    else:
        cut = data[: int(rng.integers(len(data)))]
        file.write_bytes({"cut": cut, "tail": data + bytes(8), "empty": b""}[kind])


def damage_entry(rng, kind, file):
    index = json.loads(file.with_name(INDEX).read_text())
    name = pick(rng, sorted(index["weight_map"]))
    home = index["weight_map"].pop(name)
    if kind == "renamed entry":
        index["weight_map"][name + "x"] = home
    elif kind == "moved entry":
        others = sorted(set(index["weight_map"].values()) - {home})
        index["weight_map"][name] = pick(rng, others)
    file.with_name(INDEX).write_text(json.dumps(index))


def damage_target(rng, folder):
    path = folder / pick(rng, [*manifest.files(folder), manifest.NAME])
    kind = pick(rng, ["flip", "flip", "flip", "cut", "gone", "extra"])
    if kind == "flip" and path.stat().st_size:
        flip(rng, path, 0, 10**9)
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "gone" and path.name != manifest.NAME:
        path.unlink()
    else:
        path.with_name("extra").write_text("x")


def one_line(*args, **options):
    """The message, or "" where the conversion went through."""
    try:
        convert(*args, **options)
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 1_000
        return str(error)
    return ""


def seeds(count):
    return [pytest.param(n, marks=[pytest.mark.slow] if n >= FAST else []) for n in range(count)]


@pytest.mark.parametrize("seed", seeds(ALL * 3 // 4))
def test_damage_to_the_source_is_told_or_harmless(tmp_path, source, converted, seed):
    rng = np.random.default_rng(seed)
    folder = shutil.copytree(source[0], tmp_path / "src")
    kind = damage_source(rng, folder)
    message = one_line(folder, tmp_path / "out", to="hf", format="keep")
    if not message and kind not in VALUES:
        want = read(source[0])
        for name, tensor in read(tmp_path / "out").items():
            assert tensor.tobytes() == want.pop(name).tobytes(), name
        assert not want
    assert one_line(folder, tmp_path / "again", manifest=str(source[1])), kind
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("seed", seeds(ALL // 4))
def test_damage_to_the_target_is_always_found(tmp_path, source, converted, seed):
    target = shutil.copytree(converted, tmp_path / "ours")
    damage_target(np.random.default_rng(seed), target)
    assert content(target) != content(converted) or (
        (target / manifest.NAME).read_bytes() != (converted / manifest.NAME).read_bytes()
    )
    assert one_line(source[0], target, format="keep", verify=True)
