"""Conversations in the terminal: a chat that is given lines, and the program with piped ones."""

import dataclasses
import io
import signal
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

import vlcache_jax
from tests.cli.program import refused
from tests.tiny import picture
from vlcache_jax.cli import app, chatting
from vlcache_jax.cli.chatting import read_lines, talk
from vlcache_jax.cli.conversation import COMMANDS, Chat
from vlcache_jax.results.display import differences

NEW = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def vlm(model_dir):
    return vlcache_jax.load(model_dir)


@pytest.fixture(scope="module")
def session(vlm):
    """Its prefix is run once, for the forks of all tests."""
    return vlm.session([picture(70, 40)])


@pytest.fixture
def chat(vlm, session, image):
    return Chat(vlm, session.fork(), ("snapkv", "0.5", None), NEW, [image])


def said(chat):
    return [message["content"] for message in chat._session.messages]


def test_a_conversation_and_what_each_answer_took(chat, session, capsys):
    own = session.fork()
    for question in ("what?", " /and now? "):
        assert chat.handle(question)
        out, err = capsys.readouterr()
        answer = own.ask(question.strip(), cache=vlcache_jax.SnapKV(0.5), **NEW)
        assert out == f"{answer.text}\n"
        assert err.count("\n") == 1
        assert err.startswith("time to first token 0.")
        assert "snapkv, budget 0.5; " in err
        assert f" of {answer.prompt_tokens} prompt tokens" in err
    assert f"reused {session.report().prefix_tokens} of" in err
    assert chat._session.messages == own.messages

    before = chat._session.messages
    assert chat.handle("/full")
    out, err = capsys.readouterr()
    assert "full, budget 1.0" in out
    assert "as the full cache" in out
    assert chat._session.messages == before


@pytest.mark.parametrize("blank", ["", "   ", "\t", "\u3000"])
def test_a_line_without_words_is_none(chat, capsys, blank):
    assert chat.handle(blank)
    assert not "".join(capsys.readouterr())
    assert not said(chat)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/", "no command /: /help lists them"),
        ("/nope \x1b[31m", "no command /nope"),
        ("/full now", "/full takes nothing behind it: leave now out"),
        ("/full", "ask a question, then /full"),
        ("/budget 20", "above 1"),
        ("/budget x", "must be a share"),
        ("/method none", "'none' is not implemented: choose one of"),
        ("/method fastv", "fastv, which prunes tokens, is not implemented"),
        ("/image", "/image needs a file"),
        ("/image ''", "/image needs a file"),
        ("/image ~none/none.png", "no image file at ~none/none.png"),
        ("/image demo-small:99", "there is no picture demo-small:99"),
        ("/save --force", "/save needs a file"),
        ("word " * 1000, "more than the model's 1024 positions"),
        ("<image> or <image>?", "image"),
    ],
)
def test_what_is_refused_costs_one_line_and_nothing_else(chat, capsys, line, reason):
    state = {name: value for name, value in vars(chat).items() if name != "_session"}
    assert chat.handle(line)
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert reason in err
    rest = err.splitlines()[1:]
    assert rest == ([] if line[0] == "/" else ["the question is not part of the conversation"])
    assert vars(chat) == state | {"_session": chat._session}
    assert not said(chat)


def test_what_is_kept_changes_from_the_next_question_on(chat, capsys):
    for line, setting in (
        ("/budget", "snapkv, budget 0.5"),
        ("/budget  40tok ", "snapkv, budget 40tok"),
        ("/method full", "full, budget 1.0"),
        ("/method h2o", "h2o, budget 40tok"),
        ("/method", "h2o, budget 40tok"),
    ):
        assert chat.handle(line)
        assert capsys.readouterr().err == f"{setting}\n"
    chat.handle("what?")
    assert "h2o, budget 40tok" in capsys.readouterr().err


def test_another_picture_begins_anew_and_one_that_is_none_does_not(chat, tmp_path, capsys):
    chat.handle("what?")
    before = said(chat)
    (tmp_path / "text.png").write_text("no picture")
    chat.handle(f"/image {tmp_path / 'text.png'}")
    assert "text.png" in capsys.readouterr().err
    assert said(chat) == before
    picture(40, 40).save(tmp_path / "a b.png")
    chat.handle(f'/image "{tmp_path / "a b.png"}"')
    assert capsys.readouterr().err == "a new conversation about image.png, a b.png\n"
    assert not said(chat)
    chat.handle("/full")
    assert "ask a question" in capsys.readouterr().err
    tokens = chat._session.report().visual_tokens
    chat.handle("/image demo-small:2")
    assert chat._session.report().visual_tokens > tokens


def test_help_names_every_command(chat, capsys):
    assert chat.handle("/help")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == [f"/{name}" for name in COMMANDS]
    assert all(hasattr(chat, f"_do_{name}") for name in COMMANDS if name != "quit")
    assert not chat.handle("/quit")


class Typed:
    """Lines as somebody types them; an exception is raised in its place, Ctrl-C for instance."""

    def __init__(self, *lines):
        self._lines = iter(lines)

    def __call__(self):
        line = next(self._lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line


def test_ctrl_c_stops_an_answer_and_not_the_program(chat, session, capsys, monkeypatch):
    class Interrupting(io.StringIO):
        def write(self, text):
            if text.strip():
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    whole = session.fork().ask("what?", max_new_tokens=40, cache=vlcache_jax.SnapKV(0.5)).text
    chat._asked = {"max_new_tokens": 40}
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout := Interrupting())
        talk(chat, Typed("what?", KeyboardInterrupt(), ""))
    shown = stdout.getvalue().removesuffix("\n")
    assert shown
    assert whole.startswith(shown)
    assert shown != whole
    assert capsys.readouterr().err.splitlines() == [
        "stopped: neither question nor answer is part of the conversation",
        "/quit, or Ctrl-D, ends the conversation",
    ]
    assert not said(chat)
    assert signal.getsignal(signal.SIGINT) is handler
    talk(chat, Typed("what?", "/quit", AssertionError("read on")))
    assert said(chat) == ["what?", whole]


