"""`k2jax synth`: tools, tasks, conversations and a judge's verdicts, for training agents."""

import argparse
import sys

from k2jax.config import ConfigError, nearest
from k2jax.post.synthesis.pipeline import STAGES, Settings, synthesise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `k2jax synth`."""
    usual = Settings()
    parser.add_argument(
        "folder", metavar="OUT", help="folder of the stages' files; the same command resumes"
    )
    parser.add_argument("--tasks", type=int, default=usual.tasks, help=f"default: {usual.tasks}")
    parser.add_argument("--seed", type=int, default=usual.seed, help="of everything drawn")
    parser.add_argument(
        "--samples", type=int, default=usual.samples, help="trajectories of each task; default: 1"
    )
    parser.add_argument(
        "--tools",
        type=int,
        default=usual.tools,
        help=f"of an agent at most; default: {usual.tools}",
    )
    parser.add_argument(
        "--faults",
        type=float,
        default=usual.faults,
        metavar="SHARE",
        help=f"of calls that no service answers; default: {usual.faults:g}",
    )
    parser.add_argument(
        "--spec",
        action="append",
        default=[],
        metavar="FILE",
        help="an MCP tool list or an OpenAPI file, whose tools come on top; repeatable",
    )
    for name, text in (
        ("agent", "that answers; default: the scripted oracle"),
        ("user", "that asks; default: scripted"),
        ("judge", "that judges what the rubric accepts; default: none"),
    ):
        parser.add_argument(
            f"--{name}",
            default="",
            metavar="URL[#MODEL]",
            help=f"OpenAI-compatible endpoint of a model {text}",
        )
    parser.add_argument(
        "--workers", type=int, default=usual.workers, help="conversations with endpoints at a time"
    )
    parser.add_argument(
        "--until", default=STAGES[-1], metavar="STAGE", help=f"last of {', '.join(STAGES)}"
    )


def main(args: argparse.Namespace) -> int:
    """Make the stages; the exit code."""
    if args.until not in STAGES:
        raise ConfigError(f"there is no stage {args.until!r}; {nearest(args.until, STAGES)}")
    settings = Settings(
        tasks=args.tasks,
        seed=args.seed,
        samples=args.samples,
        tools=args.tools,
        faults=args.faults,
        specs=tuple(args.spec),
        agent=args.agent,
        user=args.user,
        judge=args.judge,
        workers=args.workers,
    )
    synthesise(args.folder, settings, args.until, _say)
    return 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
