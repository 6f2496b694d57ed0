"""Run the README's shell commands as printed, in its order, from the project's root.

A block that starts with ```sh is run line by line; `make train` and `make test` are left out,
because .ci/run calls them itself. Blocks marked ```console are not commands to run here.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"make train", "make test", "make test-all"}


def commands(text: str) -> list[str]:
    """The lines of every ```sh block, continuation lines joined, comments left out."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line.split("  #")[0].strip() for line in lines]
    return [line for line in lines if line and not line.startswith("#")]


def main() -> int:
    """0 when every command succeeded."""
    path = f"{ROOT / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
    for command in commands((ROOT / "README.md").read_text()):
        if command in ELSEWHERE:
            continue
        sys.stdout.write(f"$ {command}\n")
        sys.stdout.flush()
        began = time.perf_counter()
        code = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, env=os.environ | {"PATH": path}, check=False
        ).returncode
        sys.stdout.write(f"  exit {code} after {time.perf_counter() - began:.1f} s\n")
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
