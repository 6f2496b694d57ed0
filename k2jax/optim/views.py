"""Which leaves are matrices: specs of others' parameters, and what may be guessed without any."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from k2jax.config import ConfigError, nearest
from k2jax.params.matrices import Matrices, view_declared
from k2jax.params.spec import ParamSpec

# Names whose arrays may have two dims and are no matrices that Muon may move. Whole words, because
# MultiHeadAttention_0.query holds matrices; and two that are also found within words.
NO_MATRIX = {"head", "lmhead", "emb", "wte", "wpe", "scale", "bias", "gain", "vocab", "logits"}
NO_MATRIX_WITHIN = ("embed", "norm")


def names(tree: Any) -> dict[str, Any]:
    """Leaf by name; parts of nested names are joined by dots."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_spec)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _is_spec(node: Any) -> bool:
    return isinstance(node, ParamSpec | Matrices | str)


def assign(params: Any, specs: Any = None, per_head: bool = False) -> dict[str, Matrices | str]:
    """By name: how Muon sees a leaf, or "adam".

    Args:
        params: any tree of arrays.
        specs: a tree of the same names, of ParamSpec, Matrices, or "adam"; it may name more than
            there is. None: arrays with two dims are matrices, those with fewer are Adam's.
        per_head: see queries, and keys with values, as one matrix a head.

    Raises:
        ConfigError: names the leaf that has no spec, a wrong one, or that is not clearly a matrix.
    """
    known = None if specs is None else names(specs)
    if known is not None and (not known or isinstance(specs, str)):
        raise ConfigError(f"specs is {specs!r}; it must be a tree with the parameters' names")
    views: dict[str, Matrices | str] = {}
    for name, leaf in names(params).items():
        if known is None:
            views[name] = _guess(name, np.shape(leaf))
        elif name not in known:
            raise ConfigError(f"parameter {name!r} has no spec; {nearest(name, known)}")
        else:
            views[name] = _read(name, np.shape(leaf), known[name], per_head)
    return views


def _guess(name: str, shape: tuple[int, ...]) -> Matrices | str:
    if len(shape) > 2:
        raise ConfigError(
            f"parameter {name!r} has shape {shape}, which is no plain matrix: give `specs` that"
            " say which of its dims stack"
        )
    words = set(re.split("[^a-z]+", name.lower()))
    within = any(part in name.lower() for part in NO_MATRIX_WITHIN)
    return "adam" if len(shape) < 2 or words & NO_MATRIX or within else Matrices()


def _read(name: str, shape: tuple[int, ...], spec: Any, per_head: bool) -> Matrices | str:
    if isinstance(spec, ParamSpec):
        spec = view_declared(name, spec, per_head)
    if spec == "adam":
        return "adam"
    if not isinstance(spec, Matrices):
        raise ConfigError(f"the spec of {name!r} is {spec!r}; it must be 'adam' or Matrices")
    if not all(isinstance(part, tuple) for part in (spec.stack, spec.rows, spec.columns)):
        raise ConfigError(f"the spec of {name!r} is {spec}; its dims must be tuples, as (0,)")
    dims = (*spec.stack, *spec.rows, *spec.columns)
    if sorted(dims) != list(range(len(shape))) or not spec.rows or not spec.columns:
        raise ConfigError(
            f"the spec of {name!r} has dims {dims}, its shape is {shape}: rows, columns and stack"
            " must name each dim once"
        )
    return spec


def matrices_only(views: Mapping[str, Matrices | str]) -> dict[str, Matrices]:
    """All of them as matrices.

    Raises:
        ConfigError: names the first one that is none.
    """
    for name, view in views.items():
        if not isinstance(view, Matrices):
            raise ConfigError(
                f"{name!r} under Muon is no matrix (embeddings, heads, norms and biases are not):"
                " give it to Adam, or ask for it by a spec Matrices(...)"
            )
    return {name: view for name, view in views.items() if isinstance(view, Matrices)}