def test_a_full_memory_does_not_end_the_conversation(chat, capsys, monkeypatch):
    from jax.errors import JaxRuntimeError

    def stream(*_, **__):
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(chat._session, "stream", stream)
    assert chat.handle("what?")
    assert "RESOURCE_EXHAUSTED" in capsys.readouterr().err


def test_differences_are_marked_from_the_first_token_on(chat):
    chat.handle("what?")
    _, _, answer = chat._last
    letters = {"same": "abc", "other": "abX", "more": "abcd", "none": ""}
    answers = {
        name: dataclasses.replace(answer, tokens=[ord(letter) for letter in text])
        for name, text in letters.items()
    }
    for own, full, expected in (
        ("same", "same", ("abc", "abc", "yes")),
        ("other", "same", ("ab[-X-]", "ab{+c+}", "no, from token 3 on")),
        ("same", "more", ("abc", "abc{+d+}", "no, from token 4 on")),
        ("same", "none", ("[-abc-]", "", "no, from token 1 on")),
    ):
        table = differences(answers[own], answers[full], lambda ids: [*map(chr, ids)])
        Console(file=(shown := io.StringIO()), width=80).print(table)
        rows = shown.getvalue().splitlines()[1:-1]
        assert tuple(row.split("│")[2].strip() for row in rows) == expected


def piped(lines, *args):
    command = ["--no-compilation-cache", "chat", *map(str, args), "--max-new-tokens", "4"]
    return CliRunner().invoke(app, command, input=lines)


def test_piped_lines_are_answered_until_they_end(model_dir, image, vlm):
    lines = "\ufeff/budget 7\n\n  \nunïcödé 日本?\r\n".encode() + b"\xff\xfe?"
    result = piped(lines, model_dir, "--image", image, "--method", "full", "--system", "Be brief.")
    assert result.exit_code == 0, result.output
    own = vlm.session([image], system="Be brief.")
    answers = [own.ask(question, **NEW).text for question in ("unïcödé 日本?", "\ufffd\ufffd?")]
    assert result.stdout == "".join(f"{text}\n" for text in answers)
    assert result.stderr.count("time to first token") == 2
    assert result.stderr.startswith("error: ")


def test_a_saved_conversation_goes_on(chat, vlm, model_dir, tmp_path, capsys, monkeypatch):
    # Its programs are compiled.
    monkeypatch.setattr(chatting, "open_model", lambda *_, **__: (vlm, Progress(disable=True)))
    file = tmp_path / "a b.safetensors"
    chat.handle("what?")
    for line, told in (
        (f'/save "{file}"', f"written to {file}"),
        (f"/save {file}", "--force"),
        (f'/save "{file}" --force', f"written to {file}"),
        (f"/save {tmp_path}/x.txt", "must end in .safetensors"),
    ):
        capsys.readouterr()
        assert chat.handle(line)
        assert told in capsys.readouterr().err
    chat.handle("and now?")
    out, _ = capsys.readouterr()
    options = ("--session", file, "--method", "snapkv", "--kv-budget", 0.5)
    result = piped("/full\n/image demo\nand now?", model_dir, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == out
    first, second, took = result.stderr.splitlines()
    assert "ask a question" in first
    assert "start again with --image" in second
    assert "reused" in took


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--max-new-tokens", 0), "max_new_tokens"),
        (("--temperature", -1), "temperature"),
        (("--store", 3), "there is no store '3'"),
        (("--image", "none.png"), "no image file at none.png"),
        (("--method", "full", "--kv-budget", 0.1), "leave the budget out"),
        (("--prefill-chunk", 0), "prefill_chunk"),
        (("--revision", "v1"), "has no revision='v1'"),
        (("--session", "none"), "there is no session at none"),
        (("--session", "x", "--image", "demo"), "--session has its own: leave --image out"),
        (("--session", "x", "--frames", 2, "--video", "y"), "leave --video and --frames out"),
    ],
)
def test_bad_options_end_the_program_before_it_reads_weights(model_dir, options, reason):
    refused(reason, "chat", model_dir, *options)


@pytest.fixture
def terminal(monkeypatch):
    stream = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(chatting, "sys", SimpleNamespace(stdin=stream, stdout=stream))


@pytest.mark.usefixtures("terminal")
def test_without_prompt_toolkit_there_is_one_hint(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.setattr("builtins.input", lambda prompt: f"{prompt}line")
    assert read_lines()() == "> line"
    assert capsys.readouterr().err.count("vlcache-jax[chat]") == 1


@pytest.mark.usefixtures("terminal")
def test_prompt_toolkit_keeps_a_history_and_completes_commands():
    pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        read = read_lines()
        keys.send_text("日本?\n")
        assert read() == "日本?"
        keys.send_text("\x1b[A\n")  # up
        assert read() == "日本?"
        for typed, line in (
            ("/bu\t 0.2", "/budget 0.2"),
            ("/method sn\t", "/method snapkv"),
            ("a /f\t", "a /f"),
        ):
            keys.send_text(f"{typed}\n")
            assert read() == line
        keys.send_text("half\x03")
        with pytest.raises(KeyboardInterrupt):
            read()
        keys.send_text("\x04")
        with pytest.raises(EOFError):
            read()
