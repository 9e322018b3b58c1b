"""The plug-in for lmms-eval: its parts alone, its class over stand-ins, and lmms-eval itself.

lmms-eval asks for other versions than the tests are run with, and brings a package called `tests`.
So it has an environment of its own, made with `pip install '.[eval]'`, whose Python the variable
LMMS_EVAL_PYTHON names. Without the variable that last test is skipped.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import vlcache_jax
from benchmarks.lmms_eval.requests import (
    Request,
    Settings,
    Visuals,
    answer_all,
    batch_size_of,
    check_machine,
)
from tests.tiny import picture
from vlcache_jax import Sampling, demo
from vlcache_jax.cache.quantizers import QUANTIZERS

ROOT = Path(__file__).parents[2]
MODEL_MODULE = "benchmarks.lmms_eval.model"
MODEL_CLASS = f"{MODEL_MODULE}.VLCacheModel"


def test_the_manifest_imports_neither_jax_nor_lmms_eval():
    code = (
        "import sys, benchmarks.lmms_eval as plugin; plugin.manifest; "
        "print([name for name in ('jax', 'numpy', 'lmms_eval') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_entry_point_and_the_wheel_name_the_plug_in():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, name = project["project"]["entry-points"]["lmms_eval.models"]["vlcache"].partition(
        ":"
    )
    assert callable(getattr(importlib.import_module(module), name))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert module.replace(".", "/") in wheel["only-include"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Settings()),
        ({"max_new_tokens": 16, "until": ["\n\n"]}, Settings(16)),
        ({"until": None, "temperature": 0.0, "num_beams": 1, "top_p": None}, Settings()),
        ({"until": "ASSISTANT:"}, Settings(until=("ASSISTANT:",))),
        ({"until": ["\n\n", "", "###"]}, Settings(until=("\n\n", "###"))),
        # What cannot be drawn with does not matter where nothing is drawn.
        ({"do_sample": False, "temperature": 0.2, "top_p": 0}, Settings()),
        ({"do_sample": True, "temperature": 0}, Settings()),
        ({"temperature": 0.2}, Settings(sampling=Sampling(0.2))),
        ({"do_sample": True}, Settings(sampling=Sampling(1.0))),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
            Settings(sampling=Sampling(0.7, 20, 0.9)),
        ),
        ({"do_sample": True, "top_k": 0}, Settings(sampling=Sampling(1.0))),
        ({"image_aspect_ratio": "pad"}, Settings()),
    ],
)
def test_generation_arguments(given, expected):
    assert Settings.of(given) == expected


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"num_beams": 5}, NotImplementedError, "--gen_kwargs num_beams=1"),
        ({"repetition_penalty": 1.2}, NotImplementedError, "repetition_penalty=1.2"),
        ({"temperature": -1}, ValueError, "temperature=-1"),
        ({"do_sample": True, "top_p": 0}, ValueError, "top_p"),
    ],
)
def test_generation_arguments_that_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        Settings.of(given)


def test_documents_without_images_and_with_videos():
    datasets = {"task": {"test": [None]}}
    text_only = Request.of(("q", {}, lambda doc: doc, 0, "task", "test"), datasets)
    assert text_only.visuals() == ([], [])
    photo = picture(9, 9)
    both = Request.of(("q", {}, lambda doc: ["a.mp4", photo], 0, "task", "test"), datasets)
    assert both.visuals() == ([photo], ["a.mp4"])
    audio = Request.of(("q", {}, lambda doc: [{"array": []}], 0, "task", "test"), datasets)
    with pytest.raises(NotImplementedError, match=r"document 0 of task has a dict: .*not audio"):
        audio.visuals()


def test_requests_share_a_batch_with_those_of_their_settings():
    calls = []

    def generate_each(batches):
        for given in batches:
            assert given["frames"] == (5 if any(given["videos"]) else None)
            names = "images", "videos", "text", "max_new_tokens", "seed", "top_p", "stop"
            calls.append(tuple(given[name] for name in names))
            yield given["text"]

    few, many = Settings(4), Settings(9, Sampling(1.0, None, 0.5), ("end",))
    kinds = [few, many, few, few, many]
    image: Any = "image"
    shown = [Visuals([image], ["a.mp4"] * (place == 3)) for place in range(5)]
    requests = [
        Request(f"q{place}", lambda place=place: shown[place], kind)
        for place, kind in enumerate(kinds)
    ]
    vlm: Any = SimpleNamespace(generate_each=generate_each)
    cache = vlcache_jax.FullCache()
    done = list(answer_all(vlm, requests, cache=cache, batch_size=2, frames=5, seed=7))
    assert [places for places, _ in done] == [[0, 2], [3], [1, 4]]
    assert calls == [
        ([[image], [image]], [[], []], ["q0", "q2"], 4, 7, 1.0, ()),
        ([[image]], [["a.mp4"]], ["q3"], 4, 8, 1.0, ()),
        ([[image], [image]], [[], []], ["q1", "q4"], 9, 9, 0.5, ("end",)),
    ]


def test_arguments_of_every_model(monkeypatch):
    assert batch_size_of("4", None) == 4  # the command line gives text
    assert batch_size_of(8, 2) == 2
    for size in ("auto", "0", -1, "1.5"):
        with pytest.raises(ValueError, match="whole numbers"):
            batch_size_of(size, None)
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    for device in (None, "cuda", "cuda:0"):
        check_machine(device)
    with pytest.raises(ValueError, match="JAX runs on 'cuda' here"):
        check_machine("cpu")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=1"):
        check_machine("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(NotImplementedError, match="2 processes"):
        check_machine(None)


@dataclass
class GenerationResult:
    """As lmms-eval's."""

    text: str
    token_counts: "TokenCounts | None" = None


