"""One place with weights: a run's folder, one of its checkpoints, or published files."""

import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from k2jax.checkpoint import Checkpoints
from k2jax.checkpoint.steps import CHECKPOINTS, is_step
from k2jax.config import ConfigError, ModelConfig, RunConfig, from_json, nearest
from k2jax.model import Kimi, Model
from k2jax.params.adapters import declare_adapters
from k2jax.params.arrays import Params, abstract
from k2jax.params.declare import specs
from k2jax.params.spec import ParamSpec
from k2jax.text.interface import TokenizerLike
from k2jax.text.open_tokenizer import open_tokenizer
from k2jax.weights.adapter_files import CONFIG as ADAPTER
from k2jax.weights.adapter_files import Adapter, read_peft
from k2jax.weights.converted_read import ConvertedCheckpoint
from k2jax.weights.converted_write import check_files
from k2jax.weights.encodings import ReencodedTensors, Tensors
from k2jax.weights.hf_config import from_published, published_fields
from k2jax.weights.hf_folder import INDEX, SINGLE, Folder, Remote
from k2jax.weights.mapping import (
    WEIGHTS,
    check,
    describe_stored,
    extra_mtp_prefixes,
    load_published,
    place,
    plain_dtype,
)

# Companions: what may stand beside weights and is no code of ours to write. Weights of other kinds
# and what could be a pickle stay behind.
NO_COMPANIONS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".msgpack",
    ".h5",
    ".ot",
    ".gguf",
    ".onnx",
)
OWN = ("config.json", "manifest.sha256", "conversion.json", INDEX)
OF_RUN = (
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "LICENSE",
    "NOTICE",
    "README.md",
)
RUN = ("metrics.jsonl", "events.jsonl", "run.json", "loss.png", "report.html")
LARGEST_COMPANION = 64 * 2**20  # bytes


def load(path: str | Path, dtype: str | None = None, weights: str = "stored") -> Model:
    """The model at `path`, on the mesh in use if there is one.

    Args:
        path: a run's folder (its newest checkpoint), one checkpoint, a converted folder, or a
            published one with `config.json` and safetensors (BF16, F16, F32, FP8 or INT4).
        dtype: "float32" or "bfloat16"; None: as saved, bfloat16 for FP8 and INT4. The router bias
            is always float32. It is also what is computed in.
        weights: "stored": FP8 and INT4 weights stay in memory as they are and are decoded where
            they are used, whatever the dtype; "decoded": they become plain arrays now.

    Raises:
        ConfigError: there is nothing at `path` that can be loaded; the message says what is.
    """
    return open_source(path).load(dtype, weights)


def initial_params(path: str | Path, specs: Mapping[str, ParamSpec]) -> dict[str, jax.Array]:
    """Float32 weights to start a run from, on the mesh in use.

    Args:
        path: as for `load`.
        specs: the parameters of the run's model.

    Raises:
        ConfigError: as `load`, or the weights are of another architecture.
    """
    return open_source(path).params(specs, "float32")


