"""Training: packed questions are the questions alone; it learns, goes on, writes checkpoints."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import typer
from typer.testing import CliRunner

import vlcache_jax
from benchmarks.accuracy import loss, tasks, train
from benchmarks.accuracy.glyphs import CHARACTERS
from benchmarks.accuracy.loss import answer_logits
from benchmarks.accuracy.network import config_json
from benchmarks.accuracy.packing import pack, render
from benchmarks.accuracy.train import Recipe, Stage, Trainer, drawn_ahead
from vlcache_jax.models.llava.config import LlavaConfig
from vlcache_jax.results.report import count_parameters
from vlcache_jax.running.stages import Stages

STAGE = Stage(
    steps=40,
    lr=1e-2,
    last_lr=1e-3,
    tasks={"document": 1, "reading": 1},
    pictures=2,
    questions=4,
    level=0.0,
    jitter=0,
    glyph_weight=0.3,
)
RECIPE = Recipe(
    seed=0,
    dtype="float32",
    vision={
        "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2,
    },
    text={
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    },
    warmup_steps=5,
    stages=(STAGE,),
)  # fmt: skip


@pytest.fixture(scope="module")
def trainer():
    return Trainer(RECIPE)


def items_of(*variants):
    return [
        tasks.questions_of_one_picture(
            "document", seed, 1 if variant == "question first" else 3, variant=variant, level=0.0
        )
        for seed, variant in enumerate(variants)
    ]


def test_packed_questions_are_what_each_is_alone(trainer):
    groups = items_of("plain", "two pictures", "question first", "multi-turn")
    assert [len(group) for group in groups] == [3, 3, 1, 3]
    batch = pack(groups, trainer.processor)
    learned = trainer.state["learned"]["model"]

    config = trainer.learner.config

    @jax.jit
    def packed(learned, batch):
        model = trainer.learner.bind(learned, None)
        table = model.visual_rows(batch.inputs.tiles)
        return answer_logits(model, config, batch, table)[0]

    ours = np.asarray(packed(trainer.state["learned"], batch))
    alone = jax.jit(Stages(config).prompt_logits)
    for p, group in enumerate(groups):
        for q, item in enumerate(group):
            text = render(item) + item.answer + "</s>"
            inputs = trainer.processor(list(item.images), text, raw_prompt=True)
            expected = np.asarray(alone(learned, inputs))[0, : inputs.length[0]]
            answer = np.flatnonzero(batch.targets[p, q] >= 0)
            count = len(answer)
            assert batch.answers[p, q, :count].tolist() == answer.tolist()
            assert (batch.targets[p, q, batch.answers[p, q, count:]] < 0).all()
            np.testing.assert_allclose(ours[p, q, :count], expected[-count - 1 : -1], atol=2e-5)
            ids = inputs.tokens[0, : inputs.length[0]]
            assert batch.targets[p, q, answer].tolist() == ids[-len(answer) :].tolist()
            decoded = trainer.processor.decode(batch.targets[p, q, answer])
            assert decoded == item.answer


def test_items_that_share_no_prefix_are_no_group(trainer):
    items = tasks.questions_of_one_picture("document", 0, 2, variant="question first")
    with pytest.raises(ValueError, match="before its question"):
        pack([items], trainer.processor)


def test_glyphs_are_those_of_the_patches(trainer):
    (item,) = items_of("plain")[0][:1]
    batch = pack([[item]], trainer.processor)
    assert batch.glyphs.shape == (5, 64)
    assert (batch.glyphs[0] == -1).all()  # the whole picture, at half the size
    top_right = item.cells[0][:8, 8:]
    assert batch.glyphs[2].tolist() == top_right.reshape(-1).tolist()
    assert batch.glyphs.max() < len(CHARACTERS)


@pytest.mark.full
def test_it_learns_a_few_items_by_heart(trainer):
    fresh = Trainer(replace(RECIPE, stages=(replace(STAGE, steps=300),)))
    batch = pack(items_of("plain", "plain"), fresh.processor)
    before = float(fresh.advance(batch).loss)
    for _ in range(150):
        scores = fresh.advance(batch)
        if bool(jnp.all(scores.exact == scores.asked)):
            break
    assert int(scores.asked.sum()) == 6
    assert int(scores.exact.sum()) == 6
    assert float(scores.loss) < 0.1 * before


@pytest.mark.full
def test_a_run_that_was_cut_off_goes_on_as_if_it_were_not(tmp_path):
    whole, first = Trainer(RECIPE), Trainer(RECIPE)
    first._programs = whole._programs  # compiled once
    for step in range(3):
        whole.advance(whole.batch(step))
    for step in range(2):
        first.advance(first.batch(step))
    first.save(tmp_path)
    second = Trainer(RECIPE)
    second._programs = whole._programs
    assert second.restore(tmp_path)
    assert second.step == 2
    second.advance(second.batch(2))
    for one, other in zip(jax.tree.leaves(whole.state), jax.tree.leaves(second.state), strict=True):
        assert np.array_equal(one, other)
    # What it writes is a model like any other.
    vlm = vlcache_jax.load(tmp_path / "model", "float32")
    item = tasks.make_item("reading", 1, variant="plain", level=0.0)
    answer = vlm.generate(list(item.images), item.prompt, max_new_tokens=2)
    inputs = vlm.processor(list(item.images), item.prompt)
    raw = vlm.processor(list(item.images), render(item), raw_prompt=True)
    assert inputs.tokens.tolist() == raw.tokens.tolist()
    assert answer.visual_tokens > 0.8 * answer.prompt_tokens
    assert answer.prompt_tokens > 300


def test_a_run_begins_where_what_it_takes_has_ended(trainer):
    late = Trainer(RECIPE)
    late.begin(5)
    assert late.step == 5
    counts = optax.tree.get_all_with_path(late.state["optimizer"], "count")
    assert [int(count) for _, count in counts] == [5] * len(counts) != []
    assert jax.tree.map(jnp.shape, late.state) == jax.tree.map(jnp.shape, trainer.state)
    for step in (-1, RECIPE.steps):
        with pytest.raises(ValueError, match="the recipe has those from 0"):
            late.begin(step)


def test_a_part_is_taken_from_another_run(trainer, tmp_path):
    """What `--take` does; and a folder that has nothing to take is named."""
    other = Trainer(replace(RECIPE, seed=1))
    other.save(tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps(train.asdict(other.recipe)))
    fresh = Trainer(RECIPE)
    before = jax.tree.map(np.asarray, fresh.state["learned"])
    fresh.take("glyphs", tmp_path)
    assert np.array_equal(fresh.state["learned"]["glyphs"], other.state["learned"]["glyphs"])
    assert jax.tree.all(
        jax.tree.map(np.array_equal, fresh.state["learned"]["model"], before["model"])
    )
    with pytest.raises(ValueError, match="is no folder of a run"):
        fresh.take("glyphs", tmp_path / "none")
    with pytest.raises(ValueError, match="part 'eyes'"):
        fresh.take("eyes", tmp_path)
    wider = Trainer(replace(RECIPE, text=RECIPE.text | {"hidden_size": 32}))
    with pytest.raises(ValueError, match="has another shape"):
        wider.take("glyphs", tmp_path)


def test_batches_come_in_order_and_errors_come_through():
    def step_itself(step) -> Any:
        return step

    assert list(drawn_ahead(step_itself, 3, 9)) == [3, 4, 5, 6, 7, 8]

    def fail(step):
        raise ValueError(f"step {step}")

    with pytest.raises(ValueError, match="step 1"):
        list(drawn_ahead(fail, 1, 4))


def test_splits_are_other_pictures(trainer):
    one = trainer._draw(STAGE, 0, "train")[1]
    other = trainer._draw(STAGE, 0, "test")[1]
    assert not np.array_equal(one.inputs.tiles, other.inputs.tiles)
    assert np.array_equal(trainer.batch(0).inputs.tiles, one.inputs.tiles)
    right = trainer.held_out(1)
    assert set(right) == set(STAGE.tasks)
    assert all(0 <= share <= 1 for share in right.values())


def test_blank_patches_are_left_out_and_positions_stay(trainer):
    groups = items_of("plain", "plain")
    whole = pack(groups, trainer.processor)
    some = pack(groups, trainer.processor, blanks=0.0, rng=np.random.default_rng(0))
    assert np.array_equal(whole.begin, some.begin)
    assert some.positions.shape[1] < whole.positions.shape[1]
    for p, group in enumerate(groups):
        rows, cells = some.inputs.length[p], group[0].cells[0]
        positions, index = some.positions[p, :rows], some.inputs.visual_index[p, :rows]
        assert np.array_equal(whole.inputs.visual_index[p, positions], index)
        assert np.array_equal(whole.inputs.tokens[p, positions], some.inputs.tokens[p, :rows])
        shown = some.glyphs.reshape(-1)[index[index >= 0]]
        assert sorted(shown) == sorted(cells[cells >= 0])
        assert (index < 0).sum() == (whole.inputs.visual_index[p, : whole.begin[p]] < 0).sum()


def test_a_blank_counts_for_those_that_are_left_out():
    """Attention to one key that stands for three is that to three of them."""
    rng = np.random.default_rng(0)
    width, times = 8, 3
    q, k, v = (rng.standard_normal((1, 6, heads, width)).astype(np.float32) for heads in (4, 2, 2))
    sources = jnp.full((1, 1, 2), -1)

    def attend(rows, counts):
        one, two, three = (jnp.asarray(x[:, rows]) for x in (q, k, v))
        shares = jnp.log(jnp.asarray([counts]))
        return np.asarray(loss._attend(one, two, three, shares, sources)[0])

    few = attend([0, 1, 2, 3, 4, 5], [1.0, times, 1.0, 1.0])  # the last two are the segment's
    many = attend([0, 1, 1, 1, 2, 3, 4, 5], [1.0] * 6)
    np.testing.assert_allclose(few[:, 2:], many[:, 4:], rtol=1e-5, atol=1e-6)


def test_sources_are_the_patches_that_are_read(trainer):
    groups = items_of("plain", "two pictures", "multi-turn")
    for blanks in (1.0, 0.5):
        rng = np.random.default_rng(0)
        batch = pack(groups, trainer.processor, blanks=blanks, rng=rng)
        for p, group in enumerate(groups):
            for q, item in enumerate(group):
                at = np.flatnonzero(batch.sources[p, q] >= 0)
                patches = batch.inputs.visual_index[p, batch.sources[p, q, at]]
                said = trainer.processor.decode(batch.targets[p, q, at])
                shown = "".join(CHARACTERS[i] for i in batch.glyphs.reshape(-1)[patches])
                assert said == shown == item.answer


@pytest.mark.full
def test_guidance_leads_the_attention(trainer):
    guided = replace(STAGE, steps=30, guide_weight=1.0, tasks={"document": 1})
    fresh = Trainer(replace(RECIPE, stages=(guided,)))
    batch = pack(items_of("plain", "plain"), fresh.processor)
    before = float(fresh.advance(batch).guide_loss)
    for _ in range(29):
        scores = fresh.advance(batch)
    assert float(scores.guide_loss) < 0.5 * before


def app(*arguments):
    command = typer.Typer()
    command.command()(train.main)
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_the_command_trains_in_slices(tmp_path):
    recipe, out = tmp_path / "recipe.json", tmp_path / "run"
    short = replace(RECIPE, stages=(replace(STAGE, steps=2, pictures=1, questions=2),))
    recipe.write_text(json.dumps(train.asdict(short)))
    options = ("--out", out, "--held-out", 1)
    result = app(recipe, *options, "--minutes", 1e-6)
    assert result.exit_code == 0, result.output
    result = app(recipe, *options)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(set(line["held_out_exact"]) == set(STAGE.tasks) for line in lines)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(train.asdict(replace(short, seed=1))))
    result = app(other, *options)
    assert result.exit_code == 2
    assert "another recipe" in result.output


@pytest.mark.parametrize("text", ["{", "{}", '{"stages": [], "sed": 1}'])
def test_a_file_that_is_no_recipe_is_named(tmp_path, text):
    file = tmp_path / "recipe.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="is no recipe"):
        Recipe.read(file)


def test_the_committed_recipes_are_recipes():
    folder = train.Path(train.__file__).parent / "recipes"
    sizes = {}
    for name in ("cpu", "gpu"):  # the others are of the published decoder
        recipe = Recipe.read(folder / f"{name}.json")
        assert recipe.text["num_hidden_layers"] >= 8
        assert recipe.text["num_key_value_heads"] < recipe.text["num_attention_heads"]
        assert recipe.stage(0) == recipe.stages[0]
        assert recipe.stage(recipe.steps - 1) == recipe.stages[-1]
        shape = LlavaConfig.from_hf(config_json(recipe.vision, recipe.text, 978))
        sizes[name] = count_parameters(shape)["total"]
    shapes = set()
    for name in ("tower", "decoder", "together"):
        recipe = Recipe.read(folder / f"pages-{name}.json")
        assert recipe.rank > 0
        assert {stage.guide_weight for stage in recipe.stages} == {0.0}
        shapes.add((*recipe.vision.values(), recipe.rank))
    assert len(shapes) == 1  # what one has learned the other takes
    assert sizes["gpu"] > 10 * sizes["cpu"]
