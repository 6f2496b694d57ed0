"""The command line: `k2jax VERB ...`. Help and mistakes answer before jax loads."""

import argparse
import difflib
import importlib
import io
import os
import re
import sys
from typing import NoReturn

from k2jax.config import ConfigError, field_names, nearest, suggest

CLOSE = 0.75  # difflib's ratio from which an option counts as meant

# Each verb's module has `add_arguments(parser)` and `main(args) -> exit code`.
VERBS = {
    "train": ("k2jax.commands.train", "train a model, or resume a run"),
    "finetune": ("k2jax.commands.finetune", "learn from conversations, from weights that exist"),
    "rl": ("k2jax.commands.rl", "improve a model by rewards for its own samples"),
    "data": ("k2jax.commands.data", "tokenise a data set once, in parallel, for fast training"),
    "evaluate": ("k2jax.commands.evaluate", "score text, or answers to benchmarks"),
    "generate": ("k2jax.commands.generate", "continue a prompt or answer a conversation"),
    "serve": ("k2jax.commands.serve", "answer over HTTP, with a page to chat"),
    "synth": ("k2jax.commands.synth", "make tools, tasks and conversations to train agents on"),
    "convert": ("k2jax.commands.convert", "convert published weights to our format, and back"),
    "plan": (
        "k2jax.commands.plan",
        "estimate memory, time and cost on hardware you don't have",
    ),
    "report": ("k2jax.commands.report", "write one HTML page with the plots of a run"),
    "describe": (
        "k2jax.commands.describe",
        "list every parameter: shape, layout, optimizer, published name",
    ),
}


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without printing the usage first."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0: done; 2: the command line, a config or an input is wrong; 130: interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    _print_any_text()
    try:
        if argv and not argv[0].startswith("-") and argv[0] not in VERBS:
            raise ConfigError(f"no verb {argv[0]!r}; {nearest(argv[0], VERBS)}")
        if argv.count("--") > 1:  # argparse makes a list of the word between two of them
            raise ConfigError("'--' is there more than once; after the first all words are names")
        parser, options = _build_parser(argv[0] if argv else "")
        args, rest = parser.parse_known_args(argv)
        args.settings = _read_settings(rest, args, options)
        return importlib.import_module(VERBS[args.verb][0]).main(args)
    except ConfigError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("k2jax: interrupted\n")
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            sys.stderr.close()  # the reader of our output left; nothing to say
            return 0
        if error.filename is None:
            raise
        return _refuse(f"cannot read or write {os.fsdecode(error.filename)}: {error.strerror}")


def _refuse(mistake: str) -> int:
    """Print a mistake in one line, whatever names are in it; the exit code."""
    line = re.sub(r"[\x00-\x1f\x7f]", lambda control: repr(control[0])[1:-1], mistake)
    sys.stderr.write(f"k2jax: {line}\n")
    return 2


def _print_any_text() -> None:
    """Print what a terminal of another encoding has no character for as stderr does, escaped."""
    stream = sys.stdout
    if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
        stream.reconfigure(errors="backslashreplace")


def _build_parser(verb: str) -> tuple[argparse.ArgumentParser, list[str]]:
    """Return the parser with the options of one verb, and their names."""
    parser = _Parser(prog="k2jax", description="Kimi K2 in JAX.", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=_Parser)
    options: list[str] = []
    for name, (module, text) in VERBS.items():
        sub = verbs.add_parser(
            name, help=text, description=text, allow_abbrev=False, conflict_handler="resolve"
        )
        if name == verb:
            importlib.import_module(module).add_arguments(sub)
            options = [word for word in sub._option_string_actions if word.startswith("--")]
    return parser, options


def _read_settings(rest: list[str], args: argparse.Namespace, options: list[str]) -> dict[str, str]:
    """Return the `--section.field VALUE` pairs, for the verbs that take a config."""
    settings: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in name or not hasattr(args, "config"):
            raise ConfigError(f"{args.verb} does not take {word!r}; {_hint(word, args, options)}")
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise ConfigError(f"--{name} needs a value")
        settings[name] = value
    return settings


def _hint(word: str, args: argparse.Namespace, options: list[str]) -> str:
    """Name the option or the setting that was meant by `word`, or list the options."""
    name = word.partition("=")[0].removeprefix("--")
    if near := difflib.get_close_matches(name, [option[2:] for option in options], 1, CLOSE):
        return f"did you mean '--{near[0]}'?"
    hint = f"there are: {', '.join(option for option in options if option != '--help')}"
    if not hasattr(args, "config"):
        return hint
    setting = suggest(name, field_names()) if word.startswith("--") else ""
    return setting or f"{hint}, --section.field"


if __name__ == "__main__":
    sys.exit(main())
