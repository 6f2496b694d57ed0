"""Build the wheel, install it into an empty folder, and check its types there.

Type checkers do not follow setup.cfg's package_dir, and only what is installed is what users get.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> int:
    """The type checker's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        pip = [sys.executable, "-m", "pip"]
        subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", folder, str(ROOT)], check=True)
        (wheel,) = Path(folder).glob("k2jax-*.whl")
        subprocess.run(
            [*pip, "install", "-q", "--no-deps", "--target", str(site), wheel], check=True
        )
        missing = [
            name
            for name in ("py.typed", "sharding/rules.py", "configs/tiny.py")
            if not (site / "k2jax" / name).exists()
        ]
        if missing:
            sys.stderr.write(f"the wheel has no k2jax/{missing[0]}\n")
            return 1
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        environment = os.environ | {"MYPYPATH": str(site)}
        return subprocess.run(
            [*command, "-p", "k2jax"], cwd=folder, env=environment, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
