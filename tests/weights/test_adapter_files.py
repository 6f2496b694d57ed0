"""Adapters' files against PEFT on transformers' model (extra `parity`, and `peft`)."""

import numpy as np
import pytest
from golden.cases import CASES
from golden.read import golden

import k2jax
from k2jax.config import LoraConfig
from k2jax.model.lora import merge_adapters
from k2jax.params.adapters import declare_adapters
from k2jax.params.kimi import declare_kimi
from k2jax.weights.adapter_files import read_peft, write_peft


def draw(pairs):
    """So small that activations stay of order 1, where 1e-5 means something."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.standard_normal(leaf.shape) * 0.4 * leaf.matrix[0] ** -0.5).astype(np.float32)
        for name, leaf in pairs.items()
    }


@pytest.mark.parity
@pytest.mark.parametrize("name", ["kimi", "moonlight"])
def test_peft_loads_an_adapter_and_computes_our_logits(name, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    from golden import make

    gold = golden(name)
    specs = declare_kimi(gold.cfg)
    lora = LoraConfig(rank=3, alpha=6.0, targets="attention,dense,shared")
    pairs = declare_adapters(specs, lora)
    adapters = draw(pairs)
    write_peft(tmp_path / "ours", adapters, pairs, lora.rank, lora.alpha, "base")
    base = make.build(CASES[name], list(CASES).index(name))
    model = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    held = {key for key, _ in model.named_parameters() if ".lora_" in key}
    assert len(held) == sum(leaf.shape[0] for leaf in pairs.values())  # no layer more
    with torch.no_grad():
        theirs = model(torch.from_numpy(np.array(gold["token"]))).logits.numpy()
    merged = merge_adapters(gold.params() | adapters, specs, lora.scale)
    ours = k2jax.forward(k2jax.Model(gold.cfg, merged), gold["token"])
    assert np.abs(theirs - gold["logits"]).max() > 0.1  # it does something
    assert np.abs(theirs - ours).max() <= 1e-5

    model.save_pretrained(tmp_path / "theirs")
    back, here = read_peft(tmp_path / "theirs"), read_peft(tmp_path / "ours")
    assert back.scale == here.scale and len(back) == len(here)
    weight = "model.layers.0.self_attn.o_proj.weight"
    assert np.array_equal(back.delta(weight, slice(None)), here.delta(weight, slice(None)))
