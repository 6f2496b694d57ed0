"""Named runs, one Python function each. Installed as `k2jax.configs`.

A function's docstring has the command, the hardware, the time and the number to expect.
"""

import importlib
from pathlib import Path
from typing import Any

if __name__ != "k2jax.configs":
    raise ImportError("import k2jax.configs, not configs; run `pip install -e .` once")

from k2jax.config import (
    ConfigError,
    DataConfig,
    RunConfig,
    flatten_settings,
    from_json,
    nearest,
    override,
    validate,
)
from k2jax.weights.hf_config import from_published, published_fields

# The stages of K2's training, each from the weights of the one before.
RECIPE = ("kimi_k2_pretrain", "kimi_k2_anneal", "kimi_k2_32k", "kimi_k2_128k")
NAMES = {
    "tiny": "tiny",
    "small": "tiny",
    "toy": "toy",
    "toy_rl": "toy",
    "kimi_k2": "kimi",
    "kimi_k2_pretrain": "kimi",
    "kimi_k2_anneal": "kimi",
    "kimi_k2_32k": "kimi",
    "kimi_k2_128k": "kimi",
    "kimi_k2_0905": "kimi",
    "kimi_k2_thinking": "kimi",
    "kimi_k2_5": "kimi",
    "moonlight_16b_a3b": "moonlight",
    "deepseek_v3": "deepseek",
}


def load(name: str) -> RunConfig:
    """The run called `name`, that of a run's folder, or one around a published config file.

    Args:
        name: of a named run; else the path of a folder with a `config.json`, or of such a file,
            whatever it is called.

    Raises:
        ConfigError: there is none; the message has the nearest name.
    """
    if name in NAMES:
        module = importlib.import_module(f"k2jax.configs.{NAMES[name]}")
        return getattr(module, name)()
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        fields = published_fields(file)
        if isinstance(fields.get("model"), dict):  # a run's own
            return from_json(fields)
        model = from_published(fields)
        data = DataConfig(context=min(DataConfig().context, model.context))
        whole = file.resolve()
        title = whole.parent.name if whole.name == "config.json" else whole.stem
        return RunConfig(name=title, model=model, data=data)
    if path.is_dir():
        raise ConfigError(f"{name} has no config.json")
    if len(path.parts) > 1 or path.suffix == ".json":
        raise ConfigError(f"no file {name}")
    raise ConfigError(f"no config {name!r}; {nearest(name, NAMES)}")


def configure(config: RunConfig | str, **settings: Any) -> RunConfig:
    """Return a checked run: a config, or the name of one, with settings changed.

    Args:
        config: a config; or what `load` takes: a name, a run's folder, a published `config.json`.
        **settings: a section's fields, `train={"steps": 30}`, or dotted names,
            `**{"train.steps": 30}`: what the command line takes as `--train.steps 30`.

    Raises:
        ConfigError: an unknown config or setting (the nearest is named), or an impossible run.
    """
    run = load(config) if isinstance(config, str) else config
    changed = flatten_settings(settings)
    run = override(run, changed)
    validate(run, changed)
    return run
