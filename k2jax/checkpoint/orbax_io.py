"""Orbax, set up for our arrays; imported by the first save or restore, or by `preload_orbax`."""

import errno
import logging
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from k2jax.checkpoint import integrity
from k2jax.checkpoint.steps import META
from k2jax.checkpoint.tree import CHUNK_BYTES, Flat, split_axes

# What a full disk, quota or file-size limit looks like, also inside TensorStore's messages.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_TEXT = ("No space left on device", "Disk quota exceeded", "File too large")

_tamed = False


def preload_orbax() -> threading.Thread:
    """Import orbax in the background (half a second), so that the first save need not."""
    thread = threading.Thread(target=orbax, name="import orbax", daemon=True)
    thread.start()
    return thread


def orbax() -> Any:
    """The package, told once to be quiet."""
    global _tamed  # noqa: PLW0603
    import orbax.checkpoint as ocp

    if not _tamed:
        _tamed = True
        # A failure is logged with its traceback by each thread, and raised: once is enough.
        logging.getLogger("absl").addFilter(_untold)
        logging.getLogger("asyncio").addFilter(_awaited)
        _hush()
    return ocp


def _untold(record: logging.LogRecord) -> bool:
    return not record.exc_info or "orbax" not in record.pathname


def _awaited(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _hush() -> None:
    """Let writes that end after a failed save end in silence: nobody waits for them any more."""
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        late = isinstance(found.exc_value, RuntimeError)
        if not (late and str(found.exc_value) == "Event loop is closed"):
            before(found)

    sys.unraisablehook = hook


def writer(parts: tuple[str, ...]) -> Any:
    """Saves steps with these parts in the background, one after the other."""
    ocp = orbax()
    items = {part: _handler(ocp) for part in parts}
    handler = ocp.CompositeCheckpointHandler(**items, **{META: ocp.JsonCheckpointHandler()})
    integrity.guard(handler)
    return ocp.AsyncCheckpointer(handler)


def _handler(ocp: Any) -> Any:
    # In one process, sharing out replicated arrays only costs compiled slices: seconds at the
    # first save. Trained float32 weights hardly compress, and the CPU has other work.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=jax.process_count() > 1)
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=True,
        use_compression=False,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
    )


def save_args(flat: Mapping[str, Flat], meta: Mapping[str, Any]) -> Any:
    """What `writer(...).save` takes; chunks follow `split_axes`."""
    ocp = orbax()

    def chunks(leaf: jax.Array) -> Any:
        axes = split_axes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize)
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=axes)

    parts = {
        part: ocp.args.PyTreeSave(leaves, save_args={n: chunks(x) for n, x in leaves.items()})
        for part, leaves in flat.items()
    }
    return ocp.args.Composite(**parts, **{META: ocp.args.JsonSave(dict(meta))})


def restore(path: epath.Path, wanted: Flat) -> Flat:
    """The arrays of one part, with the layouts and dtypes of `wanted`."""
    ocp = orbax()
    how = ocp.checkpoint_utils.construct_restore_args(wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=how)
    return _handler(ocp).restore(path, args=args)


def cause(error: BaseException) -> str:
    """Why a save failed, on one line; a full disk is recognised in any wrapping."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, OSError) and link.errno in FULL:
            return f"the disk is full ({link.strerror})"
        for text in FULL_TEXT:
            if text in str(link):
                return f"the disk is full ({text})"
    return line(error)


def line(error: BaseException) -> str:
    """The start of an error's message, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
