import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from made_up import (
    BIAS,
    CONFIG,
    FORMS,
    FP8_CONFIG,
    LEAVES,
    MODEL,
    assert_same,
    content,
    quantised,
    read,
    save,
    tensors,
)

import k2jax
from k2jax import cli
from k2jax.checkpoint import Checkpoints
from k2jax.config import ConfigError, MeshConfig, RunConfig, to_json
from k2jax.conversion import convert
from k2jax.conversion import write as writer
from k2jax.model import Kimi
from k2jax.params.arrays import initial
from k2jax.params.declare import specs
from k2jax.sharding import make_mesh
from k2jax.weights import converted_write as chunks
from k2jax.weights import manifest
from k2jax.weights.hf_config import from_published
from k2jax.weights.mapping import to_published
from k2jax.weights.source import initial_params


def refuses(message, *args, **options):
    with pytest.raises(ConfigError, match=message) as caught:
        convert(*args, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_a_round_trip_that_keeps_the_format_gives_every_tensor_back_bit_for_bit(
    tmp_path, sources, form
):
    ours, back = tmp_path / "ours", tmp_path / "back"
    report = convert(sources[form], ours, format="keep", verify=True)
    assert report["to"] == "orbax" and report["verified"]["tensors"] == report["tensors"]
    report = convert(ours, back, format="keep", verify=True)
    assert report["to"] == "hf"
    assert_same(read(back), FORMS[form][1]())
    config = json.loads((back / "config.json").read_text())
    assert config == json.loads((sources[form] / "config.json").read_text())
    assert (back / "LICENSE").read_text() == "as is" and (back / "README.md").exists()
    assert not (ours / "weights.bin").exists() and not (back / "weights.bin").exists()


def loaded(path, dtype=None):
    params = k2jax.load(path, dtype, "decoded").params
    return dict(to_published({n: np.asarray(p) for n, p in params.items()}, LEAVES))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kept", ["keep", "bfloat16"])
def test_either_kind_of_folder_loads_to_the_same_weights(tmp_path, sources, form, kept):
    convert(sources[form], tmp_path / "ours", format=kept)
    assert_same(loaded(tmp_path / "ours", "bfloat16"), loaded(sources[form], "bfloat16"))
    with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=2, model=2))):
        model = k2jax.load(tmp_path / "ours", "bfloat16", "decoded")
        gate = model.params["layers.moe.experts.gate"]
        assert gate.sharding.shard_shape(gate.shape) == (2, 2, 80, 32)
        back = {n: np.asarray(p) for n, p in model.params.items()}
    assert_same(dict(to_published(back, LEAVES)), loaded(sources[form], "bfloat16"))


def test_float32_and_bfloat16_are_the_formats_of_their_sources(tmp_path, sources):
    assert convert(sources["f32"], tmp_path / "f32")["format"] == "float32"
    for form in ("bf16", "fp8", "int4"):
        assert convert(sources[form], tmp_path / form)["format"] == "bfloat16"
        assert k2jax.load(tmp_path / form).dtype == "bfloat16"


def test_trap_6_router_bias_stays_float32(tmp_path, sources):
    convert(sources["fp8"], tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "back")["format"] == "bfloat16"
    back = read(tmp_path / "back")
    want = tensors()[BIAS]
    assert back[BIAS].dtype == np.float32 and back[BIAS].tobytes() == want.tobytes()


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_an_export_has_the_published_names_shapes_and_dtypes(tmp_path, sources, form):
    convert(sources["bf16"], tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "out", format=form, verify=True)
    got = read(tmp_path / "out")
    want = quantised(tensors(), form)
    want = {n: t.astype(np.int32) if n.endswith("_shape") else t for n, t in want.items()}
    assert_same(got, want)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    found = config["quantization_config"]
    assert found == FP8_CONFIG or found["config_groups"]["group_0"]["weights"]["num_bits"] == 4


def test_published_to_published_decodes(tmp_path, sources):
    convert(sources["fp8"], tmp_path / "out", to="hf", format="bfloat16")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    want = loaded(sources["fp8"])
    got = read(tmp_path / "out")
    assert_same({n: got[n] for n in want}, want)


