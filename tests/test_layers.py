"""Imports point down only, every package is installed, names and sizes stay what they should be."""

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

import k2jax.model

ROOT = Path(__file__).parents[1]
LAYERS = [  # a room may import from lines above its own, never from its own line or below
    {"config", "runtime"},
    {"sharding", "ops", "sandbox"},
    {"params", "text", "checkpoint", "cluster"},
    {"model", "optim", "data"},
    {"weights", "inference", "constrain"},
    {"configs", "conversion", "evals", "serve"},
    {"training"},
    {"planner", "report", "post"},
    {"commands"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def sources():
    for folder, room in (("k2jax", ""), ("sharding", "sharding"), ("configs", "configs")):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            yield file, room or parts[0]


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module == "k2jax":
        return [f"k2jax.{alias.name}" for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_imports_point_down():
    bad = []
    for file, room in sources():
        if room == "__init__":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            for name in imported(node):
                used = name.split(".")[1] if name.startswith("k2jax.") else room
                if used == room:
                    continue
                assert used in RANK, f"{file.name} imports {name}, which has no layer"
                if RANK[used] >= RANK[room]:
                    bad.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not bad


# A family has configs, declarations, a network, and its own way to write tool calls. Verbs in
# `commands` are named as what they call.
SHARED_NAMES = {"kimi.py", "deepseek.py"}


def test_no_two_rooms_have_a_file_of_one_name():
    rooms: dict[str, set[str]] = {}
    for file, room in sources():
        if room != "commands" and file.name != "__init__.py":
            rooms.setdefault(file.name, set()).add(room)
    twice = {name for name, homes in rooms.items() if len(homes) > 1}
    assert twice <= SHARED_NAMES


def test_no_file_is_longer_than_an_evening_allows():
    for folder in ("k2jax", "sharding", "configs", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            lines = len(file.read_text().splitlines())
            assert lines <= 400, f"{file.relative_to(ROOT)} has {lines} lines; at most 400"


def test_every_package_is_installed():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    found = set()
    for top in ("k2jax", "sharding", "configs"):
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            found.add(".".join(parts if top == "k2jax" else ("k2jax", *parts)))
    assert listed == found


def test_shape_letters_are_in_the_legend():
    legend = set(re.findall(r"\b([A-Z]) [a-z]", k2jax.model.__doc__))
    for file in [*(ROOT / "k2jax/model").rglob("*.py"), *(ROOT / "k2jax/ops").rglob("*.py")]:
        for suffix in re.findall(r"\b[a-z]\w*_([A-Z]{2,}|[A-Z]\d?)\b", file.read_text()):
            assert set(re.sub(r"\d", "", suffix)) <= legend, f"{file.name}: _{suffix}"


def test_flax_only_holds_weights():
    """What Flax has announced it will change cannot change under us."""
    allowed = {"Module", "Param", "Variable"}
    for file, _ in sources():
        used = set(re.findall(r"\bnnx\.(\w+)", file.read_text()))
        assert used <= allowed, f"{file.name}: nnx.{sorted(used - allowed)[0]}"


def test_shard_map_lives_where_one_device_is_seen():
    homes = {
        "moe.py",
        "distribute.py",
        "draft.py",
        "attention.py",
        "logits.py",
        "kernel_check.py",
        "paged_attention.py",
        "projection.py",
    }
    users = {file.name for file, _ in sources() if "shard_map(" in file.read_text()}
    assert users <= homes


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("k2jax", ("jax", "flax", "numpy")),
        ("k2jax.cli", ("jax", "flax")),
        ("k2jax.commands.plan", ("jax", "flax", "numpy")),
        ("k2jax.params.kimi", ("jax", "flax", "numpy")),
        ("k2jax.params.route", ("jax", "flax", "numpy")),
        ("k2jax.report", ("jax", "flax", "numpy", "matplotlib")),
        ("k2jax.optim", ("flax", "orbax", "grain", "tokenizers", "tiktoken", "matplotlib")),
        ("k2jax.data", ("jax", "pyarrow", "grain", "array_record")),
        ("k2jax.post.synthesis.pipeline", ("jax", "flax", "numpy", "tiktoken", "tokenizers")),
    ],
)
def test_importing_stays_light(module, absent):
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", ["sharding", "configs"])
def test_source_folders_refuse_to_be_imported_as_themselves(folder):
    code = f"import {folder}"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert f"import k2jax.{folder}, not {folder}" in run.stderr
