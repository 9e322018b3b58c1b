"""Changed configuration files: an answer, or one line that says what is wrong; never a traceback.

Case i is always the same change of one file of a tiny model, drawn with the seed i.
"""

import json
import math
import random
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from tests.cli.program import run, run_alone
from vlcache_jax.models.families import read_config

NAMES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
)
VALUES = (
    *("", "x", "5", "line\nline", "y" * 5000, "\ud800", "default", "llava"),
    *([], [1], ["a"], [[336]], [[336, 336]], {}, {"a": 1}, {"type": "linear"}, [[[[]]]]),
    *(True, False, -1, 0, 1, 2, 3, 264, 1.5, 1e-30, 1e300, 10**12, 10**400),
    *(math.nan, math.inf, -math.inf),
)
SAME = "same"


def places(data, path=()):
    """Every place below the top of a JSON value, as a path of keys and numbers."""
    entries = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in entries:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def at(data, path) -> Any:
    for key in path:
        data = data[key]
    return data


def changed(draw: random.Random, files: dict[str, bytes]) -> tuple[str, bytes, str]:
    """One file with one change: its name, new content, and what was done; SAME means nothing."""
    name = draw.choice(sorted(files))
    content = files[name]
    data, how = json.loads(content), draw.choice(["null", "remove", *["value"] * 3, "add", "text"])
    if how == "text":
        cut = content[: draw.randrange(len(content))]
        byte = bytes([draw.randrange(256)])
        new, what = draw.choice(
            [
                (cut, "truncated"),
                (b"\xef\xbb\xbf" + content, "BOM"),
                (content + b"\x00", "zero"),
                (content + b"}", "trailing"),
                (b"", "empty"),
                (b"[" + content + b"]", "list"),
                (b"\n " + content + b" \n", SAME),
                (cut + byte + content[len(cut) + 1 :], "byte"),
            ]
        )
        return name, new, what
    if how == "add":
        sections = [(), *(path for path in places(data) if isinstance(at(data, path), dict))]
        path = (*draw.choice(sections), f"unknown_{draw.randrange(100)}")
        at(data, path[:-1])[path[-1]] = value = draw.choice(VALUES)
        # Of a tokenizer the entry of an object may be a token.
        what = SAME if len(path) == 1 or name == "config.json" else f"{path}={value!r:.40}"
        return name, json.dumps(data).encode(), what
    path = draw.choice(list(places(data)))
    holder, key = at(data, path[:-1]), path[-1]
    if how == "remove":
        del holder[key]
    else:
        old, values = holder[key], VALUES
        if isinstance(old, (int, float)):
            values = (*VALUES, *[old + 1, 2 * old, -old, str(old), float(old)] * 3)
        holder[key] = None if how == "null" else draw.choice(values)
    what = f"{how} {path} {at(data, path)!r:.40}" if how != "remove" else f"remove {path}"
    same = name == "generation_config.json" and how != "value" and len(path) == 1
    if name == "config.json":
        try:
            same = read_config(data) == read_config(json.loads(content))
            same &= how != "value" or not str(key).endswith("dtype")
            AutoConfig.for_model(**data)  # a tokenizer of `transformers` reads it too
        except (ValueError, NotImplementedError, StrictDataclassError):
            same = False
    return name, json.dumps(data).encode(), SAME if same else what


@pytest.fixture(scope="module")
def directory(request):
    """Of the model whose fixture a test names."""
    return request.getfixturevalue(request.param)


def files_of(directory):
    """The configuration files as they are, with ids in a generation_config.json too."""
    found = {name: (directory / name).read_bytes() for name in NAMES if (directory / name).exists()}
    generation = {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0, "do_sample": False}
    return found | {"generation_config.json": json.dumps(generation).encode()}


def answer(path, *options, prompt="x", run=run):
    """The text of an answer, or the one line on stderr."""
    options += ("--max-new-tokens", 2, "--method", "full", "--json")  # the smallest programs
    result = run("generate", path, "--prompt", prompt, *options)
    assert isinstance(result.exception, SystemExit | None), result.exception
    if result.exit_code == 0:
        facts = json.loads(result.stdout)
        return facts["text"], None
    assert result.exit_code == 2
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert len(line) <= 400, line
    return None, line


@pytest.fixture(scope="module")
def plain(directory, tmp_path_factory):
    """What is answered with the files as they are."""
    return answer(write(tmp_path_factory.mktemp("plain"), directory, files_of(directory)))


def write(target, directory, files):
    """A model with these files in place of its own."""
    for file in directory.iterdir():
        if file.name not in files:
            (target / file.name).symlink_to(file)
    for name, content in files.items():
        (target / name).write_bytes(content)
    return target


def marks(case, fast=100):
    return [pytest.mark.slow] if case >= fast else []


FAST = {
    "model_dir": 100,
    **dict.fromkeys(("onevision_dir", "qwen_dir", "qwen3_dir", "text_dir"), 10),
}
"""Cases of each model that are tried whenever tests run; a thousand where slow ones are too."""


@pytest.mark.parametrize(
    ("directory", "case"),
    [
        pytest.param(name, case, marks=marks(case, fast))
        for name, fast in FAST.items()
        for case in range(1000)
    ],
    indirect=["directory"],
)
def test_a_changed_file_is_answered_or_refused_in_one_line(directory, case, plain, tmp_path):
    files = files_of(directory)
    name, content, what = changed(random.Random(case), files)  # `what` is shown where it fails
    text, line = answer(write(tmp_path, directory, files | {name: content}))
    if what == SAME:
        assert (text, line) == plain, content


@pytest.mark.full
@pytest.mark.parametrize("case", range(8))
def test_a_process_of_its_own_says_the_same(case, model_dir, tmp_path):
    files = files_of(model_dir)
    name, content, _ = changed(random.Random(case), files)
    path = write(tmp_path, model_dir, files | {name: content})
    alone, here = answer(path, run=run_alone), answer(path)
    assert alone[0] == here[0]
    assert (alone[1] is None) == (here[1] is None)  # in which sets may stand in another order