def test_prediction_layers_are_kept_and_skipped_on_export(tmp_path, sources):
    convert(sources["bf16"], tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "with")
    report = convert(tmp_path / "ours", tmp_path / "without", skip_mtp=True)
    assert report["skipped"] == {"mtp": 32}
    assert "model.layers.3.eh_proj.weight" in read(tmp_path / "with")
    assert not any(name.startswith("model.layers.3.") for name in read(tmp_path / "without"))
    config = json.loads((tmp_path / "without/config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    plain = {n: t for n, t in tensors().items() if ".layers.3." not in n}
    folder = save(tmp_path / "plain", plain, CONFIG | {"num_nextn_predict_layers": 0})
    refuses("--skip-mtp has no effect", folder, tmp_path / "x", skip_mtp=True)


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_manifest_lists_what_is_there_also_after_a_kill_at_the_very_end(tmp_path, sources, to):
    target = tmp_path / "ours"
    convert(sources["bf16"], target, to=to, verify=True)
    whole = content(target)
    assert manifest.check(target, target / manifest.NAME, manifest.files(target)) == len(whole)
    target.rename(tmp_path / "ours.unfinished")  # as if killed before the rename
    convert(sources["bf16"], target, to=to, verify=True)
    assert content(target) == whole
    assert convert(sources["bf16"], target, to=to, verify=True)["verified"]


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_a_folder_in_object_storage_converts_to_the_same_bytes(tmp_path, sources, form):
    url, here, far = f"file://{sources[form]}", tmp_path / "here", tmp_path / "far"
    listed = manifest.make(shutil.copytree(sources[form], tmp_path / "copy"))
    convert(sources[form], here)
    report = convert(url, far, verify=True, manifest=str(listed))
    assert report["source"] == url and report["attested"].startswith("yes: ")
    assert report["copied"] == ["LICENSE", "README.md"]
    got, want = content(far), content(here)
    assert got.keys() - want.keys() == set()
    notes = ("conversion.json", "meta/metadata")
    assert {p: b for p, b in got.items() if not p.endswith(notes)} == {
        p: b for p, b in want.items() if not p.endswith(notes)
    }
    assert convert(url, far, verify=True)["verified"]["tensors"] == report["tensors"]


def test_damage_in_object_storage_is_told_with_its_url(tmp_path, sources):
    folder = shutil.copytree(sources["bf16"], tmp_path / "src")
    url = f"file://{folder}"
    file = folder / "part-1.safetensors"
    listed = manifest.make(folder)
    held = file.read_bytes()
    file.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    refuses(f"{url}/part-1.safetensors is corrupt", url, tmp_path / "o", manifest=str(listed))
    file.write_bytes(held[:-1])
    refuses(f"{url}/part-1.safetensors is cut short", url, tmp_path / "ours")
    file.unlink()
    refuses(f"cannot read {url}/part-1.safetensors: no such file", url, tmp_path / "ours")
    (folder / "config.json").unlink()
    refuses(f"{url} is neither a run .* nor a published folder", url, tmp_path / "ours")
    refuses(f"no files in {url}x", url + "x", tmp_path / "ours")


@pytest.mark.parametrize("format", ["keep", "bfloat16"])
def test_a_run_with_prediction_layers_starts_from_a_converted_folder_too(tmp_path, sources, format):
    convert(sources["fp8"], tmp_path / "ours", format=format)
    leaves = specs(Kimi(from_published(CONFIG)))
    here, there = (initial_params(path, leaves) for path in (tmp_path / "ours", sources["fp8"]))
    assert here.keys() == there.keys() and "mtp.join" in here
    for name, value in there.items():
        np.testing.assert_array_equal(here[name], value)
    convert(sources["fp8"], tmp_path / "bare", format=format, skip_mtp=True)
    with pytest.raises(ConfigError, match=r"has no tensor 'model.layers.3.*a part of 'mtp"):
        initial_params(tmp_path / "bare", leaves)


def test_a_multimodal_folder_gives_its_text_model(tmp_path):
    vision = {"vision_tower.patch.weight": np.zeros(3, np.float32)}
    text = {f"language_model.{n}": t for n, t in tensors().items()}
    fields = {"model_type": "kimi_k25", "text_config": CONFIG, "vision_config": {}}
    folder = save(tmp_path / "src", text | vision, fields)
    assert convert(folder, tmp_path / "ours")["skipped"] == {"vision": 1}
    convert(tmp_path / "ours", tmp_path / "out")
    assert_same(read(tmp_path / "out"), tensors())
    assert json.loads((tmp_path / "out/config.json").read_text()) == CONFIG


def test_a_trained_run_is_exported_with_a_config_that_reads_back(tmp_path):
    params = initial(LEAVES, 0, 0.05)
    with Checkpoints(tmp_path / "run", 1) as checkpoints:
        meta = {"config": to_json(RunConfig(model=MODEL))}
        checkpoints.save(3, {"params": params}, meta)
    convert(tmp_path / "run", tmp_path / "out", format="float32", verify=True)
    fields = json.loads((tmp_path / "out/config.json").read_text())
    assert from_published(fields) == MODEL and fields["torch_dtype"] == "float32"
    want = dict(to_published({n: np.asarray(p) for n, p in params.items()}, LEAVES))
    assert_same(read(tmp_path / "out"), want)


def test_chunks_are_cut_for_a_mesh(tmp_path, sources):
    convert(sources["bf16"], tmp_path / "ours", mesh="data=2,expert=2,model=2", verify=True)
    leaf = tmp_path / "ours/checkpoints/0/params/layers.moe.experts.gate"
    assert json.loads((leaf / ".zarray").read_text())["chunks"] == [1, 1, 80, 32]
    assert_same(loaded(tmp_path / "ours"), loaded(sources["bf16"]))


KILL = """
import os, sys
from k2jax.weights import converted_write as chunks
from k2jax.weights import safetensors
from k2jax.conversion import convert, write as writer
left = [int(sys.argv[3])]
before = chunks.write_atomic
def write(path, data):
    left[0] -= 1
    if left[0] < 0:
        with open(path.with_name(f".{path.name}.1"), "wb") as file:
            file.write(bytes(data)[:7])
        os.kill(os.getpid(), 9)
    before(path, data)
chunks.write_atomic = write
stream = writer.stream
def count(path, kinds, pieces, metadata):
    left[0] -= 1
    if left[0] < 0:
        path.with_name(f".{path.name}.1").write_bytes(b"half")
        os.kill(os.getpid(), 9)
    stream(path, kinds, pieces, metadata)
writer.stream = count
convert(sys.argv[1], sys.argv[2], format="keep")
"""


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_killed_conversion_goes_on_and_ends_bit_identical(tmp_path, sources, to):
    source = sources["fp8"]
    if to == "hf":
        source = tmp_path / "ours"
        convert(sources["fp8"], source, format="keep")
    convert(source, tmp_path / "whole", format="keep")
    target = tmp_path / "whole_"
    for after in (40, 30) if to == "orbax" else (1, 1):
        code = [sys.executable, "-c", KILL, str(source), str(target), str(after)]
        assert subprocess.run(code, check=False, capture_output=True).returncode == -9
        assert not target.exists()
        with pytest.raises(ConfigError):
            k2jax.load(target.with_name("whole_.unfinished"))
    if to == "orbax":
        refuses("unfinished conversion of another source or with other", source, target)
    convert(source, target, format="keep")
    want, got = content(tmp_path / "whole"), content(target)
    assert json.loads(want.pop("conversion.json"))["target"] == "whole"
    assert json.loads(got.pop("conversion.json"))["target"] == "whole_"
    meta = "checkpoints/0/meta/metadata"
    assert {n: c for n, c in want.items() if n != meta} == {
        n: c for n, c in got.items() if n != meta
    }


def test_a_target_that_is_there_is_only_audited(tmp_path, sources):
    convert(sources["bf16"], tmp_path / "ours")
    said = []
    report = convert(sources["bf16"], tmp_path / "ours", verify=True, say=said.append)
    assert report["verified"]["tensors"] == len(tensors()) and "there already" in " ".join(said)
    assert "unattested" in " ".join(said) and report["attested"].startswith("no")
    refuses("not what this command makes", sources["f32"], tmp_path / "ours")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine")
    refuses("not what this command makes", sources["f32"], tmp_path / "full")


def test_a_manifest_attests_the_source(tmp_path, sources):
    folder = shutil.copytree(sources["fp8"], tmp_path / "src")
    told = manifest.make(folder).rename(tmp_path / "sums")
    report = convert(folder, tmp_path / "a", manifest=str(told))
    assert report["attested"].startswith("yes")
    file = folder / "part-1.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    refuses("part-1.safetensors is corrupt: its SHA-256", folder, tmp_path / "b", manifest=told)
    assert not (tmp_path / "b").exists() and not (tmp_path / "b.unfinished").exists()
    convert(folder, tmp_path / "b")


def test_a_dry_run_reads_headers_only_and_writes_nothing(tmp_path, sources):
    report = convert(sources["fp8"], tmp_path / "ours", dry_run=True)
    assert report["tensors"] == len(tensors()) and report["bytes_out"] > report["bytes_in"]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "hff"}, "--to is 'hff'; did you mean 'hf'"),
        ({"format": "fp9"}, "--format is 'fp9'; did you mean 'fp8'"),
        ({"format": "fp8"}, "--format fp8 is for --to hf"),
        ({"mesh": "exprt=2"}, "--mesh has no axis 'exprt'; did you mean 'expert'"),
        ({"mesh": "data"}, "takes a number of devices"),
        ({"mesh": "data=2", "to": "hf"}, "--mesh has no effect"),
        ({"memory": 0.0}, "--memory is 0"),
        ({"memory": 1e-6}, "the largest tensor takes"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path, sources, options, message):
    refuses(message, sources["bf16"], tmp_path / "ours", **options)


