"""From a path to a model: a run's folder, one of its checkpoints, or published weights."""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path

import jax

from k2jax.checkpoint import Checkpoints
from k2jax.checkpoint.steps import CHECKPOINTS, is_step
from k2jax.config import ConfigError, ModelConfig, RunConfig, from_json
from k2jax.model import Kimi, Model
from k2jax.params.arrays import abstract
from k2jax.params.declare import specs
from k2jax.params.spec import ParamSpec
from k2jax.text.jinja_template import open_tokenizer
from k2jax.weights.converted_read import ConvertedCheckpoint
from k2jax.weights.converted_write import check_files
from k2jax.weights.hf_config import read_published
from k2jax.weights.hf_folder import INDEX, SINGLE, Folder
from k2jax.weights.mapping import check, extra_mtp_prefixes, load_published, place


def load(path: str | Path, dtype: str | None = None) -> Model:
    """The model at `path`, on the mesh in use if there is one.

    Args:
        path: a run's folder (its newest checkpoint), one checkpoint, a converted folder, or a
            published one with `config.json` and safetensors (BF16, F16, F32, FP8 or INT4).
        dtype: "float32" or "bfloat16"; None: as saved, bfloat16 for FP8 and INT4. The router bias
            is always float32.

    Raises:
        ConfigError: there is nothing at `path` that can be loaded; the message says what is.
    """
    source = find(path)
    config = source.config()
    params = source.params(specs(Kimi(config)), dtype)
    return Model(config, params, open_tokenizer(source.folder))


def initial_params(path: str | Path, specs: Mapping[str, ParamSpec]) -> dict[str, jax.Array]:
    """Float32 weights to start a run from, on the mesh in use.

    Args:
        path: as for `load`.
        specs: the parameters of the run's model.

    Raises:
        ConfigError: as `load`, or the weights are of another architecture.
    """
    return find(path).params(specs, "float32")


@dataclasses.dataclass(frozen=True)
class Source:
    """A place to load from.

    Attributes:
        folder: of the run, or the published one; the tokenizer is there.
        step: of the run's checkpoint; None: published weights.
    """

    folder: Path
    step: int | None = None

    def run(self) -> RunConfig | None:
        """The run that made the checkpoint; None for published weights."""
        if self.step is None:
            return None
        meta = Checkpoints(self.folder).meta(self.step)
        if "config" not in meta:
            raise ConfigError(f"checkpoint of step {self.step} in {self.folder} has no config")
        return from_json(meta["config"])

    def config(self) -> ModelConfig:
        """Sizes of the model."""
        if (run := self.run()) is not None:
            return run.model
        config = read_published(self.folder)
        bare = dataclasses.replace(config, mtp_layers=0)
        # What predicts further is often left out, while config.json goes on naming it.
        kept = config.mtp_layers and extra_mtp_prefixes(Folder(self.folder), specs(Kimi(bare)))
        return config if kept else bare

    def params(self, specs: Mapping[str, ParamSpec], dtype: str | None) -> dict[str, jax.Array]:
        """The weights alone; `dtype` as for `load`."""
        if self.step is None:
            return load_published(self.folder, specs, dtype)
        checkpoints = Checkpoints(self.folder)
        checkpoints.check(self.step, "params")
        meta = checkpoints.meta(self.step)
        step = Path(checkpoints.root) / str(self.step)
        saved = meta["arrays"]["params"]
        if meta.get("converted"):
            check_files(step / "params", saved)
        # The converter keeps layers that predict further beside the parameters.
        held = {name: leaf for name, leaf in specs.items() if "mtp_layers" not in leaf.axes}
        beside = len(held) < len(specs) and "mtp.norm" not in saved and meta.get("converted")
        if meta.get("quantised") or beside:
            stored = ConvertedCheckpoint(step, meta, held if beside else specs)
            check(stored, specs, str(step))
            return place(stored, specs, dtype)
        wanted = abstract(specs, dtype or saved.get("head", ("", "float32"))[1])
        wanted |= abstract({name: leaf for name, leaf in specs.items() if leaf.group == "bias"})
        return checkpoints.restore_params(self.step, wanted)


def find(path: str | Path) -> Source:
    """What can be loaded from `path`.

    Raises:
        ConfigError: nothing; the message has the nearest name beside it, or says what is missing.
    """
    path = _folder(path)
    if path.name.isdecimal() and path.parent.name == CHECKPOINTS:
        if not is_step(path):
            raise ConfigError(f"{path} is no complete checkpoint")
        return Source(path.parent.parent, int(path.name))
    if path.name == CHECKPOINTS:
        path = path.parent
    if (path / CHECKPOINTS).is_dir():
        step = Checkpoints(path).latest()
        if step is None:
            raise ConfigError(f"{path} has no complete checkpoint yet")
        return Source(path, step)
    needed = ("config.json",), (INDEX, SINGLE)
    missing = [names for names in needed if not any((path / name).is_file() for name in names)]
    if missing:
        raise ConfigError(
            f"{path} is neither a run with a checkpoint (no {CHECKPOINTS}/), nor a published folder"
            f" (no {' or '.join(missing[0])})"
        )
    return Source(path)


def _folder(path: str | Path) -> Path:
    if str(path).startswith("gs://"):
        raise ConfigError(f"{path} is not on this machine; k2jax convert {path} FOLDER reads it")
    path = Path(path).absolute()
    if not path.exists():
        raise ConfigError(f"no folder {path}{_nearest(path)}")
    if path.is_file():
        raise ConfigError(f"{path} is a file; what is loaded is a folder, {path.parent} perhaps")
    return path


def _nearest(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    if parent.name == CHECKPOINTS:
        return f"; there are: {', '.join(sorted(p.name for p in parent.iterdir() if is_step(p)))}"
    near = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()], n=1)
    return f"; did you mean {parent / near[0]}?" if near else f"; {parent} has none like it"
