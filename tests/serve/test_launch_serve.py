"""Launch templates of servers use real options, and meshes of the devices that they say."""

import re
import shlex
from pathlib import Path

import pytest

from k2jax import cli
from k2jax.commands.loading import read_mesh
from k2jax.commands.serve import check_options

FOLDER = Path(__file__).parents[2] / "docs/launch"


@pytest.mark.parametrize(
    ("name", "devices", "end"), [("serve_gpu.sbatch", 8, "$"), ("serve_tpu.yaml", 16, r"\n +env:")]
)
def test_the_command_in_a_template_is_taken(name, devices, end):
    plain = re.sub(r"\\\n\s*", "", (FOLDER / name).read_text()).replace('"', "")
    command = re.search(rf"k2jax (serve .+?){end}", plain, re.DOTALL | re.MULTILINE)[1]
    parser, _ = cli._build_parser("serve")
    args, rest = parser.parse_known_args(shlex.split(command))
    check_options(args)
    assert not rest and read_mesh(args).devices == devices
    # Beyond loopback only with keys.
    assert args.host == "0.0.0.0" and args.api_key_file
