"""A LLaVA around a decoder that is given: factors applied are factors merged, and it learns."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vlcache_jax
from benchmarks.accuracy import train
from benchmarks.accuracy.loss import answer_logits
from benchmarks.accuracy.packing import pack, render
from benchmarks.accuracy.pages import make_page_item, questions_of_one_page
from benchmarks.accuracy.pages.learner import PageLearner, changed_product
from benchmarks.accuracy.train import Recipe, Stage, Trainer
from convert.program import convert
from vlcache_jax.running.stages import Stages

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
EASY = {"level": 0.0, "shape": "half", "variant": "plain"}


@pytest.fixture(scope="module")
def learner(published):
    return PageLearner(VISION, 4, jnp.dtype("float32"), published)


@pytest.fixture(scope="module")
def learned(learner):
    """Something that was learned: without it the factors change nothing."""
    leaves, tree = jax.tree.flatten(learner.initial(0))
    rng = np.random.default_rng(0)
    moved = [x + 0.1 * rng.standard_normal(x.shape, np.float32) for x in leaves]
    return tree.unflatten([jnp.asarray(x) for x in moved])


def test_at_first_the_decoder_is_as_it_was_given(learner, published, tmp_path):
    learner.export(tmp_path / "model", learner.initial(0))
    params = vlcache_jax.load(tmp_path / "model", "float32").params
    given = vlcache_jax.load(published.file(), "float32").params
    for name in ("embed", "layers", "head"):
        ours, theirs = jax.tree.leaves(params[name]), jax.tree.leaves(given[name])
        assert all(map(np.array_equal, ours, theirs))
        assert len(ours) == len(theirs)


def test_what_is_exported_is_read_again(learner, learned, published, tmp_path):
    learner.export(tmp_path / "model", learned, "float32")
    for ours, theirs in zip(
        jax.tree.leaves(learned), jax.tree.leaves(learner.read(tmp_path / "model")), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match=r"no learned\.safetensors"):
        learner.read(tmp_path)
    with pytest.raises(ValueError, match=r"factors\.down\.down"):
        PageLearner(VISION, 8, jnp.dtype("float32"), published).read(tmp_path / "model")


def test_factors_applied_are_factors_merged(learner, learned, tmp_path):
    learner.export(tmp_path / "model", learned, "float32")
    params = vlcache_jax.load(tmp_path / "model").params
    group = questions_of_one_page({"look up": 1, "present": 1}, 1, 3, **EASY)
    options = {"dialogue": learner.dialogue, "round_to": learner.round_to}
    batch = pack([group], learner.processor, **options)

    @jax.jit
    def packed(learned, fixed, batch):
        model = learner.bind(learned, fixed)
        table = model.visual_rows(batch.inputs.tiles)
        return answer_logits(model, learner.config, batch, table)[0]

    ours = np.asarray(packed(learned, learner.fixed, batch))
    alone = jax.jit(Stages(learner.config).prompt_logits)
    for q, item in enumerate(group):
        text = render(item, learner.dialogue) + item.answer + learner.dialogue.end
        inputs = learner.processor(list(item.images), text, raw_prompt=True)
        expected = np.asarray(alone(params, inputs))[0, : inputs.length[0]]
        count = int((batch.targets[0, q] >= 0).sum())
        got, wanted = ours[0, q, :count], expected[-count - 1 : -1]
        np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())


def test_the_dialogue_is_the_chat_template(learner):
    for variant in ("plain", "two pictures"):
        item = make_page_item("look up", 2, **(EASY | {"variant": variant}))
        prompt = item.prompt.replace("<image>", "")
        chat = learner.processor(list(item.images), prompt)
        raw = learner.processor(list(item.images), render(item, learner.dialogue), raw_prompt=True)
        assert np.array_equal(chat.tokens, raw.tokens)


def test_an_easy_page_is_short_without_its_blanks(learner):
    group = questions_of_one_page({"look up": 1.0}, 1, 2, **EASY)
    batch = pack(
        [group], learner.processor, blanks=0.0, rng=np.random.default_rng(0),
        dialogue=learner.dialogue, round_to=16,
    )  # fmt: skip
    drawn = (group[0].cells[0] >= 0).sum()
    text = (batch.inputs.visual_index[0, : batch.inputs.length[0]] < 0).sum()
    assert batch.inputs.length[0] == drawn + text
    assert batch.begin[0] > 1752 > 4 * batch.inputs.length[0]
    assert batch.tokens.shape[-1] % 16 == batch.answers.shape[-1] % 16 == 0


def test_the_merged_checkpoint_is_read_by_transformers(learner, learned, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import LlavaNextForConditionalGeneration

    learner.export(tmp_path / "learned", learned)
    convert(tmp_path / "learned", tmp_path / "model", to_hf=True)
    theirs = LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    ).eval()
    vlm = vlcache_jax.load(tmp_path / "model", "float32")
    item = make_page_item("look up", 5, **EASY)
    picture, text = Image.fromarray(item.images[0]), render(item, learner.dialogue)
    encoded = learner.files(images=[picture], text=text, return_tensors="pt")
    with torch.no_grad():
        wanted = theirs(**encoded).logits[0].numpy()
    inputs = vlm.processor(list(item.images), text, raw_prompt=True)
    ours = np.asarray(jax.jit(Stages(vlm.config).prompt_logits)(vlm.params, inputs))[0]
    ours = ours[: inputs.length[0]]
    assert ours.shape == wanted.shape
    assert np.abs(ours - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.full
@pytest.mark.parametrize("sight", [False, True])
def test_it_learns_a_few_items_by_heart(published, monkeypatch, sight):
    monkeypatch.setattr(train, "PageLearner", partial(PageLearner, published=published))
    stage = Stage(
        steps=400, lr=1e-2, last_lr=1e-3, tasks={"present": 1.0}, pictures=1, questions=8,
        level=0.0, jitter=1, variants={"plain": 1}, sight=sight, answers=not sight, blanks=0.0,
        glyph_weight=float(sight),
    )  # fmt: skip
    recipe = Recipe(
        seed=0, dtype="float32", vision=VISION, text={}, warmup_steps=5, stages=(stage,),
        weight_decay=0.0, rank=16,
    )  # fmt: skip
    trainer = Trainer(recipe)
    batch = trainer.batch(0)
    before = trainer.advance(batch)
    for _ in range(300):
        scores = trainer.advance(batch)
        if scores.glyph_accuracy > 0.98 if sight else jnp.all(scores.exact == scores.asked):
            break
    if sight:
        assert float(scores.glyph_accuracy) > 0.98
        assert float(scores.glyph_loss) < 0.2 * float(before.glyph_loss)
    else:
        assert int(scores.exact.sum()) == int(scores.asked.sum()) == 8
        assert float(scores.loss) < 0.3 * float(before.loss)


@pytest.mark.full
def test_what_is_frozen_stays(published, monkeypatch):
    monkeypatch.setattr(train, "PageLearner", partial(PageLearner, published=published))
    stage = Stage(
        steps=4, lr=1e-2, last_lr=1e-3, tasks={"present": 1.0}, pictures=1, questions=2,
        level=0.0, jitter=1, variants={"plain": 1}, blanks=0.0, glyph_weight=1.0, frozen="eyes",
    )  # fmt: skip
    recipe = Recipe(
        seed=0, dtype="float32", vision=VISION, text={}, warmup_steps=1, stages=(stage,), rank=16
    )
    trainer = Trainer(recipe)
    before = jax.device_get(trainer.state["learned"])
    for step in range(2):
        trainer.advance(trainer.batch(step))
    after = trainer.state["learned"]
    same = [jax.tree.map(np.array_equal, before[part], after[part]) for part in ("eyes", "factors")]
    assert all(jax.tree.leaves(same[0]))
    assert not any(jax.tree.leaves(same[1])[-4:])


def test_the_gradients_of_achanged_product():
    rng = np.random.default_rng(0)
    shapes = ((2, 5, 6), (6, 8), (6, 3), (3, 8))
    inputs = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]

    def of(product, x, kernel, down, up):
        return jnp.sum(jnp.sin(product(x, kernel, down, up)))

    def plain(x, kernel, down, up):
        return x @ kernel + x @ down @ up

    product = partial(changed_product, jnp.dtype("float32"))
    ours = jax.grad(partial(of, product), argnums=(0, 2, 3))(*inputs)
    theirs = jax.grad(partial(of, plain), argnums=(0, 2, 3))(*inputs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
