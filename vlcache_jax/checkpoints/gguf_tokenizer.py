"""The tokenizer of a GGUF file, from its metadata: byte-level BPE, or BPE as sentencepiece has it.

The keys are those of llama.cpp (`tokenizer.ggml.*`), where `model` says which kind it is and `pre`
how a text is split in front of byte-level BPE (its src/llama-vocab.cpp has the expressions).
"""

from typing import TYPE_CHECKING, Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
)

from vlcache_jax.errors import reason, short
from vlcache_jax.fields import FLAG, TEXT, Kind, one_of, whole

if TYPE_CHECKING:
    from vlcache_jax.checkpoints.gguf import GgufFile

_KEY = "tokenizer.ggml."
_STRINGS = Kind("a list of strings", lambda x: isinstance(x, list) and _all(x, str))
_NUMBERS = Kind("a list of numbers", lambda x: isinstance(x, list) and _all(x, int, float))
_CONTROL, _USER_DEFINED = 3, 4
_SPECIAL = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
}
_SPACE = "\u2581"  # what sentencepiece writes for a space

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(expression: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    return pre_tokenizers.Sequence([split, _bytes(use_regex=False)])


def _bytes(*, use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


# How a text is split by `pre`: GPT-2's rule, alone or with each digit by itself, and later ones.
# The later ones take a piece that is in the vocabulary as it is, merges or not.
_PLAIN = {
    "gpt-2": _bytes,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _bytes()]),
}
_WHOLE = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), lambda: _split(_LLAMA3)),
    "tekken": lambda: _split(_TEKKEN),
}


def read_tokenizer(file: "GgufFile") -> Any:
    """The tokenizer that a file describes, a `transformers.PreTrainedTokenizerFast`.

    Raises:
        ValueError: a key is missing or damaged.
        NotImplementedError: the tokenizer is of another kind.
    """
    from transformers import PreTrainedTokenizerFast  # a second or more

    tokens = file.field(f"{_KEY}tokens", _STRINGS)
    vocab = {token: number for number, token in enumerate(tokens)}
    types = file.field(f"{_KEY}token_type", _NUMBERS, [1] * len(tokens))
    if len(types) != len(tokens) or len(vocab) != len(tokens):
        raise ValueError(
            f"{short(file.path)}: {len(tokens)} tokens, {len(vocab)} of them different, have "
            f"{len(types)} types: download it again"
        )
    special = {
        f"{name}_token": tokens[number]
        for name, key in _SPECIAL.items()
        if (number := file.field(f"{_KEY}{key}", whole(0, len(tokens) - 1), None)) is not None
    }
    kind = file.field(f"{_KEY}model", one_of("gpt2", "llama"))
    make = _byte_level if kind == "gpt2" else _sentencepiece
    try:
        tokenizer, adds_bos = make(file, vocab, special)
    except (ValueError, NotImplementedError):
        raise
    except Exception as error:  # the package below raises plain Exception
        raise ValueError(
            f"{short(file.path)}: its tokenizer is damaged ({reason(error)}): download it again"
        ) from None
    tokenizer.add_tokens(
        [
            AddedToken(token, special=type_ == _CONTROL, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ in (_CONTROL, _USER_DEFINED)
        ]
    )
    bos, eos = (special.get(f"{name}_token") for name in ("bos", "eos"))
    first = [bos] if bos and file.field(f"{_KEY}add_bos_token", FLAG, adds_bos) else []
    last = [eos] if eos and file.field(f"{_KEY}add_eos_token", FLAG, False) else []
    if first or last:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            special_tokens=[(token, vocab[token]) for token in first + last],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=file.field("tokenizer.chat_template", TEXT, None),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_level(
    file: "GgufFile", vocab: dict[str, int], special: dict[str, str]
) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, and whether it begins a text unless the file says otherwise."""
    pre = file.field(f"{_KEY}pre", one_of(*_PLAIN, *_WHOLE))
    merges = [tuple(merge.split(" ", 1)) for merge in file.field(f"{_KEY}merges", _STRINGS)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE))
    tokenizer.pre_tokenizer = (_PLAIN | _WHOLE)[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre in _WHOLE and pre != "tekken"


def _sentencepiece(
    file: "GgufFile", vocab: dict[str, int], special: dict[str, str]
) -> tuple[Tokenizer, bool]:
    """BPE whose merges are the pairs that make a token, the token of the best score first."""
    scores = file.field(f"{_KEY}scores", _NUMBERS)
    if len(scores) != len(vocab):
        raise ValueError(
            f"{short(file.path)}: {len(vocab)} tokens have {len(scores)} scores: download it again"
        )
    halves = (
        (-scores[number], token[:at], token[at:])
        for token, number in vocab.items()
        for at in range(1, len(token))
    )
    found = [half for half in halves if half[1] in vocab and half[2] in vocab]
    found.sort(key=lambda half: (half[0], vocab[half[1]], vocab[half[2]]))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for _, left, right in found],
            unk_token=special.get("unk_token"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = file.field(f"{_KEY}add_space_prefix", FLAG, True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=_SPACE, prepend_scheme="first" if prefix else "never", split=False
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *[decoders.Strip(" ", 1, 0)] * prefix])
    return tokenizer, True


def _all(values: list[Any], *kinds: type) -> bool:
    return all(type(value) in kinds for value in values)
