import json

import numpy as np
from made_up import EXPERT, assert_same, read

from k2jax.conversion import convert


def test_a_decoded_int4_release_is_exported_to_the_same_bytes(tmp_path, sources):
    convert(sources["int4"], tmp_path / "ours", format="bfloat16")
    convert(tmp_path / "ours", tmp_path / "out", format="int4")
    want = read(sources["int4"])
    shapes = {n: np.int32(t) for n, t in want.items() if n.endswith("_shape")}
    assert_same(read(tmp_path / "out"), want | shapes)


def test_an_int4_export_for_the_other_grid_has_its_scales(tmp_path, sources):
    convert(sources["bf16"], tmp_path / "out", to="hf", format="int4-minmax")
    plain, got = read(sources["bf16"])[EXPERT], read(tmp_path / "out")
    size = np.abs(plain.astype(np.float32)).reshape(len(plain), -1, 32).max(axis=2)
    scale = (size / np.float32(7.5)).astype(got[f"{EXPERT}_scale"].dtype)
    np.testing.assert_array_equal(got[f"{EXPERT}_scale"], scale)
    fields = json.loads((tmp_path / "out/config.json").read_text())
    assert fields["quantization_config"]["quant_method"] == "compressed-tensors"
