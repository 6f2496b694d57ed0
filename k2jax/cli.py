"""The command line: `k2jax VERB ...`. Help and mistakes answer before jax loads."""

import argparse
import importlib
import sys
from typing import NoReturn

from k2jax.config import ConfigError, nearest

# Each verb's module has `add_arguments(parser)` and `main(args) -> exit code`.
VERBS = {
    "train": ("k2jax.commands.train", "train a model, or go on training it"),
    "data": ("k2jax.commands.data", "tokenise once, in parallel, what training then reads fast"),
    "evaluate": ("k2jax.commands.evaluate", "perplexity and bits per byte of text"),
    "generate": ("k2jax.commands.generate", "continue a prompt"),
    "convert": ("k2jax.commands.convert", "published weights into our checkpoints, and back"),
    "plan": ("k2jax.commands.plan", "what a run takes on machines that are not here"),
    "report": ("k2jax.commands.report", "one HTML page with the plots of a run"),
    "describe": (
        "k2jax.commands.describe",
        "every parameter: shape, layout, optimizer, published name",
    ),
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0: done; 2: the command line, a config or an input is wrong; 130: interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and not argv[0].startswith("-") and argv[0] not in VERBS:
            raise ConfigError(f"no verb {argv[0]!r}; {nearest(argv[0], VERBS)}")
        args, rest = _parser(argv[0] if argv else "").parse_known_args(argv)
        args.settings = _settings(rest, args)
        return importlib.import_module(VERBS[args.verb][0]).main(args)
    except ConfigError as error:
        sys.stderr.write(f"k2jax: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("k2jax: interrupted\n")
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output left; nothing to say
        return 0


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = _Parser(prog="k2jax", description="Kimi K2 in JAX.", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=_Parser)
    for name, (module, text) in VERBS.items():
        sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name == verb:
            importlib.import_module(module).add_arguments(sub)
    return parser


def _settings(rest: list[str], args: argparse.Namespace) -> dict[str, str]:
    """`--section.field VALUE` pairs, for the verbs that take a config."""
    settings: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in name or not hasattr(args, "config"):
            options = [f"--{key.replace('_', '-')}" for key in vars(args) if key != "verb"]
            raise ConfigError(f"{args.verb} does not take {word!r}; {nearest(word, options)}")
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise ConfigError(f"--{name} needs a value")
        settings[name] = value
    return settings


if __name__ == "__main__":
    sys.exit(main())
