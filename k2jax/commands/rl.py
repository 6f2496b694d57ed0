"""`k2jax rl`: improve a model by rewards for its own samples."""

import argparse
import dataclasses
import sys

from k2jax import cluster, configs
from k2jax.commands.train import choose_folder, run_together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `k2jax rl`; every field of the config, and `--rl.FIELD`, is one too."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "-h", "--help", action=_Help, nargs=0, help="show this and the settings of --rl"
    )
    parser.add_argument(
        "config",
        help="a run's folder or a config's name; `k2jax train CONFIG -h` lists its settings",
    )
    parser.add_argument(
        "--init",
        required=True,
        metavar="WEIGHTS",
        help="what to start from: a run, a checkpoint or a published folder, with its tokenizer;"
        " a checkpoint in the run folder wins over it",
    )
    parser.add_argument(
        "--env",
        required=True,
        metavar="ENV",
        help="what gives rewards: sum2, sort6, tools:FOLDER, math:FILE, code:FILE, code-chat:FILE,"
        " reasoning-gym:NAME, or one's own as FILE.py:FUNCTION",
    )
    parser.add_argument("--out", metavar="DIR", help="run folder; default: runs/CONFIG-rl")
    cluster.add_arguments(parser)


class _Help(argparse.Action):
    """Prints the options, and every setting of `--rl` with its default."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: object
    ) -> None:
        from k2jax.config import each_knob
        from k2jax.post.rl_config import RlConfig

        knobs = each_knob(RlConfig(), "rl.")
        lines = [f"  {f'--{name}':29} {each.describe()} [{value}]" for name, each, value in knobs]
        parser.epilog = "\n".join(["settings (--rl.FIELD VALUE) and their defaults:", *lines])
        parser.print_help()
        parser.exit()


def main(args: argparse.Namespace) -> int:
    """Train; the exit code: 75 where one of several processes was asked to stop before the end."""
    from k2jax.post.rl_config import check_run, configure_rl, split_settings

    settings, own = split_settings(args.settings)
    run = configs.configure(args.config, **settings)
    rl = configure_rl(own)
    check_run(run, rl)
    out = choose_folder(args.out, f"{run.name}-rl")

    def work() -> None:
        from k2jax.post.environment import open_environment
        from k2jax.post.rl import train_rl

        train_rl(run, rl, open_environment(args.env), out, init=args.init, say=_say)

    return run_together(args, run, out, {"rl": dataclasses.asdict(rl), "--env": args.env}, work)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