@dataclass
class TokenCounts:
    """As lmms-eval's."""

    input_tokens: int | None = None
    output_tokens: int | None = None


class Lmms:
    """As much of lmms-eval's base class as the plug-in uses."""

    def __init__(self):
        self.task_dict = {}

    def clean(self):
        pass


@pytest.fixture
def plugin(monkeypatch):
    """The model's module over stand-ins for lmms-eval, and what it logs."""
    logged = []
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {
            "GenerationResult": GenerationResult,
            "Instance": object,
            "TokenCounts": TokenCounts,
        },
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.model_utils": {
            "gen_metrics": SimpleNamespace(log_metrics=lambda *args: logged.append(args))
        },
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("vlcache_jax.running.programs.keep_programs", lambda: None)
    monkeypatch.delitem(sys.modules, MODEL_MODULE, raising=False)
    yield importlib.import_module(MODEL_MODULE), logged
    del sys.modules[MODEL_MODULE]


@pytest.mark.parametrize(
    "family",
    [
        "model_dir",
        *(pytest.param(f"{name}_dir", marks=pytest.mark.full) for name in ("onevision", "qwen")),
    ],
)
def test_the_class_answers_in_the_order_of_the_requests(plugin, family, request):
    module, logged = plugin
    model = module.VLCacheModel(
        str(request.getfixturevalue(family)),
        kv_budget=0.2,
        dtype="float32",
        batch_size="2",
        device="cpu",
    )
    documents = [
        {"image": picture(60, 50, seed), "question": f"{'Why? ' * seed}What?"} for seed in range(3)
    ]
    model.task_dict["tiny"] = {"test": documents}
    lengths = [3, 6, 3]
    results = model.generate_until(
        [
            SimpleNamespace(
                args=(
                    doc["question"],
                    {"max_new_tokens": length, "until": ["\n\n"]},
                    lambda doc: [doc["image"]],
                    number,
                    "tiny",
                    "test",
                )
            )
            for number, (doc, length) in enumerate(zip(documents, lengths, strict=True))
        ]
    )
    # The longest for all, so that one program serves them: a shorter answer is its beginning.
    alone = [
        model.vlm.generate(
            doc["image"],
            doc["question"],
            max_new_tokens=max(lengths),
            cache=vlcache_jax.VLCache(budget=0.2),
        )
        for doc in documents
    ]
    tokens = [answer.tokens[:length] for answer, length in zip(alone, lengths, strict=True)]
    assert [result.text for result in results] == list(map(model.vlm.processor.decode, tokens))
    assert len({result.text for result in results}) == 3  # so that an exchange would be seen
    counts = [
        (result.token_counts.input_tokens, result.token_counts.output_tokens) for result in results
    ]
    assert counts == [
        (answer.prompt_tokens, len(said)) for answer, said in zip(alone, tokens, strict=True)
    ]
    [(seconds, total, speed, more)] = logged
    assert total == sum(map(len, tokens))
    assert speed == total / seconds
    assert more["num_requests"] == 3
    kept = sum(answer.cache.kept_bytes for answer in alone)
    assert more["cache_share_kept"] == kept / sum(answer.cache.full_bytes for answer in alone)


