"""One command as a member of a group of processes, from meeting the others to leaving them."""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from k2jax.cluster import group as groups
from k2jax.cluster import preflight
from k2jax.cluster.detect import Place
from k2jax.cluster.group import Group
from k2jax.cluster.rendezvous import EXIT_RETRY, Lost, is_loopback
from k2jax.config import ConfigError, MeshConfig, one_line
from k2jax.runtime.versions import set_gloo_address

# What to do after a process was lost: where checkpoints are written, and where nothing is.
RESUME = "the same command on all hosts resumes from the newest checkpoint"
REPEAT = "give the same command on all hosts again"


@contextlib.contextmanager
def member(
    place: Place | None,
    facts: Mapping[str, Any],
    mesh: MeshConfig,
    say: Callable[[str], None],
    out: Path | None = None,
) -> Iterator[Group]:
    """The group that runs this command: connected, compared, and known to jax.

    An error inside of the block, or a lost process, ends all of them; where nothing is written,
    SIGTERM to one does too.

    Args:
        place: of this process; None: it is alone, and nothing happens.
        facts: what all processes must have alike, by name: settings and options.
        mesh: takes all devices of all processes.
        say: called with one line, on process 0.
        out: a folder that all processes write to; None: they write nothing.
    """
    if place is None:
        yield groups.current()
        return
    try:
        group = Group(place, remedy=RESUME if out else REPEAT)
    except Lost as error:
        sys.stderr.write(f"k2jax: {error}\n")
        raise SystemExit(EXIT_RETRY) from None
    _own_stdout(group.number == 0)
    with groups.use(group):
        try:
            preflight.compare(group, facts)
            if out:
                preflight.see_folder(group, out)
            _join(place)
            set_gloo_address(group.address())
            if out is None:
                _exit_on_sigterm(group)
            preflight.devices(group, mesh)
            line = preflight.network(group)
            if group.number == 0:
                say(line)
                if group.refused:
                    say(f"connections that were refused at {place.coordinator}: {group.refused}")
            yield group
            group.close()
        except BaseException as error:
            _leave(group, error)
            raise


def _join(place: Place) -> None:
    """Start jax's own service, which its collectives and checkpoints need."""
    import jax

    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        place.local_devices,
        cluster_detection_method="deactivate",
        # Where all processes are on this machine, no other one can reach the service.
        coordinator_bind_address=place.coordinator if is_loopback(place.coordinator) else None,
    )


def _exit_on_sigterm(group: Group) -> None:
    """Where nothing is saved, SIGTERM to one process ends all.

    jax's service takes it for a notice of preemption, which only a command that saves asks for.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        # Not by raising: where a `with` is being entered, its block would never see that. And in a
        # thread: this one may be sending, and then has the lock of the connection.
        threading.Thread(target=_leave, args=(group, SystemExit(128 + number))).start()

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)


def _own_stdout(first: bool) -> None:
    """Only process 0 prints; and gloo, the network of CPUs, reports on file descriptor 1."""
    sys.stdout.flush()
    silence = os.open(os.devnull, os.O_WRONLY)
    shown = os.dup(1) if first else os.dup(silence)
    os.dup2(silence, 1)
    sys.stdout = os.fdopen(shown, "w", buffering=1)


def _leave(group: Group, error: BaseException) -> None:
    """Tell the others; once jax's service runs, end here, since its own end waits for all."""
    import jax

    if isinstance(error, Lost) or _network_failed(error):
        # Another process died, most likely, and the watch is about to say which and end this one.
        time.sleep(groups.SILENCE + 2 * groups.BEAT)
    code, line = _said(error)
    group.fail(f"process {group.number} ({group.host}) ended: {line}", code)
    if jax.distributed.is_initialized():
        if code == 1:
            traceback.print_exception(error)
        sys.stderr.write(f"k2jax: {line}\n")
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)


def _network_failed(error: BaseException | None) -> bool:
    import jax

    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return "RESOURCE_EXHAUSTED" not in str(error)
        error = error.__cause__ or error.__context__
    return False


def _said(error: BaseException) -> tuple[int, str]:
    """Exit code and line."""
    if isinstance(error, ConfigError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        by_signal = error.code > 128 and f"stopped by {signal.Signals(error.code - 128).name}"
        return error.code, by_signal or f"exit code {error.code}"
    return 1, one_line(error, typed=True)
