"""What `vlcache generate` is told and tells: conversations, and where answers end."""

import json
import sys

import pytest

from tests.cli.program import refused, run
from vlcache_jax import VLM


def answer_of(*args):
    result = run("generate", *args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_conversation_in_place_of_a_prompt(model_dir, image, tmp_path):
    file = tmp_path / "messages.json"
    turns = [("system", "é"), ("user", "<image>a"), ("assistant", "b"), ("user", "what?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    file.write_text(json.dumps(messages, ensure_ascii=False), encoding="utf-8")
    ask = (model_dir, "--image", image, "--max-new-tokens", 1)
    told = answer_of(*ask, "--messages", file)
    raw = "system: é\nuser: <image>\na\nassistant: b\nuser: what?\nassistant:"  # by the template
    same = answer_of(*ask, "--prompt", raw, "--raw-prompt")
    for name in ("tokens", "prompt_tokens", "visual_tokens"):
        assert told[name] == same[name]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, (), "messages.json"),
        ("", (), "messages.json is not valid JSON"),
        ("[{", (), "messages.json is not valid JSON"),
        ("\xff", (), "messages.json is not valid JSON"),
        ("{}", (), "must hold a list of messages, such as [{"),
        ('"what?"', (), "must hold a list of messages"),
        ("[]", (), "must hold a list of messages"),
        ('[{"role": "tool", "content": "a"}]', (), "messages[0] has the role 'tool'"),
        ('[{"role": "user", "content": "<image><image>"}]', (), "2 <image> marks in the messages"),
        ('[{"role": "user", "content": "a"}]', ("--prompt", "b"), "not both"),
        ('[{"role": "user", "content": "a"}]', ("--raw-prompt",), "raw_prompt takes a string"),
    ],
)
def test_bad_conversations(model_dir, image, tmp_path, content, options, message):
    file = tmp_path / "messages.json"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    refused(message, "generate", model_dir, "--image", image, "--messages", file, *options)


def test_an_answer_ends_in_front_of_a_stop_text(model_dir, image):
    ask = (model_dir, "--image", image, "--prompt", "what?", "--max-new-tokens", 30)
    whole = answer_of(*ask)
    text, at = whole["text"], len(whole["text"]) // 2
    stop = text[at : at + 2]
    cut = answer_of(*ask, "--stop", "never said", "--stop", stop)
    assert cut["text"] == text[: text.index(stop)]
    assert cut["tokens"] == whole["tokens"][: len(cut["tokens"])]
    assert len(cut["tokens"]) < 30
    refused("must be a string", "generate", *ask, "--stop", "")


def test_options_that_are_handed_on(model_dir, image, monkeypatch):
    asked = []
    monkeypatch.setattr(VLM, "stream", lambda vlm, *args, **options: asked.append(options))
    monkeypatch.setattr("vlcache_jax.cli.read_params", lambda *args: sys.exit(0))
    ask = ("generate", model_dir, "--image", image, "--prompt", "x")
    assert run(*ask, "--stop", "a\\nb", "--stop", "END").exit_code == 0
    assert run(*ask).exit_code == 0
    assert [options["stop"] for options in asked] == [["a\nb", "END"], []]
    assert [options["messages"] for options in asked] == [None, None]