def test_an_answer_ends_before_the_first_string(plugin, model_dir):
    module, _ = plugin
    model = module.VLCacheModel(str(model_dir), dtype="float32")
    model.task_dict["tiny"] = {"test": [None]}

    def answer(*until):
        generation = {"max_new_tokens": 6, "until": until}
        arguments = "What?", generation, lambda doc: [], 0, "tiny", "test"
        [result] = model.generate_until([SimpleNamespace(args=arguments)])
        return result.text

    whole = answer()
    assert len(set(whole)) > 2
    ends = whole[-1], whole[len(whole) // 2]
    assert answer(*ends) == whole[: min(map(whole.index, ends))]
    assert answer("no such text") == whole


def test_a_video_beside_a_picture(plugin, onevision_dir, tmp_path):
    module, _ = plugin
    shots = [picture(40, 30, seed) for seed in range(4)]
    film = tmp_path / "a.gif"
    shots[0].save(film, save_all=True, append_images=shots[1:])
    model = module.VLCacheModel(str(onevision_dir), batch_size=2, frames=2)
    model.task_dict["tiny"] = {"test": [[str(film)], [shots[0]]]}
    asked = [("What?", {"max_new_tokens": 6}, list, number, "tiny", "test") for number in range(2)]
    found = model.generate_until([SimpleNamespace(args=arguments) for arguments in asked])
    options = {"max_new_tokens": 6, "cache": vlcache_jax.VLCache()}
    alone = [
        model.vlm.generate(None, "What?", videos=film, frames=2, **options),
        model.vlm.generate(shots[0], "What?", **options),
    ]
    assert [result.text for result in found] == [answer.text for answer in alone]
    assert found[0].text != found[1].text


def test_bits_may_be_a_number_and_the_weights_are_made_for_them(plugin, model_dir):
    module, _ = plugin
    model = module.VLCacheModel(str(model_dir), kv_bits=2)
    assert model.cache == vlcache_jax.VLCache(quantize=QUANTIZERS["2"])
    assert model.vlm.transformed
    model = module.VLCacheModel(str(model_dir), kv_bits="kivi")
    assert model.cache.label == "vl-cache+kivi"
    assert not model.vlm.transformed


def test_the_class_frees_the_model_and_says_what_it_cannot_do(plugin, model_dir):
    module, _ = plugin
    model = module.VLCacheModel(str(model_dir), method="snapkv", kv_budget="8tok")
    assert model.cache == vlcache_jax.SnapKV(budget="8tok")
    assert model.generate_until([]) == []
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="vlcache"):
            method([])
    model.clean()
    assert not hasattr(model, "vlm")
    wrong_arguments = (
        {"method": "best"}, {"device": "cuda"}, {"batch_size": "auto"}, {"kv_bits": 3},
    )  # fmt: skip
    for wrong in wrong_arguments:
        with pytest.raises(ValueError):
            module.VLCacheModel(str(model_dir), **wrong)


TASK = """\
task: {name}
dataset_path: imagefolder
dataset_kwargs:
  data_dir: {data}
test_split: train
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {generation}
process_results: !function utils.process_results
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""

UTILS = """\
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def process_results(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""


@pytest.mark.skipif(
    "LMMS_EVAL_PYTHON" not in os.environ,
    reason="lmms-eval itself was NOT run, only stand-ins for it: set LMMS_EVAL_PYTHON to the "
    "Python of an environment made with pip install '.[eval]'",
)
def test_lmms_eval_runs_the_demo_on_a_local_task(tmp_path):
    shown = demo.pictures("demo-small")[:3]
    data = tmp_path / "data"
    data.mkdir()
    for shot in shown:
        shutil.copy(shot.file, data)
    rows = [
        {"file_name": shot.file.name, "question": shot.prompt, "answer": shot.answer}
        for shot in shown
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (data / "metadata.jsonl").write_text(lines, encoding="utf-8")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "utils.py").write_text(UTILS, encoding="utf-8")
    ends = shown[0].answer[2]  # the first answer is cut to its first two characters
    generations = {
        "vlcache_whole": "{max_new_tokens: 16, temperature: 0, top_p: 0, do_sample: false}",
        "vlcache_until": f"{{max_new_tokens: 16, until: ['{ends}']}}",
    }
    for name, generation in generations.items():
        text = TASK.format(name=name, data=data, generation=generation)
        (tasks / f"{name}.yaml").write_text(text, encoding="utf-8")
    settings = {
        **{"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
        **{"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},  # compiles sooner
    }
    done = subprocess.run(
        [
            *(os.environ["LMMS_EVAL_PYTHON"], "-m", "lmms_eval"),
            *("--model", "vlcache", "--device", "cpu"),
            *(
                "--model_args",
                "pretrained=demo-small,method=full,dtype=float32",
                "--batch_size",
                "2",
            ),
            *("--tasks", ",".join(generations), "--include_path", str(tasks)),
            *("--output_path", str(tmp_path / "out"), "--log_samples"),
        ],
        cwd=tmp_path,
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = [shot.answer for shot in shown]
    expected = {"vlcache_whole": answers, "vlcache_until": [a.split(ends)[0] for a in answers]}
    [file] = tmp_path.glob("out/**/*_results.json")
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["results"]["vlcache_whole"]["right,none"] == 1.0
    assert results["results"]["vlcache_until"]["right,none"] == pytest.approx(2 / 3)
    assert results["throughput"]["avg_cache_share_kept"] == 1.0
    assert MODEL_CLASS in results["config"]["model_backend"]
    for name, texts in expected.items():
        [file] = tmp_path.glob(f"out/**/*_samples_{name}.jsonl")
        samples = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        said = {sample["input"]: sample["filtered_resps"] for sample in samples}
        assert said == {shot.prompt: text for shot, text in zip(shown, texts, strict=True)}
