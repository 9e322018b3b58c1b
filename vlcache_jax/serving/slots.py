"""Slots: a fixed batch, each row of which answers one request after the other.

    slot   pool [B, K, capacity, H]      tail L x [B, K, R, H]   state [B]
    0      rows of a request             its new tokens          running
    1      rows of one that has ended    . . .                   done: free
    2      rows of another request       its new tokens          running

A slot has the rows that its group's budget takes of the longest prompts. Where each layer's rows
lie in them is data, so requests of any method and any smaller budget stand side by side.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.cache.budget import Budget
from vlcache_jax.cache.method import AnyPool, CacheMethod
from vlcache_jax.errors import whole_number
from vlcache_jax.models.families import Params
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.running.parts import Runner
from vlcache_jax.running.programs import Programs
from vlcache_jax.running.sampling import Logprobs, Sampling
from vlcache_jax.running.settings import Settings
from vlcache_jax.running.stages import Stages
from vlcache_jax.running.state import DecodeState, Prefill
from vlcache_jax.serving.ticket import Ticket
from vlcache_jax.streaming import Request, on_host

Drawn = tuple[jax.Array, Logprobs | None]
"""Tokens of a chunk, int32 [B, steps], and how likely they were where that is asked."""


@dataclass(frozen=True)
class SlotGroup:
    """Slots that are alike, and decode together.

    Attributes:
        slots: how many.
        new_tokens: most tokens of an answer.
        budget: what a slot has room for: this share of a prompt of the engine's bucket, or so many
            tokens per layer. A shorter prompt may keep a larger share, or everything.

    Raises:
        ValueError: a value is out of range.
    """

    slots: int = 8
    new_tokens: int = 128
    budget: float | str = 0.1

    def __post_init__(self):
        whole_number(self.slots, "slots", 1)
        whole_number(self.new_tokens, "new_tokens", 1)
        _ = self.room

    @property
    def room(self) -> Budget:
        """The budget, read."""
        return Budget.parse(self.budget)

    def serves(self, cache: CacheMethod) -> bool:
        """Whether the pool may hold rows of a method: quantized, all and some are laid out apart,
        as other numbers of them have full width.
        """
        return cache.quantize is None or cache.limit.keeps_all == self.room.keeps_all

    def __str__(self) -> str:
        return f"a budget of {self.budget} and {self.new_tokens} new tokens"


class Load(NamedTuple):
    """What an engine is doing.

    Attributes:
        running: slots in use.
        slots: all of them.
        waiting: requests in the queue, and the one that is prefilled.
        queue: most requests in the queue.
    """

    running: int
    slots: int
    waiting: int
    queue: int


class Slots:
    """A group of slots on the device.

    Args:
        programs: what was compiled so far.
        group: what they are.
        stages: of any method, for answers of the group's length.
        rows: the prompts' bucket, T.
        dtype: type of the cache.
        stop_ids: places for the stop tokens of a request.

    Attributes:
        group: as given.
        tickets: whose each slot is, None where it is free.
    """

    def __init__(
        self,
        programs: Programs,
        group: SlotGroup,
        stages: Stages,
        rows: int,
        dtype: jnp.dtype,
        stop_ids: int,
    ):
        self.group, self._programs, self._rows, self._dtype = group, programs, rows, dtype
        self._stages = replace(stages, room=group.room, together=False)
        off = Settings.of(Budget(1.0), Sampling(), (), 0, requests=np.zeros(group.slots, np.int32))
        self._off = replace(off, stop_ids=np.full((group.slots, stop_ids), -1, np.int32))
        self.tickets: list[Ticket | None] = [None] * group.slots
        self.pool: AnyPool
        self.state: DecodeState

    def stages(self, method: CacheMethod) -> Stages:
        """The functions by which a request of a method comes into a slot."""
        return replace(self._stages, cache=method)

    def fits(self, request: Request) -> bool:
        """Whether a slot has room for what a request keeps and for its answer."""
        cache, room = request.generate.cache, self.group.room
        kept = cache.limit.layer_rows(int(request.groups[0].length[0]))
        enough = kept <= room.bucket(self._rows).layer_rows(self._rows)
        short = request.generate.max_new_tokens <= self.group.new_tokens
        return enough and short and self.group.serves(cache)

    @property
    def running(self) -> list[tuple[int, Ticket]]:
        """The slots in use."""
        return [(row, ticket) for row, ticket in enumerate(self.tickets) if ticket is not None]

    @property
    def lost(self) -> bool:
        """Whether arrays were given up to a program that has failed."""
        return any(leaf.is_deleted() for leaf in jax.tree.leaves((self.pool, self.state)))

    def held(self, row: int) -> tuple[AnyPool, int]:
        """What a slot holds, its small arrays on the host, and the bytes of its rows."""
        large = [leaf for leaf in jax.tree.leaves(self.pool) if leaf.ndim == 4]
        size = sum(leaf.nbytes for leaf in large) // self.group.slots
        return on_host(self.pool, slice(row, row + 1)), size

    def clear(self, dry: bool = False) -> None:
        """Make the arrays, or their shapes, with all slots free."""
        empty = partial(self._stages.empty_pool, self.group.slots, self._rows, self._dtype)
        self.pool = jax.eval_shape(empty) if dry else self._programs.zeros(empty)
        none = np.zeros(self.group.slots, np.int32)
        runner = Runner(self._programs, self._stages, dry)
        self.state = runner.do("start", self._rows, none, none, self._off, dtype=self._dtype)

    def admit(
        self,
        runner: Runner,
        row: int,
        inputs: ModelInputs,
        settings: Settings,
        prefilled: Prefill,
        token: jax.Array,
        kv_map: bool = False,
    ) -> jax.Array | None:
        """Write what a prompt leaves behind into a slot, in place.

        Args:
            runner: of the request's stages.
            row: the slot.
            inputs: the prompt, in the engine's bucket.
            settings: what is asked.
            prefilled: what the prompt left behind.
            token: first token of the answer, int32 [1].
            kv_map: whether it is told how much of the cache keeps each token.

        Returns:
            That, as of `Stages.kept_share`, where it is asked.
        """
        at = np.array([row], np.int32)
        inputs = inputs.without_tiles
        own = prefilled, inputs, settings
        kept = runner.do("kept_share", self._rows, *own) if kv_map else None
        args = self.pool, at, *own
        self.pool, _ = runner.do("build_into", self._rows, *args)
        position = np.asarray(inputs.next_position(), np.int32)
        args = self.state, at, token, position, settings
        self.state = runner.do("admit", self._rows, *args)
        return kept

    def read(self, drawn: Drawn) -> tuple[np.ndarray, np.ndarray, np.ndarray, Logprobs | None]:
        """On the host: tokens, how many each slot has in all, which have ended, and how likely the
        tokens were.
        """
        (tokens, told), count, done = jax.device_get((drawn, self.state.count, self.state.done))
        return tokens, count, done, told

    def decode(self, params: Params, told: int = 0, dry: bool = False) -> Drawn:
        """Run a chunk of decode steps.

        Args:
            params: parameters.
            told: how many of the likeliest tokens are told of, 0 for none.
            dry: make the program ready, and do not run it.
        """
        # Only the host knows of stop texts and of requests that were dropped.
        self.state = replace(self.state, done=np.array([each is None for each in self.tickets]))
        runner = Runner(self._programs, self._stages, dry)
        args = params, self.pool, self.state
        if told:
            own = runner.do("decode_chunk_told", self._rows, *args, most=told)
            self.state, tokens, logprobs = own
            return tokens, logprobs
        self.state, tokens = runner.do("decode_chunk", self._rows, *args)
        return tokens, None
