"""`k2jax convert --adapter`: what an adapter adds, in every published format."""

import json

import ml_dtypes
import numpy as np
import pytest
from made_up import EXPERT, FORMS, LEAVES, read

import k2jax
from k2jax.config import ConfigError, LoraConfig
from k2jax.conversion import convert
from k2jax.params.adapters import declare_adapters
from k2jax.weights import quant
from k2jax.weights.adapter_files import CONFIG, read_peft, write_peft
from k2jax.weights.encodings import decode, weight_of
from k2jax.weights.hf_folder import Folder

LORA = LoraConfig(rank=3, alpha=6.0, targets="o,q_b,shared,experts")
PAIRS = declare_adapters(LEAVES, LORA)


def make_adapter(folder, seed=0):
    rng = np.random.default_rng(seed)
    drawn = {n: rng.standard_normal(s.shape, np.float32) * 0.05 for n, s in PAIRS.items()}
    write_peft(folder, drawn, PAIRS, LORA.rank, LORA.alpha, "base")
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("adapter"))


def expected(source, adapter):
    """Tensors of the merged folder, made from whole matrices."""
    base, added, out = Folder(source), read_peft(adapter), {}
    for name in base:
        weight = weight_of(name)
        if weight not in added:
            out[name] = base.read(name)
            continue
        summed = decode(base, weight).astype(np.float32) + added.delta(weight, slice(None))
        if weight + "_scale_inv" in base:
            out[weight], out[weight + "_scale_inv"] = quant.encode_fp8(summed)
        elif weight + "_packed" in base:
            out[weight + "_packed"], out[weight + "_scale"] = quant.encode_int4(summed)
            out[weight + "_shape"] = base.read(weight + "_shape")
        else:
            out[weight] = summed.astype(base.dtype(weight))
    return out


@pytest.mark.parametrize("form", FORMS)
def test_every_format_is_kept_and_what_has_no_adapter_keeps_its_bits(
    tmp_path, sources, adapter, form
):
    kept = {"fp8": {}, "int4": {}, "bf16": {}, "f32": {"format": "keep"}}[form]
    target = tmp_path / "merged"
    report = convert(sources[form], target, to="hf", adapter=str(adapter), verify=True, **kept)
    assert report["adapted"] == 3 + 3 + 2 * 3 + 2 * 4 * 3  # o, q_b, shared, experts
    found = read(target)
    for name, tensor in expected(sources[form], adapter).items():
        assert found.pop(name).tobytes() == tensor.tobytes(), name
    assert not found


def test_merging_into_our_format_loads_as_the_merged_weights(tmp_path, sources, adapter):
    convert(sources["bf16"], tmp_path / "ours", adapter=str(adapter), verify=True)
    convert(sources["bf16"], tmp_path / "hf", to="hf", adapter=str(adapter))
    ours, theirs = k2jax.load(tmp_path / "ours"), k2jax.load(tmp_path / "hf")
    for name, w in ours.params.items():  # MTP layers are kept beside them
        assert np.array_equal(w, theirs.params[name]), name


def test_delta_has_the_same_bits_whichever_rows_are_asked_for(adapter):
    added = read_peft(adapter)
    weight = "model.layers.0.self_attn.o_proj.weight"
    whole = added.delta(weight, slice(None))
    for rows in (slice(0, 7), slice(100, 131), slice(128, 160), slice(159, None)):
        assert np.array_equal(added.delta(weight, rows), whole[rows])
    assert whole.dtype == np.float32 and np.abs(whole).max() > 0


def test_another_adapter_is_another_conversion(tmp_path, sources, adapter):
    target = tmp_path / "merged"
    convert(sources["bf16"], target, to="hf", adapter=str(adapter))
    other = make_adapter(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="not what this command makes"):
        convert(sources["bf16"], target, to="hf", adapter=str(other))


def test_an_adapter_of_another_kind_or_model_is_refused_in_one_line(tmp_path, sources, adapter):
    def refuses(message, folder):
        with pytest.raises(ConfigError, match=message) as caught:
            convert(sources["bf16"], tmp_path / "out", to="hf", adapter=str(folder))
        assert "\n" not in str(caught.value)

    refuses("neither an adapter", sources["bf16"])
    folder = make_adapter(tmp_path / "changed")
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(fields | {"use_dora": True}))
    refuses("has use_dora True", folder)
    (folder / CONFIG).write_text("{")
    refuses("is damaged", folder)
    (folder / CONFIG).write_text(json.dumps(fields))
    from k2jax.weights.safetensors import Reader, write

    file = folder / "expert_adapters.safetensors"
    held = {name: np.array(Reader(file)[name]) for name in Reader(file)}
    first = next(name for name in held if EXPERT.removesuffix(".weight") in name)
    write(file, {n.replace("experts.3", "experts.9"): t for n, t in held.items()})
    refuses("the model has no 'model.layers.1.mlp.experts.9", folder)
    write(file, {n: t for n, t in held.items() if n != first})
    refuses("half an adapter", folder)
    write(file, held | {first: held[first].astype(ml_dtypes.bfloat16)[:, :-1]})
    refuses("has shape", folder)
