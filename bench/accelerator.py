"""What only an accelerator can tell, in order of worth: `python bench/accelerator.py`.

    python bench/accelerator.py [--minutes 8] [--out FILE] [--only NAME,...] [--small]

For one Hopper GPU; nothing is downloaded. Each result is one JSON line the moment it is there. With
`--out` the lines are also appended to a file, and what the file already has is not measured again.
`--small` takes sizes for a CPU, so that the script itself stays right. A part runs in a process of
its own until it ends, crashes or takes too long, so that none takes the others along.

    python bench/accelerator.py --minutes 8 --out accelerator.jsonl

Rates are floating-point operations of the formula (not of the kernel) a second; `share` is that
over the dense bfloat16 product measured in the same run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from accelerator_parts import PARTS, Line  # noqa: E402, beside this file

DENSE = "dense product"  # the part that the others' shares need


def run_parts(args: argparse.Namespace) -> Iterator[Line]:
    """Run what is left of the parts, each in its own process; yield lines as they come."""
    ends = time.monotonic() + 60 * args.minutes
    ended, dense = _read_results(args.out)
    with tempfile.TemporaryDirectory() as folder:
        for name, part in PARTS.items():
            if name in ended or (args.only and name not in args.only):
                continue
            left = ends - time.monotonic()
            if left < part.least_seconds and not args.small:
                yield {"part": name, "left_out": f"{left:.0f} s are left"}
                continue
            seconds = 600 if args.small else min(left, part.most_seconds)
            for line in _run_part(name, seconds, args, dense, folder):
                dense = line.get("flops_per_second", dense) if name == DENSE else dense
                yield line


def _read_results(path: str) -> tuple[set[str], float]:
    """Parts that ended, and the rate of the dense product; 0 where it is not known."""
    ended, dense = set(), 0.0
    for text in Path(path).read_text().splitlines() if path and Path(path).exists() else ():
        line = json.loads(text)
        ended |= {line["part"]} if line.get("ended") else set()
        dense = line.get("flops_per_second", dense) if line["part"] == DENSE else dense
    return ended, dense


def _run_part(
    name: str, seconds: float, args: argparse.Namespace, dense: float, folder: str
) -> Iterator[Line]:
    """Run one part in a process; the last line says how it ended."""
    began = time.monotonic()
    command = [sys.executable, __file__, "--part", name, "--dense", str(dense)]
    errors = Path(folder, "stderr")
    with errors.open("w+") as stderr:
        process = subprocess.Popen(
            command + ["--small"] * args.small, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        assert process.stdout
        for text in process.stdout:
            yield {"part": name} | json.loads(text)
        code = process.wait()
        late = not timer.is_alive()
        timer.cancel()
    end: Line = {"part": name, "seconds": round(time.monotonic() - began, 1)}
    if not code:
        yield end | {"ended": True}
    elif late:
        yield end | {"error": f"took more than {seconds:.0f} s"}
    else:
        lines = errors.read_text(errors="replace").strip().splitlines()
        yield end | {"error": lines[-1][:500] if lines else f"ended with {code}", "code": code}


def show(lines: Iterable[Line], out: str) -> int:
    """Print the lines, and append them to the file; 1 if a part failed."""
    failed = False
    for line in lines:
        text = json.dumps(line)
        print(text, flush=True)
        if out:
            with Path(out).open("a") as file:
                file.write(text + "\n")
        failed |= "error" in line
    return int(failed)


def main() -> int:
    """Run the parts, or in a process of its own one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", default="", help="file that results are appended to")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[])
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    parser.add_argument("--dense", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [name for name in [*args.only, args.part] if name and name not in PARTS]:
        parser.error(f"no part is called {unknown[0]!r}; there are: {', '.join(PARTS)}")
    if not args.part:
        return show(run_parts(args), args.out)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for line in PARTS[args.part].run(args.small, args.dense):
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
