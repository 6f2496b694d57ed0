"""transformers loads what we export, and we load what it saves (extra `parity`)."""

import numpy as np
import pytest
from golden.cases import CASES
from golden.read import NAMES

import k2jax
from k2jax.conversion import convert

pytestmark = pytest.mark.parity
LOGITS = 1e-5  # float32, max abs


@pytest.fixture(scope="module", params=NAMES)
def saved(request, tmp_path_factory):
    """A folder that transformers saved, tokens, and the logits it computes."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from golden import make

    folder = tmp_path_factory.mktemp(request.param) / "theirs"
    model = make.build(CASES[request.param], 3)
    model.save_pretrained(folder)
    token = np.random.default_rng(0).integers(0, CASES[request.param]["vocab_size"], (2, 19))
    return folder, token, logits_of(torch, model, token)


def logits_of(torch, model, token):
    with torch.no_grad():
        return model(torch.from_numpy(token), use_cache=False).logits.float().numpy()


def test_we_load_what_transformers_saves(saved):
    folder, token, want = saved
    model = k2jax.load(folder, "float32")
    got = np.asarray(k2jax.forward(model, token.astype(np.int32)))
    np.testing.assert_allclose(got, want, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("form", ["bfloat16", "float32"])
def test_transformers_loads_what_we_export(saved, tmp_path, form):
    """The weights are such that bfloat16 holds them; both sides compute in float32."""
    torch = pytest.importorskip("torch")
    from transformers import DeepseekV3ForCausalLM

    folder, token, want = saved
    convert(folder, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "out", format=form, verify=True)
    model = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    np.testing.assert_allclose(logits_of(torch, model.eval(), token), want, rtol=0, atol=LOGITS)
