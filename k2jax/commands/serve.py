"""`k2jax serve`: answer over HTTP, as the OpenAI API and Kimi's do, with a page to chat.

JAX is imported when there is something to compute, so that help and mistakes answer at once.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2jax import cluster
from k2jax.commands import loading
from k2jax.config import ConfigError

if TYPE_CHECKING:
    from k2jax.inference.engine import Engine
    from k2jax.serve.sampling_fields import Defaults
    from k2jax.serve.service import Service
    from k2jax.weights.source import Source

PACKAGES = ("starlette", "uvicorn", "llguidance")
KEY = "K2JAX_API_KEY"
LOGS = ("none", "requests", "texts")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `k2jax serve`."""
    loading.add_arguments(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", metavar="NAME", help="default: 127.0.0.1, this machine only")
    add("--port", type=int, default=8000, metavar="N", help="0: any that is free; default: 8000")
    add("--name", default="", metavar="NAME", help="of the model; default: its folder's")
    add("--slots", type=int, default=16, metavar="N", help="sequences at once; default: 16")
    add("--queue", type=int, default=256, metavar="N", help="that wait at most; default: 256")
    add(
        "--cache-tokens",
        type=int,
        default=0,
        metavar="N",
        help="tokens whose latents fit in memory, all sequences together; one may have them all;"
        " default: slots times the model's context, at most 4,096 a slot",
    )
    add(
        "--api-key-file",
        default="",
        metavar="FILE",
        help=f"a key a line, any of which opens the server; or set {KEY}; default: open",
    )
    add("--max-body", type=int, default=16, metavar="MB", help="of a request; default: 16")
    add(
        "--fixed-sampling",
        action="store_true",
        help="refuse other sampling than Kimi's API: temperature 1 with thought, 0.6 without",
    )
    add(
        "--log",
        choices=LOGS,
        default="requests",
        help="a line for each request, to stderr; `texts`: prompts and answers too",
    )


def main(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C, then answer what runs; the exit code."""
    check_packages()
    keys = read_keys(args.api_key_file, os.environ.get(KEY, ""))
    check_options(args)
    mesh = loading.read_mesh(args)
    from k2jax.serve import lifecycle

    place = cluster.find(args.coordinator, args.processes, args.process)
    # Before the weights are read, which takes longest. Process 0 answers, the others compute.
    bound = lifecycle.bind(args.host, args.port) if place is None or not place.process else None
    with loading.opened(args, mesh, inference=True) as (group, source):
        engine = make_engine(args, source)
        if bound is None:
            engine.warm_up()
            with lifecycle.pass_signals_on(group, write_line):
                engine.follow()
            return 0
        with engine:
            service = make_service(args, source, engine, keys)

            def on_start() -> None:
                announce(args, service, bound)

            lifecycle.run(service, bound, on_start, group, engine.drain)
    return 0


def check_packages() -> None:
    """See that the extra's packages are there.

    Raises:
        ConfigError: one is not.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"serve needs {missing[0]}: pip install 'k2jax[serve]'")


def check_options(args: argparse.Namespace) -> None:
    """Refuse numbers that cannot work.

    Raises:
        ConfigError: names the first.
    """
    least = {"slots": 1, "queue": 1, "cache_tokens": 0, "max_body": 1, "port": 0}
    for name, bound in least.items():
        if (value := getattr(args, name)) < bound:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} is {value}; it must be at least {bound}")
    if args.port > 65_535:
        raise ConfigError(f"--port is {args.port}; it must be at most 65535")


def read_keys(file: str, environment: str) -> tuple[str, ...]:
    """API keys: the lines of a file, or one from the environment.

    Raises:
        ConfigError: the file is missing or has none.
    """
    if not file:
        return (environment.strip(),) if environment.strip() else ()
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"--api-key-file {file} cannot be read") from None
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise ConfigError(f"--api-key-file {file} has no key; write one a line")
    return keys


def make_engine(args: argparse.Namespace, source: "Source") -> "Engine":
    """The engine with the model's weights."""
    from k2jax.inference.engine import Engine
    from k2jax.inference.request import EngineSettings

    settings = EngineSettings(rows=args.slots, queue=args.queue, cache_tokens=args.cache_tokens)
    return Engine(source.load(args.dtype, args.weights), settings)


def make_service(
    args: argparse.Namespace, source: "Source", engine: "Engine", keys: tuple[str, ...]
) -> "Service":
    """What is served, and how."""
    from k2jax.constrain.vocabulary import open_vocabulary
    from k2jax.serve.service import MEGABYTE, Limits, ModelCard, Service

    if source.tokenizer is not None:
        with contextlib.suppress(ConfigError):  # a tokenizer without Kimi's marks has no calls
            _ = open_vocabulary(source.tokenizer).ll_tokenizer  # takes seconds, once
    path = str(args.checkpoint).rstrip("/")
    names = (args.name or Path(path).resolve().name, path)
    card = ModelCard(
        names,
        source.tokenizer,
        source.config.vocab,
        engine.context,
        f"k2jax-{source.identity[:12]}",
    )
    return Service(
        engine,
        card,
        read_defaults(source.folder, args.fixed_sampling),
        Limits(body=args.max_body * MEGABYTE),
        keys,
        hosts=LOOPBACK if args.host in LOOPBACK and not keys else (),
        log=None if args.log == "none" else write_line,
        log_texts=args.log == "texts",
    )


def read_defaults(folder: Path, fixed: bool) -> "Defaults":
    """Sampling where a request does not say: as the folder's `generation_config.json` has it.

    Raises:
        ConfigError: the file is malformed.
    """
    from k2jax.serve.sampling_fields import Defaults
    from k2jax.text.hf_tokenizer import read_json

    file = folder / "generation_config.json"
    fields: dict[str, Any] = read_json(file) if file.is_file() else {}
    known: dict[str, Any] = {}
    for name, most in (("temperature", 2), ("top_p", 1), ("top_k", 2**31)):
        value = fields.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            raise ConfigError(f"{file}: {name} is {json.dumps(value)}; it must be 0..{most}")
        known[name] = value
    return Defaults(**known, fixed=fixed)


def announce(args: argparse.Namespace, service: "Service", bound: socket.socket) -> None:
    """Say where the server is, on stdout: programs wait for this line."""
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if host not in LOOPBACK and not service.keys:
        write_line(f"anyone who reaches {shown}:{port} is answered; set {KEY} or --api-key-file")
    sys.stdout.write(f"serving {service.card.names[0]} at http://{shown}:{port}\n")
    sys.stdout.flush()


def write_line(line: str) -> None:
    """Log to stderr."""
    sys.stderr.write(f"k2jax: {line}\n")
    sys.stderr.flush()
