"""What the stages of generation hand on: behind the prompt, between decode steps, at the end."""

from dataclasses import dataclass
from typing import NamedTuple

import jax

from pallas_kernels.window_scores import WindowScores
from vlcache_jax.cache.method import Observation
from vlcache_jax.cache.state import Tails
from vlcache_jax.cache.trace import BatchTrace
from vlcache_jax.running.settings import Settings


class Buffers(NamedTuple):
    """Keys and values of all layers, for a bucket of T rows.

    Attributes:
        k: keys after RoPE, [B, K, >= L * T, H]; layer l at rows l * T.
        v: values, in the shape of the keys.
    """

    k: jax.Array
    v: jax.Array


class Memory(NamedTuple):
    """What the rows of a prompt that were run leave behind beside their keys and values.

    Attributes:
        length: how many they are, int32 [B].
        seen: the attention of windows that continue, of each `Look` that was asked for; its arrays
            are [B, L, ...].
        salience: largest activation of each token in front of each layer, float32 [B, L, T].
    """

    length: jax.Array
    seen: tuple[WindowScores, ...]
    salience: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefill:
    """What the prompt leaves behind.

    Attributes:
        k: keys of all layers after RoPE, [B, K, >= L * T, H]; layer l at rows l * T.
        v: values of all layers, [B, K, >= L * T, H].
        seen: what the cache method saw of the layers.
        logits: of the first token, float32 [B, V].
        attention: what the first decoded token attends to, float32 [B, L, K, T], where traced.
    """

    k: jax.Array
    v: jax.Array
    seen: Observation
    logits: jax.Array
    attention: jax.Array | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """What a decode step changes; the pool stands beside it and is only read.

    Attributes:
        tail: keys and values of the tokens decoded so far.
        token: the token to feed next, int32 [B].
        position: its position, int32 [B]: the true count of tokens before it, unless positions have
            three axes.
        step: tokens drawn so far, whether or not they are part of the answer, int32 [B].
        count: tokens of the answer so far, the stop token left out, int32 [B].
        done: the answer has ended, bool [B].
        settings: what is asked of each sequence.
    """

    tail: Tails
    token: jax.Array
    position: jax.Array
    step: jax.Array
    count: jax.Array
    done: jax.Array
    settings: Settings


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GenerateOutput:
    """The answers of a batch.

    Attributes:
        tokens: int32 [B, max_new_tokens]; what stands at or beyond `lengths` has no meaning.
        lengths: tokens of each answer, the stop token left out, int32 [B].
        kept: prompt tokens kept by each layer, int32 [B, L].
        kept_visual: visual tokens among them, the mean over the kv heads, float32 [B, L].
        counts: the kept tokens by their width: those of full width, then of each width of the
            quantizer, int32 [B, L, 1 + widths].
        trace: with `trace=True`, what was kept and why.
    """

    tokens: jax.Array
    lengths: jax.Array
    kept: jax.Array
    kept_visual: jax.Array
    counts: jax.Array
    trace: BatchTrace | None
