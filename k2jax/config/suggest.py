"""The setting that was meant: names of other libraries, other sections and typing errors."""

import difflib
from collections.abc import Iterable, Mapping

# What newcomers type, and what it is called here.
ALIASES = {
    "lr": "optim.learning_rate",
    "max_lr": "optim.learning_rate",
    "peak_lr": "optim.learning_rate",
    "min_lr": "optim.final_rate",
    "warmup_steps": "optim.warmup",
    "optimizer": "optim.name",
    "wd": "optim.weight_decay",
    "beta1": "optim.b1",
    "adam_beta1": "optim.b1",
    "beta2": "optim.b2",
    "adam_beta2": "optim.b2",
    "grad_clip": "optim.clip_norm",
    "max_grad_norm": "optim.clip_norm",
    "batch": "data.rows",
    "batch_size": "data.rows",
    "global_batch_size": "data.rows",
    "train_batch_size": "data.rows",
    "per_device_batch_size": "data.rows",
    "per_device_train_batch_size": "data.rows",
    "context": "data.context",
    "context_length": "data.context",
    "seq_len": "data.context",
    "seq_length": "data.context",
    "sequence_length": "data.context",
    "max_seq_len": "data.context",
    "max_length": "data.context",
    "block_size": "data.context",
    "dataset": "data.path",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "train_steps": "train.steps",
    "total_steps": "train.steps",
    "iterations": "train.steps",
    "max_iters": "train.steps",
    "seed": "train.seed",
    "dtype": "train.dtype",
    "precision": "train.dtype",
    "bf16": "train.dtype",
    "fp16": "train.dtype",
    "grad_accum": "train.accumulate",
    "gradient_accumulation_steps": "train.accumulate",
    "micro_batches": "train.accumulate",
    "gradient_checkpointing": "train.remat",
    "checkpointing": "train.remat",
    "eval_interval": "train.eval_every",
    "eval_steps": "train.eval_every",
    "save_interval": "train.save_every",
    "save_steps": "train.save_every",
    "checkpoint_every": "train.save_every",
    "log_interval": "train.log_every",
    "logging_steps": "train.log_every",
    "wandb": "train.log_to",
    "tensorboard": "train.log_to",
    "d_model": "model.embed",
    "hidden_size": "model.embed",
    "n_embd": "model.embed",
    "layers": "model.moe_layers",
    "n_layer": "model.moe_layers",
    "num_layers": "model.moe_layers",
    "num_hidden_layers": "model.moe_layers",
    "n_head": "model.heads",
    "num_heads": "model.heads",
    "num_attention_heads": "model.heads",
    "num_experts": "model.experts",
    "n_routed_experts": "model.experts",
    "top_k": "model.experts_per_token",
    "num_experts_per_tok": "model.experts_per_token",
    "vocab_size": "model.vocab",
    "max_position_embeddings": "model.context",
    "dp": "mesh.data",
    "fsdp": "mesh.data",
    "ep": "mesh.expert",
    "expert_parallel": "mesh.expert",
    "cp": "mesh.context",
    "context_parallel": "mesh.context",
    "tp": "mesh.model",
    "tensor_parallel": "mesh.model",
}
# What has no setting of its own, by the names that are typed for it.
ADVICE = {
    ("epochs", "num_epochs", "num_train_epochs", "max_epochs", "max_tokens"): (
        "a run is counted in steps of data.rows x data.context tokens: set --train.steps"
    ),
    ("devices", "num_devices", "gpus", "num_gpus", "n_gpus"): (
        "devices are counted along the axes of the mesh: --mesh.data, --mesh.expert, --mesh.model"
    ),
    ("resume", "resume_from", "resume_from_checkpoint"): "the same command resumes a run",
    ("output_dir", "out_dir", "checkpoint_dir", "save_dir", "name", "run_name"): (
        "name the folder of the run: --out DIR"
    ),
    ("pretrained", "load", "checkpoint", "init_from"): "name the weights to start from: --init",
}
CLOSE = 0.75  # difflib's ratio from which a name outside the section counts as meant


def describe_unknown(name: str, fields: Mapping[str, Iterable[str]]) -> str:
    """Say in one line that no setting has this name, and which was meant.

    Args:
        name: what was typed, dotted or not, without dashes.
        fields: names of the fields of each section by its dotted name; "" is the run.
    """
    where, _, word = name.rpartition(".")
    while where not in fields:  # the first part that is wrong is the one to name
        where, _, word = where.rpartition(".")
    hint = suggest(name, fields) or f"there are: {', '.join(fields[where])}"
    return f"{where or 'the run'} has no {word!r}; {hint}"


def suggest(name: str, fields: Mapping[str, Iterable[str]]) -> str:
    """Return the hint for a setting that does not exist; empty: nothing is near.

    Args:
        name: as for `describe_unknown`.
        fields: as for `describe_unknown`.
    """
    name = name.lower().replace("-", "_")
    where, _, word = name.rpartition(".")
    for words, advice in ADVICE.items():
        if word in words:
            return advice
    if name in fields:
        return f"{name} is a section; set one of its fields: {', '.join(fields[name])}"
    names = [f"{section}.{field}" for section in fields if section for field in fields[section]]
    meant = _find_meant(where, word, [name for name in names if name not in fields])
    return f"did you mean --{meant}?" if meant else ""


def _find_meant(where: str, word: str, names: list[str]) -> str:
    """Return the likeliest of `names`; empty: none is likely."""
    if word in ALIASES:
        return ALIASES[word]
    lasts = {name: name.rpartition(".")[2] for name in names}
    same = [name for name in names if lasts[name] == word]
    beside = [name for name in names if name.rpartition(".")[0] == where]
    by_word = {lasts[name]: name for name in beside}
    everywhere = ALIASES | {last: name for name, last in reversed(lasts.items())}
    dotted = f"{where}.{word}"
    for near, known in (
        (difflib.get_close_matches(dotted, same, 1, 0.0), {}),
        (difflib.get_close_matches(word, by_word, 1), by_word),
        (difflib.get_close_matches(dotted, names, 1, CLOSE), {}),
        (difflib.get_close_matches(word, everywhere, 1, CLOSE), everywhere),
    ):
        if near:
            return known.get(near[0], near[0])
    return ""
