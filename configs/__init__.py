"""Named runs, one Python function each. Installed as `k2jax.configs`.

A function's docstring has the command, the hardware, the time and the number to expect.
"""

import importlib
from pathlib import Path

if __name__ != "k2jax.configs":
    raise ImportError("import k2jax.configs, not configs; run `pip install -e .` once")

from k2jax.config import ConfigError, DataConfig, RunConfig, from_json, nearest
from k2jax.weights.hf_config import from_published, published_fields

NAMES = {
    "tiny": "tiny",
    "small": "tiny",
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
    """The run called `name`, that of a run's folder, or one around a published `config.json`.

    Raises:
        ConfigError: there is none; the message has the nearest name.
    """
    if name in NAMES:
        module = importlib.import_module(f"k2jax.configs.{NAMES[name]}")
        return getattr(module, name)()
    file = Path(name) if Path(name).name == "config.json" else Path(name) / "config.json"
    if file.is_file() or file == Path(name):
        fields = published_fields(file)
        if isinstance(fields.get("model"), dict):  # a run's own
            return from_json(fields)
        model = from_published(fields)
        data = DataConfig(context=min(DataConfig().context, model.context))
        return RunConfig(name=file.resolve().parent.name, model=model, data=data)
    if Path(name).is_dir():
        raise ConfigError(f"{name} has no config.json")
    raise ConfigError(f"no config {name!r}; {nearest(name, NAMES)}")
