import json

import jax
import numpy as np
import pytest

import k2jax
from k2jax.checkpoint import Checkpoints
from k2jax.config import ConfigError, MeshConfig, ModelConfig, RunConfig, to_json
from k2jax.model import Kimi
from k2jax.params.arrays import initial
from k2jax.params.declare import specs
from k2jax.sharding import make_mesh
from k2jax.text.kimi_tokenizer import FILE, Tokenizer
from k2jax.text.train_bpe import train_tokenizer
from k2jax.weights.mapping import to_published
from k2jax.weights.safetensors import write
from k2jax.weights.source import initial_params, load, open_source

# As transformers 5 writes it: rope_theta inside rope_parameters.
PUBLISHED = {
    "model_type": "deepseek_v3",
    "vocab_size": 24,
    "hidden_size": 8,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 6,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 3,
    "intermediate_size": 12,
    "n_routed_experts": 4,
    "moe_intermediate_size": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "n_group": 1,
    "topk_group": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "dtype": "bfloat16",
}
CONFIG = ModelConfig(
    vocab=24,
    embed=8,
    dense_layers=1,
    moe_layers=2,
    heads=4,
    q_rank=6,
    kv_rank=10,
    nope=4,
    rope=2,
    value=3,
    ffw=12,
    experts=4,
    expert_ffw=6,
    experts_per_token=2,
    routed_scale=2.0,
    context=64,
)
LEAVES = specs(Kimi(CONFIG))


@pytest.fixture(scope="module")
def params():
    return {name: np.asarray(leaf) for name, leaf in initial(LEAVES, 0, 0.02).items()}


@pytest.fixture
def run(tmp_path, params):
    state = {"params": {name: jax.numpy.asarray(leaf) for name, leaf in params.items()}}
    with Checkpoints(tmp_path / "run", 2) as checkpoints:
        for step in (3, 5):
            checkpoints.save(step, state, {"config": to_json(RunConfig(model=CONFIG))})
    train_tokenizer(["a text " * 9], 512, tmp_path / "run" / FILE)
    return tmp_path / "run"


@pytest.fixture
def published(tmp_path, params):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED))
    write(folder / "model.safetensors", dict(to_published(params, LEAVES, "bfloat16")))
    return folder


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, leaf in want.items():
        np.testing.assert_array_equal(np.asarray(got[name]), leaf, err_msg=name)


def test_a_run_its_checkpoints_folder_and_one_step_are_loadable(run, params):
    for path in (run, run / "checkpoints", run / "checkpoints" / "3"):
        model = load(path)
        assert model.config == CONFIG and model.dtype == "float32"
        assert_same(model.params, params)
        assert isinstance(model.tokenizer, Tokenizer)
    assert open_source(run).step == 5 and open_source(run / "checkpoints" / "3").step == 3


def test_a_damaged_weight_is_named_with_the_older_step_not_loaded(run):
    file = max((run / "checkpoints/5/params").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"step 5 .* is damaged \(params/.*complete steps: 3$"):
        load(run)
    assert load(run / "checkpoints" / "3").config == CONFIG


def test_load_is_a_name_of_the_package(run):
    assert k2jax.load(str(run)).config == CONFIG


def test_a_published_folder_loads_in_its_own_dtype(published, params):
    model = load(published)
    assert model.config == CONFIG and model.dtype == "bfloat16" and model.tokenizer is None
    assert_same(
        model.params,
        {n: p if n == "layers.moe.bias" else p.astype("bfloat16") for n, p in params.items()},
    )
    assert model.params["layers.moe.bias"].dtype == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_given_dtype_is_that_of_all_but_the_router_bias(run, published, dtype):
    for path in (run, published):
        found = {n: str(leaf.dtype) for n, leaf in load(path, dtype).params.items()}
        assert found.pop("layers.moe.bias") == "float32" and set(found.values()) == {dtype}


def test_weights_start_a_run_in_float32_on_its_mesh(run, published, params):
    with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=2, model=2))):
        for path in (run, published):
            start = initial_params(path, LEAVES)
            assert {str(leaf.dtype) for leaf in start.values()} == {"float32"}
            gate = start["layers.moe.experts.gate"]
            assert gate.sharding.shard_shape(gate.shape) == (2, 2, 4, 3)
        assert_same(initial_params(run, LEAVES), params)
        assert_same(load(run).params, params)


def test_weights_of_another_model_are_refused_in_one_line(run, published):
    other = specs(Kimi(ModelConfig(**(to_json(CONFIG) | {"yarn": CONFIG.yarn, "ffw": 16}))))
    for path in (run, published):
        with pytest.raises(ConfigError, match=r"mlp\.down") as caught:
            initial_params(path, other)
        assert "\n" not in str(caught.value)


def test_a_path_that_is_not_there_names_the_nearest(run):
    with pytest.raises(ConfigError, match=f"no folder .*/rnu; did you mean {run}\\?"):
        load(run.parent / "rnu")
    with pytest.raises(ConfigError, match=f"did you mean {run}\\?"):
        load(run.parent / "rum" / "checkpoints" / "7")
    with pytest.raises(ConfigError, match="has none like it"):
        load(run.parent / "xyz")


def test_a_folder_that_holds_no_model_says_what_was_looked_for(tmp_path, run):
    with pytest.raises(ConfigError, match=r"neither .*no checkpoints/.* nor .*no config.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # a run leaves one too
    with pytest.raises(ConfigError, match=r"no model.safetensors.index.json or model.safetensors"):
        load(tmp_path)
    (tmp_path / "fresh" / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(ConfigError, match="fresh has no complete checkpoint yet"):
        load(tmp_path / "fresh")
    (run / "checkpoints" / "5" / "commit_success.txt").unlink()
    with pytest.raises(ConfigError, match="checkpoints/5 is no complete checkpoint"):
        load(run / "checkpoints" / "5")


def test_float16_files_are_read_as_float32(published, params):
    half = dict(to_published(params, LEAVES, "float16"))
    write(published / "model.safetensors", half)
    model = load(published)
    assert model.dtype == "float32"
    want = params["embed"].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(model.params["embed"]), want)
