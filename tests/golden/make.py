"""Make the golden files with transformers' `DeepseekV3ForCausalLM` (torch, CPU, eager attention).

    pip install -e .[parity]
    python tests/golden/make.py          # writes tests/golden/*.npz, under 1 MB together

Each file has the config, the weights under their published names, tokens, the residual stream
before every norm, the last hidden state, logits, each head's largest attention logit, the routers'
choices with their margins, the loss, and its gradient for every tensor; all float32.

What transformers 5.23 does, and where it leaves the published code (modeling_deepseek.py, [JLE]):
  * The inner norms (q_a, kv_a) have epsilon 1e-6 whatever the config says: as published.
  * Groups that a token may not choose from are masked with -inf, published: 0. Equal where biased
    scores are positive, which the weights here are drawn to ensure; ours is -inf too.
  * Its experts train: there is no assertion of eval mode, so gradients are whole.
  * In bf16 it adds up the experts' outputs in bf16, published (and ours): in float32.
  * cos and sin are made in float32 and cast to the model's dtype, where ours stay float32.
"""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers.models.deepseek_v3.modeling_deepseek_v3 as oracle_code
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

HERE = Path(__file__).parent
ROWS, LENGTH = 2, 19


def build(fields: dict, seed: int) -> DeepseekV3ForCausalLM:
    """A float32 model with weights that bf16 can hold: small files, and the same model in bf16."""
    config = DeepseekV3Config(**fields)
    config._attn_implementation = config._experts_implementation = "eager"  # odd sizes
    model = DeepseekV3ForCausalLM(config).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            value = _draw(name, tuple(leaf.shape), rng)
            leaf.copy_(torch.from_numpy(value).bfloat16().float())
        for name, leaf in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                leaf.copy_(torch.from_numpy(rng.uniform(0.0, 0.3, tuple(leaf.shape))))
    return model


def _draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if name.endswith("norm.weight"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    std = 0.3 if "embed_tokens" in name else shape[-1] ** -0.5
    # Into the residual stream less, so that it stays of order 1, where 1e-5 means something.
    half = ("o_proj.weight", "down_proj.weight", "down_proj", "q_b_proj.weight", "q_proj.weight")
    std *= 0.5 if name.endswith(half) else 1.0
    return (rng.standard_normal(shape) * std).astype(np.float32)


def published(named: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Tensors under the published names: transformers fuses the experts, the releases do not."""
    out = {}
    for name, value in named.items():
        array = value.detach().float().numpy().copy()
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(array):
                gate, up = np.split(both, 2)
                stem = f"{name.removesuffix('gate_up_proj')}{e}."
                out |= {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            out |= {f"{stem}{e}.down_proj.weight": down for e, down in enumerate(array)}
        elif not name.endswith("inv_freq"):
            out[name] = array
    return out


@contextlib.contextmanager
def recorded(model: DeepseekV3ForCausalLM):
    """What passes through: `residual`, `choice`, `margin`, `logit_max`; one entry a layer."""
    seen: dict[str, list[np.ndarray]] = {
        k: [] for k in ("residual", "choice", "margin", "logit_max")
    }
    hooks, eager = [], oracle_code.eager_attention_forward

    def norm_hook(module, args):
        seen["residual"].append(args[0].detach().float().numpy().copy())

    def router_hook(module, args, out):
        logits, _, choice = out
        seen["choice"].append(np.sort(choice.numpy(), axis=-1).astype(np.int32))
        seen["margin"].append(margin(logits.detach().numpy(), module))

    def attention(module, query, key, value, mask, scaling, **rest):
        logits = query.float() @ key.float().mT * scaling
        if mask is not None:
            logits = logits + mask
        seen["logit_max"].append(logits.detach().amax(dim=(0, 2, 3)).numpy())
        return eager(module, query, key, value, mask, scaling, **rest)

    for name, module in model.named_modules():
        if name.endswith(("input_layernorm", "post_attention_layernorm", "model.norm")):
            hooks.append(module.register_forward_pre_hook(norm_hook))
        elif name.endswith("mlp.gate"):
            hooks.append(module.register_forward_hook(router_hook))
    oracle_code.eager_attention_forward = attention
    try:
        yield seen
    finally:
        oracle_code.eager_attention_forward = eager
        for hook in hooks:
            hook.remove()


def margin(logits: np.ndarray, router) -> np.ndarray:
    """How much a biased score (or a group's sum) must move to change each token's choice."""
    score = 1 / (1 + np.exp(-logits.astype(np.float64)))
    score += router.e_score_correction_bias.numpy()
    assert (score > 0).all(), "masking with 0 and with -inf would differ"
    group = score.reshape(len(score), router.num_group, -1)
    total = np.sort(np.sort(group)[..., -2:].sum(axis=-1))[:, ::-1]
    kept = router.topk_group
    worth = np.sort(group)[..., -2:].sum(axis=-1)
    group = np.where((worth >= total[:, kept - 1 : kept])[..., None], group, -np.inf)
    best = np.sort(group.reshape(len(score), -1))[:, ::-1]
    gap = best[:, router.top_k - 1] - best[:, router.top_k]
    if kept < router.num_group:
        gap = np.minimum(gap, total[:, kept - 1] - total[:, kept])
    return gap.astype(np.float32)


def oracle(fields: dict, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, np.ndarray]:
    """Everything a golden file has. Gradients only in float32."""
    model = build(fields, seed)
    weights = published(model.state_dict())
    if dtype != torch.float32:
        kept = {n: b.clone() for n, b in model.named_buffers()}  # what from_pretrained keeps wide
        model = model.to(dtype)
        for name, buffer in model.named_buffers():
            buffer.data = kept[name]
    rng = np.random.default_rng(seed + 1)
    token = torch.from_numpy(rng.integers(0, fields["vocab_size"], (ROWS, LENGTH)))
    with recorded(model) as seen:
        out = model.model(token, use_cache=False)
        logits = model.lm_head(out.last_hidden_state).float()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), token[:, 1:].flatten())
    result = {
        "config": np.array(json.dumps(fields)),
        "token": token.numpy().astype(np.int32),
        "hidden": out.last_hidden_state.detach().float().numpy(),
        "logits": logits.detach().numpy(),
        "loss": loss.detach().numpy(),
        **{name: np.stack(values) for name, values in seen.items()},
        **{f"weight/{name}": value for name, value in weights.items()},
    }
    if dtype == torch.float32:
        loss.backward()
        grads = published({n: p.grad for n, p in model.named_parameters()})
        result |= {f"grad/{name}": value for name, value in grads.items()}
    return result


def main() -> None:
    """Write the files and say how large they are."""
    from cases import CASES

    torch.set_num_threads(1)
    for seed, (name, fields) in enumerate(CASES.items()):
        path = HERE / f"{name}.npz"
        result = oracle(fields, seed)
        np.savez_compressed(path, **result)
        count = sum(v.size for k, v in result.items() if k.startswith("weight/"))
        sys.stdout.write(
            f"{path.name}: {count} parameters, {path.stat().st_size} bytes, loss"
            f" {result['loss']:.4f}, logits' std {result['logits'].std():.3f}, logit_max"
            f" {result['logit_max'].max():.2f}, smallest margin {result['margin'].min():.2e}\n"
        )


if __name__ == "__main__":
    main()
