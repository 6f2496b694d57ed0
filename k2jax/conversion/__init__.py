"""Published weights into our checkpoints, and back. Light: what works is imported by `convert`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from k2jax.config import ConfigError

Say = Callable[[str], None]


def convert(
    source: str | Path, target: str | Path, *, say: Say | None = None, **options: Any
) -> dict[str, Any]:
    """Convert published weights into one of our checkpoints, or the other way.

    Killed at any moment, the same call goes on; `target` appears, by a rename, when it is complete.

    Args:
        source: a published folder, there or at gs://BUCKET/PATH; a run (its newest checkpoint), or
            a converted checkpoint.
        target: the folder to make. Where it is there already, only `verify` does something.
        say: told each line worth printing.
        **options: `to` ("orbax" or "hf"), `format` ("keep", "bfloat16", "float32", "fp8", "int4",
            "int4-minmax"), `mesh` ("data=16,expert=32"), `memory` (GB of tensors on their way),
            `manifest` (a list of SHA-256 sums to hold the source against), `skip_mtp`, `model_type`
            (of the exported config: "deepseek_v3", "kimi_k2"), `adapter` (a run of `k2jax finetune`
            with adapters, or PEFT's files, to merge), `verify`, `dry_run`.

    Returns:
        What was done; keys are in docs/conversion.md.

    Raises:
        ConfigError: an input is damaged or does not fit, the disk is full, or the audit found a
            difference; one line says where.
    """
    from k2jax.conversion.execute import run
    from k2jax.conversion.prepare import Options, make_plan
    from k2jax.weights.object_store import fetched
    from k2jax.weights.source import LARGEST_COMPANION, is_companion

    began = time.perf_counter()
    try:
        with fetched(str(source), is_companion, LARGEST_COMPANION) as (folder, bucket):
            plan = make_plan(folder, target, Options(**options), bucket)
            return run(plan, say or (lambda line: None), began)
    except OSError as error:
        from k2jax.checkpoint.orbax_io import explain_failure

        why = explain_failure(error)
        raise ConfigError(
            f"converting {source} to {target} stopped: {why}; once that is mended, the same command"
            " goes on"
        ) from error
