"""`k2jax convert`: published weights into our checkpoints, and back."""

import argparse
import json
import sys
from typing import Any

from k2jax.config import ConfigError
from k2jax.conversion import convert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `k2jax convert`."""
    parser.add_argument("source", help="a published folder (gs:// too), a run, or a converted one")
    parser.add_argument("target", help="the folder to make; it appears when it is complete")
    parser.add_argument("--to", default="", help="orbax (ours) or hf (safetensors); default: other")
    parser.add_argument(
        "--format",
        default="",
        help="of the weights: keep, bfloat16, float32, fp8, int4, int4-minmax; see the guide",
    )
    parser.add_argument("--mesh", default="", help="data=16,expert=32: cut chunks for this mesh")
    parser.add_argument("--memory", default="2", help="most GB that tensors on their way may take")
    parser.add_argument("--manifest", default="", help="sha256sum list to hold the source against")
    parser.add_argument("--skip-mtp", action="store_true", help="leave out layers past the last")
    parser.add_argument(
        "--model-type", default="", help="of an exported config: deepseek_v3 (default), kimi_k2"
    )
    parser.add_argument(
        "--adapter", default="", help="merge this: a run with adapters, or a folder of PEFT's files"
    )
    parser.add_argument("--verify", action="store_true", help="audit every tensor of the target")
    parser.add_argument("--dry-run", action="store_true", help="read headers only, print the plan")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def main(args: argparse.Namespace) -> int:
    """Convert, and print a report; the exit code."""
    options = {
        key: value
        for key, value in vars(args).items()
        if key
        in (
            "to",
            "format",
            "mesh",
            "manifest",
            "skip_mtp",
            "model_type",
            "adapter",
            "verify",
            "dry_run",
        )
    }
    try:
        options["memory"] = float(args.memory)
    except ValueError:
        raise ConfigError(f"--memory is a number of GB, {args.memory!r} is not") from None
    report = convert(args.source, args.target, say=_say, **options)
    if args.json:
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        sys.stdout.write("".join(f"{key:>16}  {_text(value)}\n" for key, value in report.items()))
    return 0


def _say(line: str) -> None:
    sys.stderr.write(f"k2jax: {line}\n")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
