"""`k2jax describe`: every parameter of a model, and its counts and FLOPs."""

import argparse
import json
import math
import sys
from typing import Any

from k2jax import configs
from k2jax.config import RunConfig
from k2jax.params.counts import count_flops, count_parameters
from k2jax.params.kimi import declare_kimi
from k2jax.weights.hf_config import published_fields


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `k2jax describe`."""
    parser.add_argument("config", help=f"{', '.join(configs.NAMES)}, or a published config.json")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument(
        "--published", action="store_true", help="the tensors of the published files instead"
    )


def main(args: argparse.Namespace) -> int:
    """Print the description; the exit code."""
    run = configs.configure(args.config, **args.settings)
    if args.published:
        return _print_published(describe_published(run, args.config), args.json)
    description = describe(run)
    if args.json:
        sys.stdout.write(json.dumps(description) + "\n")
        return 0
    for leaf in description["parameters"]:
        sys.stdout.write(
            f"{leaf['name']:28} {tuple(leaf['shape'])!s:26} {leaf['layout']:40}"
            f" {leaf['group']:5} {leaf['published']}\n"
        )
    for key, value in (description["counts"] | description["flops"]).items():
        sys.stdout.write(f"{value:>28,} {key.replace('_', ' ')}\n")
    return 0


def describe_published(run: RunConfig, source: str) -> dict[str, Any]:
    """Every tensor of the published files of a run's model.

    Keys: `name`; `form` ("bf16", "fp8" or "int4"); `sure` (read from the published files, not
    derived); `unlisted` (how many tensors of other parts the files also have); `count`; `bytes`;
    `dtypes` (bytes of each); `tensors` (a list of name, shape, dtype).

    Args:
        run: the run.
        source: what named it: a named run, or a published `config.json` or its folder.
    """
    from k2jax.weights.releases import as_json, published_tensors, release_of, total_bytes

    fields = {} if source in configs.NAMES else published_fields(source)
    release = release_of(source, fields)
    tensors = published_tensors(declare_kimi(run.model), release)
    kinds: dict[str, int] = {}
    listed = as_json(tensors)
    for entry, kind in zip(listed, tensors.values(), strict=True):
        size = math.prod(kind[1]) * kind[0].itemsize
        kinds[entry["dtype"]] = kinds.get(entry["dtype"], 0) + size
    return {
        "name": run.name,
        "form": release.form,
        "sure": release.sure,
        "unlisted": release.unlisted,
        "count": len(tensors),
        "bytes": total_bytes(tensors),
        "dtypes": kinds,
        "tensors": listed,
    }


def _print_published(description: dict[str, Any], as_json: bool) -> int:
    if as_json:
        sys.stdout.write(json.dumps(description) + "\n")
        return 0
    for leaf in description["tensors"]:
        sys.stdout.write(f"{leaf['name']:68} {leaf['dtype']:8} {leaf['shape']}\n")
    sys.stdout.write(f"{description['count']:,} tensors, {description['bytes']:,} bytes\n")
    return 0


def describe(config: RunConfig | str, **settings: Any) -> dict[str, Any]:
    """Return parameters, counts and FLOPs of a model: `k2jax describe` for Python.

    Nothing is allocated. Keys: `parameters` (a list of name, shape, layout on the run's mesh,
    group, published name),
    `counts` and `flops` (see `params.counts`).

    Args:
        config: a config, the name of one, or a published `config.json`.
        **settings: as for `k2jax.configure`.
    """
    run = configs.configure(config, **settings)
    from k2jax.sharding import storage_spec

    table = [
        {
            "name": name,
            "shape": list(leaf.shape),
            "layout": str(storage_spec(leaf.axes)).replace("PartitionSpec", "P"),
            "group": leaf.group,
            "published": leaf.published,
        }
        for name, leaf in declare_kimi(run.model).items()
    ]
    return {
        "name": run.name,
        "parameters": table,
        "counts": count_parameters(run.model),
        "flops": count_flops(run.model, run.data.context),
    }
