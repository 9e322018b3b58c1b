"""The command line, run in this process."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import vlcache_jax
from tests.cli.program import refused, run, without_kept_programs
from vlcache_jax import DEFAULT_METHOD, demo


def test_json_is_one_object_and_nothing_else(model_dir, image):
    result = run("generate", model_dir, "--image", image, "--prompt", "what?",
                 "--max-new-tokens", 20, "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert set(answer) == {
        "text", "tokens", "finish_reason", "prompt_tokens", "visual_tokens", "context_tokens",
        "timings", "kv", "model", "versions",
    }  # fmt: skip
    assert set(answer["timings"]) == {"compile_s", "prefill_s", "decode_s", "decode_tokens_per_s"}
    assert set(answer["kv"]) == {
        "method", "label", "kv_bits", "budget_requested", "budget", "full_bytes", "kept_bytes",
        "kept_share", "compression_ratio", "payload_bytes", "scale_bytes", "dense_bytes",
        "effective_bits", "layer_budgets", "kept_visual", "kept_text", "allocated_bytes",
        "tail_bytes",
    }  # fmt: skip
    assert (answer["kv"]["kv_bits"], answer["kv"]["effective_bits"]) == (None, 32)
    assert len(answer["tokens"]) == 20
    assert answer["visual_tokens"] < answer["prompt_tokens"]
    # 2 (K and V) * 2 layers * m * 2 kv heads * 8 * 4 bytes
    assert answer["kv"]["full_bytes"] == 2 * 2 * answer["prompt_tokens"] * 2 * 8 * 4
    assert answer["model"] == str(model_dir)


def test_a_terminal_sees_the_text_and_a_table(model_dir, image):
    args = ("generate", model_dir, "--image", image, "--prompt", "what?", "--max-new-tokens", 3)
    shown = run(*args)
    text = json.loads(run(*args, "--json").stdout)["text"]
    assert shown.exit_code == 0
    assert shown.stdout.startswith(text + "\n")
    for word in (
        DEFAULT_METHOD,
        "prompt tokens",
        "visual",
        "time to first token",
        "cache",
        "compilation",
    ):
        assert word in shown.stdout


def test_raw_prompt_and_seeds(model_dir, image):
    def tokens(*more):
        args = ("generate", model_dir, "--image", image, "--max-new-tokens", 6, "--json", *more)
        return json.loads(run(*args).stdout)["tokens"]

    raw = tokens("--prompt", "<image>what?", "--raw-prompt")
    chat = tokens("--prompt", "what?")
    assert raw != chat
    hot = ("--prompt", "what?", "--temperature", 3, "--top-p", 0.99, "--top-k", 200)
    one, same, other = (tokens(*hot, "--seed", seed) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("command", ["generate", "compare", "inspect", "calibrate", "info"])
def test_a_revision_is_of_the_hub(model_dir, image, command, tmp_path):
    more = {
        "inspect": ("--json", "--image", image, "--prompt", "x"),
        "calibrate": ("--image", image, "--prompt", "x", "--out", tmp_path / "layers.json"),
        "info": (),
    }
    options = more.get(command, ("--image", image, "--prompt", "x"))
    refused("is not on the hub and has no revision='v1'", command, model_dir, *options,
            "--revision", "v1")  # fmt: skip


def test_a_trace_holds_what_was_kept(model_dir, image, tmp_path):
    file = tmp_path / "trace.npz"
    args = ("generate", model_dir, "--image", image, "--prompt", "what?", "--max-new-tokens", 2,
            "--json", "--method", "vl-cache", "--kv-budget", "40tok", "--trace", file)  # fmt: skip
    result = run(*args)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    kv, m = answer["kv"], answer["prompt_tokens"]
    assert (kv["method"], kv["budget_requested"]) == ("vl-cache", "40tok")
    assert kv["budget"] == pytest.approx(40 / m)
    with np.load(file) as trace:
        assert set(trace) == {
            "sparsity", "beta", "budget", "kept", "scores", "prompt_is_visual",
            "prompt_is_context", "window_start",
            "m", "tau", "method", "budget_requested", "hit_rate", "mass_recall", "recent",
        }  # fmt: skip
        assert trace["budget"].tolist() == kv["layer_budgets"]
        assert (trace["budget"].dtype, trace["kept"].dtype) == (np.int32, np.int32)
        assert trace["scores"].shape == (2, 2, m)
        assert trace["prompt_is_visual"].sum() == answer["visual_tokens"]
        assert (int(trace["m"]), int(trace["window_start"])) == (m, m - int(trace["tau"]))
        assert (str(trace["method"]), str(trace["budget_requested"])) == ("vl-cache", "40tok")
        assert trace["hit_rate"].shape == trace["mass_recall"].shape == (2, 2)
        for layer, head in np.ndindex(2, 2):
            kept = trace["kept"][layer, head]
            count = trace["budget"][layer]
            assert (np.diff(kept[:count]) > 0).all()
            assert (kept[count:] == -1).all()
    assert [path.name for path in tmp_path.iterdir() if "trace" in path.name] == ["trace.npz"]
    before = file.read_bytes()
    refused("--force", *args)
    assert file.read_bytes() == before
    assert run(*args, "--force").exit_code == 0


def test_backends_give_the_same_answer(model_dir, image, monkeypatch):
    def tokens(*options):
        result = run("generate", model_dir, "--image", image, "--prompt", "what?",
                     "--max-new-tokens", 3, "--json", *options)  # fmt: skip
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["tokens"]

    expected = tokens("--backend", "xla")
    monkeypatch.setenv("VLCACHE_BACKEND", "triton")  # interpreted here
    assert tokens() == expected


def test_the_default_keeps_a_tenth(model_dir, image):
    args = ("generate", model_dir, "--image", image, "--prompt", "what?", "--max-new-tokens", 2)
    default = json.loads(run(*args, "--json").stdout)["kv"]
    assert (default["method"], default["budget_requested"]) == (DEFAULT_METHOD, "0.1")
    assert 0.08 < default["kept_share"] < 0.12
    shown = run(*args, "--method", "streaming-llm", "--kv-budget", "0.2").stdout
    assert "streaming-llm, budget 0.2" in shown
    assert "kept per layer" in shown


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bomb(path):
    Image.new("1", (20000, 20000)).save(path)


def no_weights(path):
    (path / "model.safetensors").unlink()


def pickled(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def empty_config(path):
    (path / "config.json").write_bytes(b"")


def change_config(**values):
    def change(path):
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no image file"),
        (lambda path: path.write_text("hello"), "not an image"),
        (lambda path: path.write_bytes(b""), "not an image"),
        (truncate, "truncated"),
        (bomb, "Pillow's limit"),
    ],
    ids=["missing", "text", "empty", "truncated", "bomb"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images(model_dir, image, damage, message):
    image.write_bytes(image.read_bytes())
    damage(image)
    refused(message, "generate", model_dir, "--image", image, "--prompt", "x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (empty_config, "config.json"),
        (change_config(model_type="gpt2"), "gpt2"),
        (change_config(auto_map={"AutoModel": "m.M"}), "remote code"),
        (no_weights, "safetensors"),
        (pickled, "pickle"),
        (lambda path: truncate(path / "model.safetensors"), "truncated"),
        (lambda path: (path / "config.json").unlink(), "config.json"),
        (lambda path: (path / "tokenizer.json").unlink(), "tokenizer"),
        (shutil.rmtree, "no "),
    ],
    ids=["config", "kind", "code", "no weights", "pickle", "truncated", "gone", "tokenizer", "dir"],
)
def test_bad_models(model_dir, image, tmp_path, damage, message):
    copy = shutil.copytree(model_dir, tmp_path / "copy")
    damage(copy)
    refused(message, "generate", copy, "--image", image, "--prompt", "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "x" * 3000), "positions"),
        (("--prompt", "<image> and <image>"), "2 <image> marks"),
        (("--prompt", "x", "--raw-prompt"), "0 <image> marks"),
        (("--prompt", "x", "--max-new-tokens", "0"), "max_new_tokens=0"),
        (("--prompt", "x", "--max-new-tokens", "-4"), "max_new_tokens=-4"),
        (("--prompt", "x", "--dtype", "int8"), "int8"),
        (("--prompt", "x", "--method", "h2o-typo"), "h2o-typo"),
        (("--prompt", "x", "--method", "fastv"), "fastv"),
        (("--prompt", "x", "--method", "full", "--kv-budget", "0.5"), "keeps everything"),
        (("--prompt", "x", "--kv-budget", "0"), "above 0"),
        (("--prompt", "x", "--kv-budget", "12tokens"), "12tokens"),
        (("--prompt", "x", "--kv-bits", "3"), "choose one of 2, 4, 8, akvq, kivi, or 16"),
        (("--prompt", "x", "--trace", "trace.txt"), ".npz"),
        (("--prompt", "x", "--trace", "nowhere/trace.npz"), "no directory"),
        (("--prompt", "x", "--temperature", "-1"), "temperature"),
        (("--prompt", "x", "--top-p", "0"), "top_p"),
        (("--prompt", "x", "--backend", "cuda"), "use one of triton, cudnn, xla"),
        (("--prompt", "x", "--backend", "cudnn"), "needs a GPU"),
    ],
)
def test_bad_options(model_dir, image, options, message):
    refused(message, "generate", model_dir, "--image", image, *options)


def test_info(model_dir):
    result = run("info", model_dir, "--context", 500, "--batch", 3, "--method", "full", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    need = facts["memory"]
    assert need["bucket"] == 512
    assert need["pool"] == 3 * 2 * 512 * 2 * 2 * 8 * 4
    assert need["prefill"] == 0
    assert need["total"] == sum(need[n] for n in ("parameters", "pool", "tail", "activations"))
    default = json.loads(run("info", model_dir, "--context", 500, "--batch", 3, "--json").stdout)
    # 2 layers of ceil(0.11 * 512) + 1 rows are one block; the whole K and V live in prefill.
    assert default["memory"]["pool"] == 3 * 128 * 2 * 2 * 8 * 4
    assert default["memory"]["prefill"] == need["pool"]
    assert default["memory"]["total"] == need["total"] + default["memory"]["pool"]
    sizes = [np.prod(a.shape) for a in parameters(model_dir)]
    assert facts["parameters"]["total"] == sum(sizes)
    assert need["parameters"] == 4 * sum(sizes)
    assert facts["buckets"]["prompt"][0] == {"size": 64, "padding": pytest.approx(63 / 128)}
    shown = run("info", model_dir, "--context", 500)
    assert "cache per token" in shown.stdout
    assert "share of padding" in shown.stdout


def test_info_of_a_quantized_cache(model_dir):
    options = ("--context", 500, "--method", "full", "--kv-bits", "2", "--json")
    need = json.loads(run("info", model_dir, *options).stdout)["memory"]
    assert (need["label"], need["kv_bits"]) == ("full+rtn", "2")
    # K and V, 2 heads: 2 layers of 512 rows of 8 numbers of 2 bits, and 4 bytes of scale and shift.
    least = 2 * 2 * 2 * 512 * (8 * 2 // 8 + 4)
    assert least < need["pool"] < 2 * least  # with the ends of runs, and a block of full width
    assert need["prefill"] == 2 * 512 * 2 * 2 * 8 * 4
    shown = run("info", "demo-small", "--kv-bits", "akvq").stdout
    assert f"{DEFAULT_METHOD}, budget 0.1, akvq" in " ".join(shown.split())


def parameters(path):
    from tests.model_files import read_tensors

    return read_tensors(path).values()


def test_info_refuses_more_than_the_model_has_positions_for(model_dir):
    refused("positions", "info", model_dir, "--context", 5000)


def test_help_teaches():
    text = run("generate", "--help").stdout
    assert "--image" in text
    assert "demo-small:1" in text
    text = " ".join(run("calibrate", "--help").stdout.split())
    for word in ("Example: vlcache calibrate", "kv_layers.json", "akvq"):
        assert word in text
    text = run("compare", "--help").stdout
    assert "--kv-bits" in text
    for word in ("side by side", "--kv-budget", "256tok", "Example: vlcache compare demo"):
        assert word in text


def test_the_shipped_demo_answers():
    result = run("generate", "demo-small", "--image", "demo-small", "--max-new-tokens", 4,
                 "--prompt", "What is in the picture?", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert len(answer["tokens"]) <= 4
    assert answer["visual_tokens"] > 200


def test_a_quantized_cache_is_told_byte_by_byte(model_dir, image):
    args = ("--image", image, "--prompt", "what?", "--max-new-tokens", 3, "--method", "full",
            "--kv-bits", "2")  # fmt: skip
    result = run("generate", model_dir, *args, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    kv, m = answer["kv"], answer["prompt_tokens"]
    assert (kv["method"], kv["label"], kv["kv_bits"]) == ("full", "full+rtn", "2")
    # K and V, 2 layers, 2 kv heads: 8 numbers of 2 bits, and 4 bytes of scale and shift.
    assert kv["payload_bytes"] == 2 * 2 * m * 2 * 8 * 2 // 8
    assert kv["scale_bytes"] == 2 * 2 * m * 2 * 4
    assert kv["dense_bytes"] == 0
    assert kv["kept_bytes"] == kv["payload_bytes"] + kv["scale_bytes"]
    assert kv["effective_bits"] == 6
    assert kv["kept_share"] == 6 / 32
    table = run("compare", model_dir, *args, "--kv-bits", "16").stdout
    for word in ("full, budget 1.0, 2 bits", "bits per number", "6.00", "codes"):
        assert word in table


def test_calibration_leaves_a_file_that_later_runs_find(model_dir, image, tmp_path):
    copy = shutil.copytree(model_dir, tmp_path / "copy")
    ask = ("calibrate", copy, "--image", image, "--image", image, "--threshold", 0.3)
    asked = (*ask, "--prompt", "what?")
    result = run(*asked, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    file = copy / "kv_layers.json"
    assert facts["file"] == str(file)
    written = json.loads(file.read_text())
    assert written["text_shares"] == facts["text_shares"]
    assert (written["threshold"], written["prompts"]) == (0.3, 2)
    above = [layer for layer, share in enumerate(facts["text_shares"]) if share > 0.3]
    assert facts["tsa_layers"] == above
    assert vlcache_jax.load(copy, lazy=True).tsa_layers == tuple(above)
    before = file.read_bytes()
    refused("--force", *asked)
    assert file.read_bytes() == before
    out = tmp_path / "other.json"
    shown = run(*asked, "--out", out)
    assert shown.exit_code == 0, shown.output
    for word in ("text share", f"{facts['text_shares'][1]:.1%}", "salient", str(out)):
        assert word in shown.stdout.replace("\n", "")
    assert json.loads(out.read_text()) == written
    for options, message in (
        (("demo-small", "--image", "demo-small"), "--out FILE"),
        ((copy, "--force"), "give one --image or --video or more"),
        ((copy, "--force", "--image", image), "give a --prompt"),
        (
            (
                copy,
                "--force",
                "--image",
                "demo-small",
                "--image",
                "demo-small",
                *("--prompt", "x") * 3,
            ),
            "2 images, 0 videos and 3 prompts",
        ),
        ((copy, "--out", tmp_path / "none" / "x.json", "--image", "demo-small"), "no directory"),
        ((copy, "--force", "--image", "demo-small", "--threshold", 2), "threshold=2"),
    ):
        refused(message, "calibrate", *options)


def test_a_demo_picture_brings_its_question(model_dir):
    third = demo.pictures("demo-small")[2]
    args = ("generate", model_dir, "--image", "demo-small:3", "--max-new-tokens", 2)
    own = run(*args)
    assert own.exit_code == 0, own.output
    assert third.prompt[:20] in own.stdout
    assert third.answer in own.stdout

    def tokens(*more):
        return json.loads(run(*args, "--json", *more).stdout)["tokens"]

    assert tokens() == tokens("--prompt", third.prompt)


def test_info_lists_the_demo_pictures():
    facts = json.loads(run("info", "demo-small", "--json").stdout)
    names = [shown.name for shown in demo.pictures("demo-small")]
    assert [shown["name"] for shown in facts["pictures"]] == names
    table = run("info", "demo-small").stdout
    for name in names:
        assert name in table


COUNTS_HITS = """
import sys, jax
from vlcache_jax.cli import main
hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None
)
try:
    main()
finally:
    print(len(hits), file=sys.stderr)
"""


@pytest.mark.full
def test_compiled_programs_are_kept_between_runs(model_dir, tmp_path):
    folder = tmp_path / "vlcache-jax" / "programs"

    def hits(*options):
        """Programs that a run found there."""
        command = [sys.executable, "-c", COUNTS_HITS, *options, "generate", str(model_dir)]
        child = subprocess.run(
            [*command, "--prompt", "hello", "--max-new-tokens", "2", "--json"],
            env=without_kept_programs() | {"XDG_CACHE_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        return int(child.stderr.split()[-1])

    assert hits() == 0
    kept = sorted(folder.iterdir())
    assert hits() == len(kept) > 0
    assert hits("--no-compilation-cache") == 0
    assert sorted(folder.iterdir()) == kept


def test_a_prompt_in_the_templates_own_form_gets_one_line_of_warning(model_dir, image):
    text = "user: what?\nassistant:"
    result = run("generate", model_dir, "--image", image, "--prompt", text, "--max-new-tokens", 2)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("warning: ")
    assert "--raw-prompt" in result.stderr
    assert result.stderr.count("\n") == 1
