"""Opening and loading model directories, and the errors of those that are not whole."""

import json
import shutil

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.numpy import save_file

from convert.program import convert
from tests.model_files import SPELLINGS, config_json, random_tensors, respell, write_model
from vlcache_jax.checkpoints.checkpoint import open_checkpoint
from vlcache_jax.checkpoints.find import resolve
from vlcache_jax.checkpoints.weights import join, parameter_name, tensors_of
from vlcache_jax.errors import short
from vlcache_jax.loading import describe
from vlcache_jax.models.families import abstract_params
from vlcache_jax.models.llava.config import LlavaConfig
from vlcache_jax.models.llava.names import LLAVA

CONFIG = config_json()


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(CONFIG, ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def converted(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    return convert(write_model(folder / "hf", CONFIG, tensors, shards=2), folder / "orbax")


def _copy(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "copy")


def _check_params(params, tensors, dtype):
    """The parameters are those that the tensors make, in the tree that the model wants."""
    abstract = abstract_params(LlavaConfig.from_hf(CONFIG), dtype)
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    for path, array in jax.tree_util.tree_leaves_with_path(params):
        name = parameter_name(path)
        shapes = tensors_of(LLAVA, name, array.shape)
        expected = join(LLAVA, name, array.shape, np.dtype(dtype), [tensors[key] for key in shapes])
        assert isinstance(array, jax.Array)
        assert array.dtype == dtype
        assert np.asarray(array).tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_load_reads_every_spelling_in_one_file_or_several(spelling, shards, tensors, tmp_path):
    named = {respell(name, spelling): array for name, array in tensors.items()}
    write_model(tmp_path, CONFIG, named, shards)
    _check_params(open_checkpoint(tmp_path).load(), tensors, ml_dtypes.bfloat16)


def test_load_reads_a_mixture_of_spellings(tensors, tmp_path):
    named = {
        respell(name, SPELLINGS[i % len(SPELLINGS)]): array
        for i, (name, array) in enumerate(tensors.items())
    }
    _check_params(
        open_checkpoint(write_model(tmp_path, CONFIG, named)).load(), tensors, ml_dtypes.bfloat16
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_load_gives_the_type_asked_for(dtype, tensors, tmp_path, converted):
    write_model(tmp_path, CONFIG, tensors)
    for directory in (tmp_path, converted):
        _check_params(open_checkpoint(directory).load(dtype=dtype), tensors, np.dtype(dtype))


def test_load_reports_its_progress(tensors, tmp_path, converted):
    size = sum(array.nbytes for array in tensors.values())
    write_model(tmp_path, CONFIG, tensors)
    for directory in (tmp_path, converted):
        seen = []
        open_checkpoint(directory).load(progress=lambda *step, seen=seen: seen.append(step))
        pieces = list(dict.fromkeys(piece for piece, _, _ in seen))
        assert pieces == ["vision", "projector", "embed", "layer_000", "layer_001", "head"]
        done = [step[1] for step in seen]
        assert done == sorted(done)
        assert done[-1] == size
        assert {total for _, _, total in seen} == {size}


def test_mixed_types_need_a_choice(tensors, tmp_path):
    mixed = dict(tensors)
    mixed["image_newline"] = mixed["image_newline"].astype(np.float32)
    write_model(tmp_path, CONFIG, mixed)
    with pytest.raises(ValueError, match="different number types: choose one, dtype=float32 or"):
        open_checkpoint(tmp_path).load()
    _check_params(open_checkpoint(tmp_path).load(dtype="float32"), mixed, np.float32)


def test_tied_projection_is_left_out_only_if_it_is_the_embedding(tmp_path):
    config = config_json(tied=True)
    tied = random_tensors(config)
    embedding = tied["language_model.model.embed_tokens.weight"]
    plain = open_checkpoint(write_model(tmp_path / "absent", config, tied)).load()
    tied["lm_head.weight"] = embedding
    stored = open_checkpoint(write_model(tmp_path / "present", config, tied)).load()
    assert "kernel" not in plain["head"]
    assert jax.tree.structure(plain) == jax.tree.structure(stored)
    tied["lm_head.weight"] = embedding + 1
    write_model(tmp_path / "differs", config, tied)
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        open_checkpoint(tmp_path / "differs").load()


def test_one_report_of_a_checkpoint_that_does_not_fit(tensors, tmp_path):
    wrong = dict(tensors)
    del wrong["image_newline"]
    wrong["mm.extra"] = np.zeros(3, np.float32)
    wrong["language_model.model.norm.weight"] = np.zeros(5, np.float32)
    write_model(tmp_path, CONFIG, wrong, shards=2)
    with pytest.raises(ValueError, match=r"does not fit its config\.json: 3 problems") as error:
        open_checkpoint(tmp_path)
    for part in ("missing: image_newline [32]", "unknown: mm.extra [3]", "is [5], expected [32]"):
        assert part in str(error.value)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(keep, tensors, tmp_path):
    write_model(tmp_path, CONFIG, tensors, shards=2)
    file = tmp_path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"00002-of-00002\.safetensors is truncated or damaged"):
        open_checkpoint(tmp_path)


def test_missing_files_are_named(tensors, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model directory at"):
        open_checkpoint(tmp_path / "nothing")
    write_model(tmp_path, CONFIG, tensors, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names 1 of 3 files .*model-00002-of-00003"):
        open_checkpoint(tmp_path)
    for file in tmp_path.glob("model*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no weights in"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object, not list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "outside of its directory"),
    ],
)
def test_a_damaged_index_is_refused(index, message, tensors, tmp_path):
    write_model(tmp_path, CONFIG, tensors, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-1.pt", "consolidated.00.pth"])
def test_pickles_are_refused_and_never_opened(name, tmp_path):
    write_model(tmp_path, CONFIG, {"a": np.zeros(1)})
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match=f"pickled weights \\({name}\\).*safetensors"):
        open_checkpoint(tmp_path)


def _edit_manifest(directory, edit):
    manifest = json.loads((directory / "MANIFEST.json").read_text())
    edit(manifest)
    (directory / "MANIFEST.json").write_text(json.dumps(manifest))


def test_a_conversion_without_manifest_is_refused(converted, tmp_path):
    directory = _copy(converted, tmp_path)
    (directory / "MANIFEST.json").unlink()
    with pytest.raises(ValueError, match=r"no MANIFEST\.json: its conversion was interrupted"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(format=99), "has format 99, this version reads 1"),
        (
            lambda m: m.pop("parameters"),
            r"MANIFEST\.json: parameters, which is missing, must be an",
        ),
        (lambda m: m.update(dtype="int8"), r"MANIFEST\.json: dtype='int8' must be"),
        (lambda m: m["parameters"].pop("projector.newline"), r"missing: projector\.newline"),
        (
            lambda m: m["parameters"]["head.kernel"].update(shape=[32, 63]),
            r"different: head\.kernel is bfloat16\[32, 63\], expected bfloat16\[32, 64\]",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(edit, message, converted, tmp_path):
    directory = _copy(converted, tmp_path)
    _edit_manifest(directory, edit)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(directory)


def test_pieces_that_are_not_those_of_the_manifest_are_refused(converted, tmp_path):
    """Orbax alone would restore the arrays of another checkpoint without a word."""
    directory = _copy(converted, tmp_path)
    shutil.rmtree(directory / "params" / "embed")
    shutil.copytree(directory / "params" / "projector", directory / "params" / "embed")
    shutil.rmtree(directory / "params" / "layer_001")
    with pytest.raises(ValueError, match=r"does not hold what MANIFEST\.json says") as error:
        open_checkpoint(directory)
    text = str(error.value)
    assert "missing: embed/embedding bfloat16[64, 32]" in text
    assert "unknown: embed/linear_1.bias bfloat16[32]" in text
    assert text.endswith(" more")
    assert len(text) <= 400
    assert "missing: layer_001/down" in text


def test_arrays_of_another_shape_are_refused(converted, tensors, tmp_path):
    """The manifest and config.json agree, the arrays do not."""
    directory = _copy(converted, tmp_path)
    config = config_json()
    config["text_config"]["vocab_size"] = 65
    (directory / "config.json").write_text(json.dumps(config))

    def edit(manifest):
        manifest["parameters"]["embed.embedding"]["shape"] = [65, 32]
        manifest["parameters"]["head.kernel"]["shape"] = [32, 65]

    _edit_manifest(directory, edit)
    with pytest.raises(ValueError, match="2 problems") as error:
        open_checkpoint(directory)
    assert "embed/embedding is bfloat16[64, 32], expected bfloat16[65, 32]" in str(error.value)


def test_a_damaged_array_is_named(tmp_path):
    config = config_json()
    config["text_config"]["vocab_size"] = 20000  # enough for a data file of its own
    write_model(tmp_path / "hf", config, random_tensors(config))
    directory = convert(tmp_path / "hf", tmp_path / "orbax")
    files = (directory / "params" / "embed").rglob("d/*")
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"embed is damaged \(.*convert the model again"):
        open_checkpoint(directory).load()


def test_resolve_prefers_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve("owner/name").samefile(tmp_path / "owner" / "name")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, but no GGUF file: give the model's directory"):
        resolve("file")
    for name in ("nothing", "./owner/other", "/no/where", "../x", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no directory"):
            resolve(name)


def test_resolve_downloads_safetensors_and_text_only(tmp_path, monkeypatch):
    asked, revisions = {}, []

    def download(name, revision, allow_patterns):
        asked[name] = allow_patterns
        revisions.append(revision)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("llava-hf/llava-1.5-7b-hf") == tmp_path
    patterns = asked["llava-hf/llava-1.5-7b-hf"]
    assert sorted(patterns) == ["*.jinja", "*.json", "*.safetensors", "tokenizer.model"]
    resolve("llava-hf/without", weights=False)
    assert sorted(asked["llava-hf/without"]) == ["*.jinja", "*.json", "tokenizer.model"]
    resolve("llava-hf/branch", revision="refs/pr/3")
    assert revisions == [None, None, "refs/pr/3"]


def _without_response(kind):
    """The hub's error without the web response that belongs to it."""
    error = kind.__new__(kind)
    Exception.__init__(error, "404")
    return error


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (LocalEntryNotFoundError("no network"), ConnectionError, r"\(no network\): go online, or"),
        (
            _without_response(RepositoryNotFoundError),
            FileNotFoundError,
            "no model of that name on the Hugging Face hub: check the spelling, or log in",
        ),
        (
            _without_response(RevisionNotFoundError),
            FileNotFoundError,
            "owner/name has no revision='v9' on the hub",
        ),
    ],
)
def test_resolve_says_what_to_do(raised, expected, message, monkeypatch):
    def download(*args, **kwargs):
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(expected, match=message):
        resolve("owner/name", revision="v9")


@pytest.mark.parametrize("weights", [True, False])
def test_a_revision_is_of_the_hub(weights, tmp_path):
    for model in (tmp_path, "demo-small"):
        with pytest.raises(
            ValueError, match=f"{short(model)} is not on the hub and has no revision='v1'"
        ):
            resolve(model, weights=weights, revision="v1")


def test_weights_are_read_when_they_are_asked_for(tensors, tmp_path):
    """Opening maps the files and reads their headers, nothing else."""
    write_model(tmp_path, CONFIG, {})
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtype == ml_dtypes.bfloat16
    assert checkpoint.num_bytes(np.dtype(np.float32)) == 2 * sum(a.nbytes for a in tensors.values())
    assert [name for name, _ in checkpoint.read("head", np.dtype(np.float32))] == [
        "head.kernel",
        "head.norm.scale",
    ]


def test_one_file_wins_over_an_older_index_beside_it(tensors, tmp_path):
    """As transformers takes them: the index is not even read."""
    write_model(tmp_path, CONFIG, tensors)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone"}}')
    _check_params(open_checkpoint(tmp_path).load(), tensors, ml_dtypes.bfloat16)


def test_a_stale_index_is_called_so(tensors, tmp_path):
    write_model(tmp_path, CONFIG, tensors, shards=2)
    for file in tmp_path.glob("*.safetensors"):
        file.rename(tmp_path / f"other-{file.name}")
    with pytest.raises(
        FileNotFoundError, match=r"index\.json is stale .* 2 of 2 files .*model-000"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("section", ["", "text_config", "vision_config"])
@pytest.mark.parametrize(
    ("quantization", "method"),
    [
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({}, "an unnamed method"),
    ],
)
def test_quantised_weights_are_refused_before_tensors_are_looked_at(
    section, quantization, method, tmp_path
):
    config = config_json()
    (config[section] if section else config)["quantization_config"] = quantization
    (tmp_path / "config.json").write_text(json.dumps(config))  # no weights at all
    name = f"{section}.quantization_config" if section else "quantization_config"
    for read in (open_checkpoint, describe):
        with pytest.raises(NotImplementedError, match=f"json: {name} .* quantised by {method},"):
            read(tmp_path)


@pytest.mark.parametrize(
    "own",
    [
        {"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336"},
        {"model_type": "llava_mistral", "hidden_size": 5120},
        {"model_type": "llava", "mm_projector_type": "mlp2x_gelu", "hidden_size": 5120},
    ],
)
def test_the_authors_own_format_is_refused_by_name(own, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(own))
    for read in (open_checkpoint, describe):
        with pytest.raises(NotImplementedError, match=r"authors' own format.* use the llava-hf"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("format", value) for value in (None, True, "1", [1], 1.0)),
        *(("dtype", value) for value in (None, 5, ["float32"], "bf16")),
        *(("parameters", value) for value in (None, 5, "x", [["head.kernel"]])),
    ],
)
def test_fields_of_a_manifest_are_named(field, value, converted, tmp_path):
    directory = _copy(converted, tmp_path)
    _edit_manifest(directory, lambda manifest: manifest.update({field: value}))
    with pytest.raises(ValueError, match=rf"MANIFEST\.json: {field}.* must be") as error:
        open_checkpoint(directory)
    assert len(str(error.value)) <= 400


@pytest.mark.parametrize(
    "entry", [None, 5, "x", {}, {"dtype": "bfloat16"}, {"shape": 5, "dtype": 5}]
)
def test_an_entry_of_a_manifest_is_named(entry, converted, tmp_path):
    directory = _copy(converted, tmp_path)
    _edit_manifest(directory, lambda m: m["parameters"].update({"head.kernel": entry}))
    with pytest.raises(ValueError, match=r"MANIFEST\.json .*; different: head\.kernel is "):
        open_checkpoint(directory)


@pytest.mark.parametrize("model", [5, None, ["x"], b"x", "a\0b", "~nobody-here/x", "x" * 5000])
def test_what_is_no_path_is_refused(model):
    for read in (resolve, open_checkpoint, LlavaConfig.from_file):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            read(model)
        assert len(str(error.value)) <= 400
        assert "\n" not in str(error.value)
