"""Generation as pure functions: the stages, the end of an answer, the chunks."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import picture, tiny_config, tiny_processor
from vlcache_jax.models.families import init_params
from vlcache_jax.requests.processing import Processor
from vlcache_jax.running.generate import Generate
from vlcache_jax.running.sampling import Sampling
from vlcache_jax.running.stages import Stages

CONFIG = tiny_config("llava_next")
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def params():
    # Larger weights than a fresh model's: its answers would all be one token, again and again.
    return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, init_params(CONFIG, seed=1))


@pytest.fixture(scope="module")
def inputs():
    processor = Processor(CONFIG, tiny_processor("llava_next"))
    return processor(
        [[picture(60, 40)], None, [picture(9, 90), picture(50, 50)]],
        ["what?", "only text", "<image> or <image>?"],
    )


def run(params, inputs, config=CONFIG, **settings):
    output = jax.jit(Generate(config, **settings))(params, inputs, KEY)
    return [
        row[:n].tolist() for row, n in zip(np.asarray(output.tokens), output.lengths, strict=True)
    ]


def recompute(params, inputs, row, count, config=CONFIG):
    """Greedy tokens without any cache: the whole text is run anew for each one."""
    logits_of = jax.jit(Stages(config).prompt_logits)
    tokens, index = np.array(inputs.tokens), np.array(inputs.visual_index)
    length, answer = int(inputs.length[row]), []
    room = np.zeros((len(tokens), count), np.int32)
    tokens = np.concatenate([tokens, room], 1)
    index = np.concatenate([index, room - 1], 1)
    if inputs.positions is not None:
        positions = np.concatenate([inputs.positions, np.stack([room] * 3)], 2)
        for b, first in enumerate(inputs.next_position()):  # of the rows behind each prompt's end
            end = inputs.length[b]
            positions[:, b, end : end + count] = first + np.arange(count)
        inputs = replace(inputs, positions=positions)
    for _ in range(count):
        lengths = np.array(inputs.length)
        lengths[row] = length
        grown = replace(inputs, tokens=tokens, visual_index=index, length=lengths)
        token = int(jnp.argmax(logits_of(params, grown)[row, length - 1]))
        answer.append(token)
        tokens[row, length] = token
        length += 1
    return answer


def test_cached_decoding_equals_recomputation(params, inputs):
    answers = run(params, inputs, max_new_tokens=7, chunk=4)
    for row, answer in enumerate(answers):
        assert answer == recompute(params, inputs, row, 7)
    assert len({tuple(answer) for answer in answers}) == 3
    assert max(len(set(answer)) for answer in answers) > 2


def on_three_axes(inputs):
    """Positions as M-RoPE has them: visual tokens at one time, text behind the widest axis."""
    positions = np.zeros((3, *inputs.tokens.shape), np.int32)
    for b, length in enumerate(inputs.length):
        at = 0
        for t in range(length):
            row = inputs.visual_index[b, t]
            seen = np.array([0, row // 4 % 4, row % 4]) if row >= 0 else np.zeros(3, int)
            positions[:, b, t] = at + seen
            last = t + 1 < length and row >= 0 and inputs.visual_index[b, t + 1] < 0
            at += 4 if last else int(row < 0)
    return replace(inputs, positions=positions)


@pytest.mark.parametrize("trace", [False, True])
def test_positions_of_three_axes(params, inputs, trace):
    half = CONFIG.text.head_dim // 2
    rope = replace(CONFIG.text.rope, axes=tuple(i % 3 for i in range(half)))
    config = replace(CONFIG, text=replace(CONFIG.text, rope=rope))
    placed = on_three_axes(inputs)
    assert (placed.next_position() < placed.length)[[0, 2]].all()
    answers = run(params, placed, config, max_new_tokens=7, chunk=4, trace=trace)
    for row, answer in enumerate(answers):
        assert answer == recompute(params, placed, row, 7, config)
    # Text stands at the same place on all three, as if there were one.
    plain = run(params, inputs, max_new_tokens=7, chunk=4)
    assert answers[1] == plain[1]
    assert answers[0] != plain[0]


def test_the_stages_give_what_the_whole_gives(params, inputs):
    generate = Generate(CONFIG, max_new_tokens=12, chunk=4)
    stages, settings = generate.stages, generate.settings(3)
    prefilled, token = jax.jit(stages.prefill)(params, inputs, settings)
    pool, _ = jax.jit(stages.build_cache)(prefilled, inputs, settings)
    start = jax.jit(stages.start, static_argnums=3)
    state = start(token, inputs.length, settings, jnp.float32)
    columns = [np.asarray(state.token)[:, None]]
    decode = jax.jit(stages.decode_chunk, donate_argnums=2)
    for _ in range(generate.num_chunks):
        state, tokens = decode(params, pool, state)
        columns.append(np.asarray(tokens))
    staged = np.concatenate(columns, 1)[:, :12].tolist()
    assert staged == run(params, inputs, max_new_tokens=12, chunk=4)
    assert np.asarray(state.position).tolist() == [n + 12 for n in inputs.length]


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_the_chunk_does_not_change_the_answer(params, inputs, chunk):
    expected = run(params, inputs, max_new_tokens=12, chunk=4)
    assert run(params, inputs, max_new_tokens=12, chunk=chunk) == expected


def test_one_token_and_prefixes(params, inputs):
    long = run(params, inputs, max_new_tokens=12, chunk=4)
    for count in (1, 2):
        assert run(params, inputs, max_new_tokens=count) == [row[:count] for row in long]


def test_a_stop_token_ends_its_row_alone_and_is_left_out(params, inputs):
    long = run(params, inputs, max_new_tokens=12, chunk=4)
    for stop in {long[0][0], long[1][5], long[2][3]}:
        stopped = run(params, inputs, max_new_tokens=12, chunk=4, stop_ids=(stop, 263))
        for row, answer in enumerate(long):
            cut = answer[: answer.index(stop)] if stop in answer else answer
            assert stopped[row] == cut


def test_padding_is_never_read(params, inputs):
    garbage = np.where(
        np.arange(inputs.tokens.shape[1]) < inputs.length[:, None], inputs.tokens, 99
    )
    dirty = replace(inputs, tokens=garbage.astype(np.int32))
    assert run(params, dirty, max_new_tokens=6) == run(params, inputs, max_new_tokens=6)


def test_a_larger_bucket_gives_the_same_answer(params, inputs):
    more = ((0, 0), (0, 57))
    wider = replace(
        inputs,
        tokens=np.pad(inputs.tokens, more),
        visual_index=np.pad(inputs.visual_index, more, constant_values=-1),
    )
    assert run(params, wider, max_new_tokens=6) == run(params, inputs, max_new_tokens=6)


def test_the_full_cache_keeps_every_prompt_token(params, inputs):
    output = jax.jit(Generate(CONFIG, max_new_tokens=2))(params, inputs, KEY)
    assert np.asarray(output.kept).tolist() == [[n] * 2 for n in inputs.length]


def test_seeds_repeat_and_differ(params, inputs):
    generate = jax.jit(Generate(CONFIG, max_new_tokens=8, sampling=Sampling(temperature=2.0)))
    draws = [
        np.asarray(generate(params, inputs, jax.random.key(seed)).tokens).tolist()
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_decoding_copies_no_cache(params, inputs):
    """The pool is read in place, and the tail that goes in is the memory that comes out."""
    generate = Generate(CONFIG, max_new_tokens=33)
    stages = generate.stages
    pool, state, _ = jax.jit(stages.begin)(params, inputs, generate.settings(3))
    program = jax.jit(stages.decode_chunk, donate_argnums=2).lower(params, pool, state).compile()
    shape = f"f32[{','.join(map(str, pool.k.shape))}]"
    lines = [line for line in str(program.as_text()).splitlines() if shape in line]
    assert lines
    assert [line for line in lines if " copy(" in line] == []
    tail_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.tail))
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= tail_bytes


@given(tokens=st.integers(1, 3000), chunk=st.integers(1, 64))
def test_chunks_cover_the_answer_with_little_to_spare(tokens, chunk):
    generate = Generate(CONFIG, max_new_tokens=tokens, chunk=chunk)
    steps, stages = generate.num_chunks * generate.chunk_steps, generate.stages
    assert generate.chunk_steps <= chunk
    assert tokens - 1 <= steps < tokens - 1 + generate.chunk_steps
    assert max(1, steps) <= stages.new_rows < 2 * max(1, steps)
    assert stages.new_rows % stages.chunk_steps == 0
    again = replace(generate, max_new_tokens=1 + stages.new_rows, chunk=stages.chunk_steps)
    assert again.stages == stages


@pytest.mark.parametrize("setting", ["max_new_tokens", "chunk"])
@pytest.mark.parametrize("value", [0, -3])
def test_counts_below_one_are_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        Generate(CONFIG, **{setting: value})
