"""Tokens to text piece by piece: against decoding all at once, and against plain readings of bytes.

The tokenizers are made on the spot, with the decoders that published checkpoints have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_config, tiny_processor, tiny_tokenizer
from vlcache_jax.requests.detokenize import BROKEN, WINDOW, Detokenizer
from vlcache_jax.requests.processing import CLEANED, Processor

SPECIAL = ["<unk>", "<s>", "</s>"]
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]  # by themselves, in byte pairs
OTHERS = [byte for byte in range(256) if byte not in PRINTED]
LETTERS = {byte: chr(byte) for byte in PRINTED} | {b: chr(256 + n) for n, b in enumerate(OTHERS)}
BYTES = b"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\xff a\n"  # of é, €, an emoji; one of no character


def wrapped(model: Any, decoder: Any, cleans: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=cleans,
    )


def numbered(words) -> dict[str, int]:
    return {word: number for number, word in enumerate(dict.fromkeys([*SPECIAL, *words]))}


def byte_pairs() -> PreTrainedTokenizerFast:
    """Byte-level, with merges that cut through characters."""
    parts = (b"\xa9 \xc3", b"\xe2\x82", b"\x82\xac", b"a\xf0", b"\x9f\x98", b"\x98\x80 b", b" the",
             b"\xef\xbf\xbd", b"\xbd\xef", b"\xff\xff", b"\x80\xe2", b"END", b"\n\n")  # fmt: skip
    pieces = [*(bytes([byte]) for byte in BYTES), *parts]
    words = ["".join(LETTERS[byte] for byte in piece) for piece in pieces]
    return wrapped(models.BPE(vocab=numbered(words), merges=[]), decoders.ByteLevel())


def byte_fallback(strip: bool, more: bytes = b"") -> PreTrainedTokenizerFast:
    """As Llama's (which strips the first space) and Gemma's."""
    words = [f"<0x{byte:02X}>" for byte in BYTES + more]
    words += ["▁", "▁▁", "▁the", "a", "b", "é", "▁a", "END", BROKEN, f"{BROKEN}a"]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(" ", 1, 0)] if strip else []
    model = models.BPE(vocab=numbered(words), merges=[], byte_fallback=True)
    return wrapped(model, decoders.Sequence(steps))


def unigram(cleans: bool) -> PreTrainedTokenizerFast:
    """As sentencepiece's, with transformers' clean-up or with bytes."""
    marks = ["'", "▁'", "▁.", "n", "▁n", "t", "m", "s", "▁s", "re", "▁ve", "!", ",", "▁?"]
    others = marks if cleans else [f"<0x{byte:02X}>" for byte in BYTES]
    words = numbered(["▁", "▁▁", "▁the", "a", "b", *others])
    model = models.Unigram([(word, -1.0) for word in words], unk_id=0, byte_fallback=True)
    return wrapped(
        model, decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]), cleans
    )


def word_pieces(cleans: bool) -> PreTrainedTokenizerFast:
    words = numbered(["the", "##s", "a", ".", "'", "n", "##t", "t", "ve", "!", ",", "do", "longer"])
    model = models.WordPiece(words, unk_token="<unk>")
    return wrapped(model, decoders.WordPiece(cleanup=cleans), cleans)


def suffixed() -> PreTrainedTokenizerFast:
    """The end of a word is marked, and is a space wherever a word follows."""
    words = numbered(["a</w>", "b", "the</w>", "</w>"])
    return wrapped(models.WordLevel(words, unk_token="<unk>"), decoders.BPEDecoder("</w>"))


@dataclass(frozen=True)
class Kind:
    """A tokenizer, and whether its single bytes are decoded run by run, all of one or none."""

    tokenizer: PreTrainedTokenizerFast
    runs: bool = False
    lookahead: int = 0

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def plain(self, ids: list[int]) -> str:
        """The text by a reading of its own, where there are single bytes."""
        words = [str(self.tokenizer.convert_ids_to_tokens(i)) for i in ids if i >= len(SPECIAL)]
        return run_by_run(words) if self.runs else self.decode(ids)

    def make(self, stop=()) -> Detokenizer:
        return Detokenizer(self.decode, stop, lookahead=self.lookahead)


def run_by_run(words: list[str]) -> str:
    """Every character of a run of bytes, and a mark for each byte that is in none."""
    text, run = "", b""
    for word in [*words, ""]:
        if word.startswith("<0x"):
            run += bytes([int(word[3:5], 16)])
            continue
        while run:
            sizes = [n for n in range(1, 5) if not run[:n].decode(errors="replace").count(BROKEN)]
            text += run[: sizes[0]].decode() if sizes else BROKEN
            run = run[sizes[0] if sizes else 1 :]
        text += word.replace("▁", " ")
    return text


def ids_of(tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> list[int]:
    known = tokenizer.get_vocab()
    return [known[word] for word in words]


KINDS = {
    "byte pairs": Kind(byte_pairs()),
    "llama": Kind(byte_fallback(strip=True), runs=True),
    "gemma": Kind(byte_fallback(strip=False), runs=True),
    "unigram": Kind(unigram(cleans=False), runs=True),
    "unigram, cleaned up": Kind(unigram(cleans=True), lookahead=CLEANED),
    "word pieces": Kind(word_pieces(cleans=False)),
    "word pieces, cleaned up": Kind(word_pieces(cleans=True), lookahead=CLEANED),
    "suffixed words": Kind(suffixed()),
}

few = settings(max_examples=40, deadline=None)
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@st.composite
def answers(draw, kind: Kind, size: int = 40):
    """Tokens, the same now and then and again, and where they are cut into pushes."""
    count = len(kind.tokenizer)
    # The clean-up pairs quotes from the left, however far back the first one is.
    size = WINDOW if kind.lookahead else size
    ids = draw(st.lists(st.integers(0, count - 1), max_size=size))
    if draw(st.booleans()) and not kind.lookahead:
        ids = ids[:3] * 9
    if kind.runs:  # a decoder that strips the first space would do so behind a stray byte too
        ids = [*ids_of(kind.tokenizer, ["a"]), *ids]
    return ids, sorted(draw(st.sets(st.integers(1, max(1, len(ids))), max_size=8)))


def told(detokenizer: Detokenizer, ids: list[int], cuts: list[int]) -> str:
    pieces = [detokenizer.push(ids[a:b]) for a, b in pairwise([0, *cuts, len(ids)])]
    return "".join(pieces) + detokenizer.finish()


@kinds
@few
@given(data=st.data())
def test_joined_pieces_are_the_text(kind, data):
    ids, cuts = data.draw(answers(kind))
    text = told(kind.make(), ids, cuts)
    whole = kind.decode(ids)
    if kind.runs:
        assert text == kind.plain(ids)
    if BROKEN not in whole or not kind.runs:
        assert text == whole
    assert "".join(kind.make().split(ids)) == text


@few
@given(st.lists(st.integers(0, len(KINDS["byte pairs"].tokenizer) - 1), max_size=40))
def test_byte_pairs_are_bytes(ids):
    kind, letters = KINDS["byte pairs"], {letter: byte for byte, letter in LETTERS.items()}
    words = [kind.tokenizer.convert_ids_to_tokens(i) for i in ids if i >= len(SPECIAL)]
    data = bytes(letters[letter] for word in words for letter in word)
    assert "".join(kind.make().split(ids)) == data.decode(errors="replace")


@kinds
@few
@given(data=st.data())
def test_nothing_is_held_back_longer_than_a_character_takes(kind, data):
    ids, _ = data.draw(answers(kind))
    detokenizer, given_out, said = kind.make(), "", []
    for token in ids:
        given_out += detokenizer.push([token])
        said += [token] if token >= len(SPECIAL) else []
        # A character's other three bytes are three tokens at most.
        due = kind.plain(said[:-3])
        due = due[: max(0, len(due) - kind.lookahead)] if kind.lookahead else due.rstrip(BROKEN)
        assert given_out.startswith(due)


@kinds
@few
@given(data=st.data())
def test_a_push_costs_the_same_at_any_length(kind, data):
    ids, _ = data.draw(answers(kind))
    read = []

    def decode(ids):
        read.append(len(ids))
        return kind.decode(ids)

    detokenizer = Detokenizer(decode, lookahead=kind.lookahead)
    for token in ids * 3:
        read.clear()
        detokenizer.push([token])
        assert max(read, default=0) <= 2 * WINDOW
        assert len(read) <= 20


@pytest.mark.parametrize(
    ("name", "words", "pieces"),
    [
        # A stray byte is told once the next token, or enough of them, say that it is one.
        ("llama", ["a", "<0xFF>", "▁the", "b"], ["a", "", "\ufffd the", "b"]),
        ("llama", ["a", *["<0xFF>"] * 5], ["a", "", "", "", "\ufffd", "\ufffd" * 4]),
        ("byte pairs", ["a", "ÿ", "Ġthe"], ["a", "", "\ufffd the"]),
        ("byte pairs", ["a", *"ÿÿÿÿÿ"], ["a", "", "", "", "\ufffd", "\ufffd" * 4]),
        # It takes nothing with it, though the decoder would take the whole run.
        ("llama", ["<0xC3>", "<0xA9>", "<0xFF>", "<0x61>"], ["", "é", "", "\ufffda"]),
        ("llama", ["<0xC3>", "<0xA9>", "<0xF0>", "<0x9F>"], ["", "é", "", "\ufffd\ufffd"]),
        # An answer that is cut inside a character.
        ("byte pairs", ["a", "âĤ"], ["a", "\ufffd"]),
        ("byte pairs", ["að", "Łĺ"], ["a", "\ufffd"]),
        # A character in parts, with a token of no text between them.
        ("byte pairs", ["â", "<s>", "Ĥ", "¬"], ["", "", "", "€"]),
        ("llama", ["<0xE2>", "<0x82>", "</s>", "<0xAC>"], ["", "", "", "€"]),
        ("byte pairs", ["ð", "Ł", *["<s>"] * 5, "ĺ", "Ģ"], [*[""] * 8, "\U0001f600"]),
        ("gemma", ["<0xE2>", *["<s>"] * 5, "<0x82>", "<0xAC>"], [*[""] * 7, "€"]),
        # The character U+FFFD itself.
        ("llama", ["a", BROKEN, BROKEN, "b"], ["a", "", "", "\ufffd\ufffdb"]),
        ("byte pairs", ["ï¿½", "a"], ["", "\ufffda"]),
        # Spaces.
        ("llama", ["▁the", "▁a", "▁", "▁the"], ["the", " a", " ", " the"]),
        ("llama", ["▁", "▁the"], ["", " the"]),
        ("llama", ["<s>", "▁the", "<0x0A>", "▁a"], ["", "the", "\n", " a"]),
        ("gemma", ["▁the", "▁a"], [" the", " a"]),
        ("unigram", ["▁the", "▁", "▁▁", "a"], ["the", " ", "  ", "a"]),
        ("word pieces", ["the", "##s", "##t", "a"], ["the", "s", "t", " a"]),
        ("suffixed words", ["b", "a</w>", "the</w>"], ["b", "a", " the"]),
    ],
)
def test_pieces(name, words, pieces):
    assert KINDS[name].make().split(ids_of(KINDS[name].tokenizer, words)) == pieces


def test_the_mark_may_be_a_character_in_bytes():
    tokenizer = byte_fallback(strip=True, more=b"\xef\xbf\xbd")
    words = ["a", "<0xEF>", "<0xBF>", "<0xBD>", "<0xE2>", "<0x82>", "<0xAC>", "<0xEF>", "b"]
    pieces = Detokenizer(Kind(tokenizer).decode).split(ids_of(tokenizer, words))
    assert pieces == ["a", "", "", "\ufffd", "", "", "€", "", "\ufffdb"]


def test_a_cleaned_up_text_is_told_a_few_characters_late():
    kind = KINDS["word pieces, cleaned up"]
    ids = ids_of(kind.tokenizer, ("do", "n", "'", "t", "longer", "!", "longer"))
    assert kind.make().split(ids) == ["", "", "d", "", "on't l", "o", "nger! longer"]


# Stop strings


def ends(text: str, stop: list[str]) -> int | None:
    """Where the text is cut: read letter by letter, until it ends in one of the strings."""
    for size in range(1, len(text) + 1):
        found = [size - len(string) for string in stop if text[:size].endswith(string)]
        if found:
            return min(found)
    return None


STOPS = st.lists(st.text("a b\néEND'", min_size=1, max_size=3), max_size=3)


@kinds
@few
@given(data=st.data(), stop=STOPS)
def test_a_stop_string_ends_the_text_where_it_begins(kind, data, stop):
    ids, cuts = data.draw(answers(kind))
    pieces = kind.make().split(ids)
    whole = "".join(pieces)
    end = ends(whole, stop)
    detokenizer = kind.make(stop)
    assert told(detokenizer, ids, cuts) == whole[:end]
    assert detokenizer.stopped == (end is not None)
    needed = [n for n in range(len(ids) + 1) if ends("".join(pieces[:n]), stop) is not None]
    assert detokenizer.count == min([*needed, len(ids)])
    if detokenizer.stopped:
        assert detokenizer.push(ids) == detokenizer.finish() == ""


@kinds
@few
@given(data=st.data(), stop=STOPS)
def test_only_what_may_begin_a_stop_string_is_held_back(kind, data, stop):
    ids, _ = data.draw(answers(kind))
    plain, detokenizer, all_of_it, given_out = kind.make(), kind.make(stop), "", ""
    for token in ids:
        all_of_it += plain.push([token])
        given_out += detokenizer.push([token])
        if detokenizer.stopped:
            break
        held = all_of_it[len(given_out) :]
        assert all_of_it == given_out + held
        assert not held or any(string.startswith(held) for string in stop)


def test_the_first_stop_string_that_is_complete_counts():
    decode = KINDS["byte pairs"].decode
    ids = ids_of(KINDS["byte pairs"].tokenizer, ("a", "END", "Ġthe"))
    for stop, text, count in (
        (["END the", "D"], "aEN", 2),
        (["ND", "END"], "a", 2),
        (["ENDs", " t"], "aEND", 3),
        ("D", "aEN", 2),
        (["END thee"], "aEND the", 3),
    ):
        detokenizer = Detokenizer(decode, stop)
        assert detokenizer.push(ids) + detokenizer.finish() == text
        assert (detokenizer.count, detokenizer.stopped) == (count, text != "aEND the")


@pytest.mark.parametrize("stop", [[""], ["a", ""], "", [3], [b"a"]])
def test_stop_strings_that_are_none(stop):
    if stop == "":
        stop = ["a", None]
    with pytest.raises(ValueError, match="must be a string or a list of strings, none of them emp"):
        Detokenizer(KINDS["byte pairs"].decode, stop)


# By the processor


@few
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_pieces_join_to_the_text(text):
    tokenizer = tiny_tokenizer()
    tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    pieces = Detokenizer(lambda ids: str(tokenizer.decode(ids))).split(tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == text


def processor_of(tokenizer: PreTrainedTokenizerFast) -> Processor:
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    hf = tiny_processor("llava")
    config = tiny_config("llava")
    hf.tokenizer = tokenizer
    object.__setattr__(config, "image_token_id", tokenizer.convert_tokens_to_ids("<image>"))
    return Processor(config, hf)


def test_an_answer_is_what_a_stream_of_it_says():
    process = processor_of(byte_fallback(strip=True))
    words = ["<s>", "▁the", "<0xC3>", "<0xA9>", "<0xF0>", "<image>", "<0x0A>", "▁a", "<0xE2>"]
    ids = ids_of(process.tokenizer, words)
    stream = process.detokenizer()
    assert stream.push(ids) + stream.finish() == process.decode(ids) == "theé\ufffd\n a\ufffd"
    stopped = process.detokenizer(stop="\n")
    assert stopped.push(ids) == "theé\ufffd"
    assert (stopped.stopped, stopped.count) == (True, 7)
    special = process.detokenizer(special_tokens=True)
    assert special.split(ids[:2]) == ["<s>", " the"]


@pytest.mark.parametrize("make", [word_pieces, unigram])
@pytest.mark.parametrize("cleans", [False, True])
def test_a_clean_up_is_expected_where_there_is_one(make, cleans):
    process = processor_of(make(cleans))
    words = ["the", "a", "'", "s", "'", "t", "!", "▁'", "▁s", "▁ve", "do", "longer", "!"]
    ids = ids_of(process.tokenizer, [word for word in words if word in process.tokenizer.vocab])
    text = process.tokenizer.decode(ids, skip_special_tokens=True)
    assert process.decode(ids) == "".join(process.detokenizer().split(ids)) == text


def test_byte_pairs_are_not_cleaned_up():
    tokenizer = byte_pairs()
    tokenizer.clean_up_tokenization_spaces = True
    process = processor_of(tokenizer)
    assert process.detokenizer().push(ids_of(tokenizer, ["Ġthe"])) == " the"
