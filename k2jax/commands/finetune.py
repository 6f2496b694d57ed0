"""`k2jax finetune`: learn from conversations, from weights that exist."""

import argparse
from pathlib import Path

from k2jax import configs
from k2jax.commands import train
from k2jax.config import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `k2jax train`, of which `--init` must be named."""
    train.add_arguments(parser)
    for action in parser._actions:
        if action.dest == "init":
            action.required = True
        if action.dest == "out":
            action.help = "run folder; default: runs/CONFIG-sft"


def main(args: argparse.Namespace) -> int:
    """Train as `k2jax train` does, on data of its own and into a folder of its own.

    Raises:
        ConfigError: no data is named: a config's own is what it was pretrained on.
    """
    if "data.path" not in args.settings:
        raise ConfigError("name the conversations to learn from: --data.path FILE")
    if not args.out:
        args.out = str(Path("runs") / f"{configs.load(args.config).name}-sft")
    return train.main(args)