@dataclasses.dataclass(frozen=True)
class Source:
    """A place with weights, opened: what they are is known, none of them is read yet.

    Attributes:
        folder: of the run, or of the published files; the tokenizer is there.
        config: sizes of the model, with those MTP layers whose weights are there.
        step: of the run's checkpoint; None: published files.
        fields: the published `config.json`; empty for a model trained here.
        remote: where the published weights are, if not in the folder.
    """

    folder: Path
    config: ModelConfig
    step: int | None = None
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    remote: Remote | None = None

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is one of our checkpoints, trained or converted; else published files."""
        return self.step is not None

    @property
    def name(self) -> str:
        """For reports: the folder, or where its weights are."""
        return getattr(self.remote, "url", "") or str(self.folder)

    @property
    def path(self) -> Path:
        """The folder of the arrays: the checkpoint's own, or that of the published files."""
        return self.folder / CHECKPOINTS / str(self.step) if self.is_checkpoint else self.folder

    @functools.cached_property
    def run(self) -> RunConfig | None:
        """The run that made the checkpoint; None for published weights."""
        return from_json(self._meta["config"]) if self.is_checkpoint else None

    @functools.cached_property
    def tensors(self) -> Tensors:
        """The weights under their published names; read when they are used.

        Raises:
            ConfigError: files are missing or damaged.
        """
        if self.base:
            return ReencodedTensors(self.base.tensors, "decode", adapter=self.adapter)
        if self.is_checkpoint:
            return ConvertedCheckpoint(self.path, self._meta, specs(Kimi(self.config)))
        return Folder(self.folder, self.remote)

    @functools.cached_property
    def base(self) -> "Source | None":
        """What the run trained adapters for; None: a place that has all weights itself.

        Raises:
            ConfigError: it is not where it was, or has changed.
        """
        kept = self._meta.get("base") if self.is_checkpoint else None
        if not kept:
            return None
        base = open_source(kept["path"])
        if base.identity != kept["identity"]:
            raise ConfigError(
                f"{base.path} has changed since {self.folder} trained adapters for it"
            )
        return base

    @functools.cached_property
    def adapter(self) -> Adapter:
        """The adapters of a run with a `base`."""
        assert self.run is not None
        lora = self.run.lora
        pairs = declare_adapters(specs(Kimi(self.config)), lora)
        tensors = ConvertedCheckpoint(self.path, self._meta, pairs)
        return Adapter(tensors, lora.scale, str(self.folder), self.identity)

    @functools.cached_property
    def tokenizer(self) -> TokenizerLike | None:
        """The folder's tokenizer; None where there is none.

        Raises:
            ConfigError: a file of it is malformed.
        """
        return open_tokenizer(self.folder)

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 that changes when the weights are others, from headers and metadata alone."""
        if self.is_checkpoint:
            text = json.dumps([str(self.path), self._meta], sort_keys=True)
        else:
            assert isinstance(self.tensors, Folder)
            fields = json.dumps(self.fields, sort_keys=True)
            text = "\n".join([fields, *self.tensors.headers()])
        return hashlib.sha256(text.encode()).hexdigest()

    @functools.cached_property
    def companions(self) -> tuple[str, ...]:
        """Names of small files beside the weights: tokenizer, LICENSE, model card, template."""
        if self.is_checkpoint and "copied" in self._meta:
            return tuple(self._meta["copied"])
        files = [path for path in self.folder.iterdir() if path.is_file()]
        if self.is_checkpoint:  # logs, plots and notes of a run stay where they are
            return tuple(sorted(p.name for p in files if p.name.startswith(OF_RUN)))
        return tuple(
            sorted(
                path.name
                for path in files
                if is_companion(path.name)
                and path.name not in (*OWN, *RUN)
                and path.stat().st_size <= LARGEST_COMPANION
            )
        )

    def load(self, dtype: str | None = None, weights: str = "stored") -> Model:
        """The model, on the mesh in use if there is one; arguments as for `k2jax.load`."""
        if weights not in WEIGHTS:
            raise ConfigError(f"weights is {weights!r}; {nearest(weights, WEIGHTS)}")
        params = self.params(specs(Kimi(self.config)), dtype, weights)
        return Model(self.config, params, self.tokenizer)

    def params(
        self, specs: Mapping[str, ParamSpec], dtype: str | None, weights: str = "decoded"
    ) -> Params:
        """The weights alone. On a mesh every process reads what its own devices hold.

        Args:
            specs: the parameters of the model, which may be another one than the source's.
            dtype: as for `k2jax.load`.
            weights: likewise.

        Raises:
            ConfigError: a missing, unknown or damaged tensor, or one of another shape.
        """
        if not self.is_checkpoint:
            return load_published(self.folder, specs, dtype, weights)
        assert self.step is not None
        meta, checkpoints = self._meta, Checkpoints(self.folder)
        checkpoints.check(self.step, "params")
        if self.base:
            check(self.tensors, specs, self.name)
            return place(self.tensors, specs, dtype, weights)
        saved = meta["arrays"]["params"]
        if meta.get("converted"):
            check_files(self.path / "params", saved)
        # The converter keeps layers that predict further beside the parameters.
        held = {name: leaf for name, leaf in specs.items() if "mtp_layers" not in leaf.axes}
        beside = len(held) < len(specs) and "mtp.norm" not in saved and meta.get("converted")
        if meta.get("quantised") or beside:
            stored = ConvertedCheckpoint(self.path, meta, held if beside else specs)
            check(stored, specs, str(self.path))
            return place(stored, specs, dtype, weights)
        wanted = abstract(specs, dtype or saved.get("head", ("", "float32"))[1])
        wanted |= abstract({name: leaf for name, leaf in specs.items() if leaf.group == "bias"})
        return checkpoints.restore_params(self.step, wanted)

    def describe_base(self, specs: Mapping[str, ParamSpec]) -> Params:
        """Shapes, dtypes and layouts of what `load_base` returns; no weight is read.

        Raises:
            ConfigError: the weights are of another architecture.
        """
        check(self.tensors, specs, self.name)
        return describe_stored(self.tensors, specs)

    def load_base(self, specs: Mapping[str, ParamSpec]) -> Params:
        """The weights as they are stored, to train adapters for."""
        return self.params(specs, plain_dtype(self.tensors, specs), "stored")

    @functools.cached_property
    def _meta(self) -> dict[str, Any]:
        assert self.step is not None
        return Checkpoints(self.folder).meta(self.step)


def open_source(path: str | Path, remote: Remote | None = None) -> Source:
    """What can be loaded from `path`; no weight is read.

    Args:
        path: as for `load`.
        remote: where the weights of a published folder are, if not there too.

    Raises:
        ConfigError: nothing; the message has the nearest name beside it, or says what is missing.
    """
    folder, step = _locate(path)
    if step is None:
        fields = published_fields(folder)
        config = from_published(fields)
        bare = dataclasses.replace(config, mtp_layers=0)
        # MTP layers are often left out, while config.json still names them.
        tensors = Folder(folder, remote) if config.mtp_layers else ()
        kept = tensors and extra_mtp_prefixes(tensors, specs(Kimi(bare)))
        return Source(folder, config if kept else bare, fields=fields, remote=remote)
    meta = Checkpoints(folder).meta(step)
    if "config" not in meta:
        raise ConfigError(f"checkpoint of step {step} in {folder} has no config")
    run = from_json(meta["config"])
    return Source(folder, run.model, step, meta.get("published") or {})


def open_adapter(path: str | Path) -> Adapter:
    """The adapter at `path`: a run that trained one, or a folder of PEFT's files.

    Raises:
        ConfigError: there is none.
    """
    folder = _folder(path)
    if (folder / ADAPTER).is_file():
        return read_peft(folder)
    if not (folder / CHECKPOINTS).is_dir() and not is_step(folder):
        raise ConfigError(f"{folder} is neither an adapter (no {ADAPTER}), nor a run that made one")
    source = open_source(folder)
    if source.base is None:
        raise ConfigError(f"{folder} holds a run of all weights, no adapter")
    return source.adapter


def is_companion(name: str) -> bool:
    """Whether a file beside weights is none itself."""
    return not name.startswith(".") and Path(name).suffix not in NO_COMPANIONS


def _locate(path: str | Path) -> tuple[Path, int | None]:
    """The folder of a run and a step, or a published folder and None."""
    path = _folder(path)
    if path.name.isdecimal() and path.parent.name == CHECKPOINTS:
        if not is_step(path):
            raise ConfigError(f"{path} is no complete checkpoint")
        return path.parent.parent, int(path.name)
    if path.name == CHECKPOINTS:
        path = path.parent
    if (path / CHECKPOINTS).is_dir():
        step = Checkpoints(path).latest()
        if step is None:
            raise ConfigError(f"{path} has no complete checkpoint yet")
        return path, step
    needed = ("config.json",), (INDEX, SINGLE)
    missing = [names for names in needed if not any((path / name).is_file() for name in names)]
    if missing:
        raise ConfigError(
            f"{path} is neither a run with a checkpoint (no {CHECKPOINTS}/), nor a published folder"
            f" (no {' or '.join(missing[0])})"
        )
    return path, None


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
