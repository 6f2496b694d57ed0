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
from k2jax.config import one_line

# What a full disk, quota or file-size limit looks like, also inside TensorStore's messages.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_TEXT = ("No space left on device", "Disk quota exceeded", "File too large")

_tamed = False


def preload_orbax() -> threading.Thread:
    """Import orbax in the background (half a second), so that the first save need not."""
    thread = threading.Thread(target=import_orbax, name="import orbax", daemon=True)
    thread.start()
    return thread


def import_orbax() -> Any:
    """Import orbax; the first time, silence what it logs and also raises."""
    global _tamed  # noqa: PLW0603
    import orbax.checkpoint as ocp

    if not _tamed:
        _tamed = True
        # A failure is logged with its traceback by each thread, and raised: once is enough.
        logging.getLogger("absl").addFilter(_drop_orbax_traceback)
        logging.getLogger("asyncio").addFilter(_drop_unretrieved_exception)
        _silence_late_writes()
    return ocp


def _drop_orbax_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info or "orbax" not in record.pathname


def _drop_unretrieved_exception(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _silence_late_writes() -> None:
    """Let writes that end after a failed save end in silence: nobody waits for them."""
    before = sys.unraisablehook

    def hook(raised: Any) -> None:
        late = isinstance(raised.exc_value, RuntimeError)
        if not (late and str(raised.exc_value) == "Event loop is closed"):
            before(raised)

    sys.unraisablehook = hook


def make_writer(parts: tuple[str, ...]) -> Any:
    """Return orbax's checkpointer that saves these parts in the background, step after step."""
    ocp = import_orbax()
    items = {part: _make_handler(ocp) for part in parts}
    handler = ocp.CompositeCheckpointHandler(**items, **{META: ocp.JsonCheckpointHandler()})
    integrity.record_files(handler)
    return ocp.AsyncCheckpointer(handler)


def _make_handler(ocp: Any) -> Any:
    # In one process, sharing out replicated arrays only costs compiled slices: seconds at the
    # first save. Trained float32 weights hardly compress, and the CPU has other work.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=jax.process_count() > 1)
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=True,
        use_compression=False,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
    )


def make_save_args(flat: Mapping[str, Flat], meta: Mapping[str, Any]) -> Any:
    """Return the arguments of `make_writer(...).save`; chunks follow `split_axes`."""
    ocp = import_orbax()

    def chunks(leaf: jax.Array) -> Any:
        axes = split_axes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize)
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=axes)

    parts = {
        part: ocp.args.PyTreeSave(leaves, save_args={n: chunks(x) for n, x in leaves.items()})
        for part, leaves in flat.items()
    }
    return ocp.args.Composite(**parts, **{META: ocp.args.JsonSave(dict(meta))})


def restore(path: epath.Path, wanted: Flat) -> Flat:
    """Return the arrays of one part, with the layouts and dtypes of `wanted`."""
    ocp = import_orbax()
    how = ocp.checkpoint_utils.construct_restore_args(wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=how)
    return _make_handler(ocp).restore(path, args=args)


def explain_failure(error: BaseException) -> str:
    """Return why a save failed, on one line; a full disk is recognised in any wrapping."""
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
    return one_line(error, typed=True)