def test_places_that_cannot_work_are_refused(tmp_path, sources):
    refuses("is the source or inside of it", sources["bf16"], sources["bf16"] / "out")
    refuses("target gs://b/x is not on this machine; convert into", sources["bf16"], "gs://b/x")
    refuses("s3://b/x is not on this machine; of such, gs:// is", "s3://b/x", tmp_path / "ours")
    refuses(
        "LICENSE is a file; what is loaded is a folder", sources["bf16"] / "LICENSE", tmp_path / "o"
    )
    refuses("LICENSE is a file", sources["bf16"], sources["fp8"] / "LICENSE")
    refuses("cannot be made: .*LICENSE is a file", sources["bf16"], sources["fp8"] / "LICENSE/ours")
    refuses("no folder", tmp_path / "none", tmp_path / "ours")
    convert(sources["bf16"], tmp_path / "ours")
    refuses("one of our checkpoints already", tmp_path / "ours", tmp_path / "x", to="orbax")


def test_a_full_disk_is_told_before_and_while_writing(tmp_path, sources, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=10)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: free)
        refuses("more bytes; 10 are free", sources["bf16"], tmp_path / "ours")

    def full(path, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(chunks, "write_atomic", full)
        refuses("disk is full .*the same command goes on", sources["bf16"], tmp_path / "ours")
    convert(sources["bf16"], tmp_path / "ours", verify=True)


def test_the_command_prints_a_report(tmp_path, sources, capsys):
    args = ["convert", str(sources["int4"]), str(tmp_path / "ours"), "--format", "keep"]
    assert cli.main([*args, "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"]["tensors"] > 0
    assert cli.main([*args, "--memory", "much"]) == 2
    assert "--memory is a number of GB" in capsys.readouterr().err


@pytest.mark.parametrize(("form", "kept"), [("fp8", "bfloat16"), ("fp8", "keep"), ("int4", "keep")])
def test_tensors_too_large_for_one_piece_go_by_rows(tmp_path, sources, monkeypatch, form, kept):
    """Rows of pieces and of chunks do not meet FP8 blocks."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2_000)
    monkeypatch.setattr(chunks, "WHOLE", 8_000)
    monkeypatch.setattr(writer, "PIECE", 4_000)
    convert(sources[form], tmp_path / "ours", format=kept, verify=True)
    leaf = tmp_path / "ours/checkpoints/0/params/embed"
    assert json.loads((leaf / ".zarray").read_text())["chunks"] == [6, 160]
    assert_same(loaded(tmp_path / "ours"), loaded(sources[form]))
    convert(tmp_path / "ours", tmp_path / "out", format="fp8", verify=True)
    if kept == "keep" and form == "fp8":
        assert_same(read(tmp_path / "out"), FORMS[form][1]())


def test_a_converted_checkpoint_that_lost_a_chunk_does_not_load(tmp_path, sources):
    """TensorStore would read zeros."""
    convert(sources["bf16"], tmp_path / "ours")
    chunk = tmp_path / "ours/checkpoints/0/params/layers.moe.experts.up/1.3.0.0"
    chunk.unlink()
    with pytest.raises(ConfigError, match=r"experts.up/1.3.0.0 is missing"):
        k2jax.load(tmp_path / "ours")
