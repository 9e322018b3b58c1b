"""Prompts and images to model inputs, against the Hugging Face processor and by hand."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from tokenizers import normalizers, processors
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tests.tiny import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN_ID,
    IMAGES_FIRST_TEMPLATE,
    picture,
    tiny_config,
    tiny_processor,
)
from vlcache_jax.models.llava.anyres import NEWLINE, num_tiles, visual_rows
from vlcache_jax.requests.buckets import Buckets
from vlcache_jax.requests.processing import Processor

FAMILIES = ("llava", "llava_next")
PATCHES = 16


def make(
    family: str = "llava_next",
    buckets: Buckets | None = None,
    chat_template: str | None = CHAT_TEMPLATE,
    max_positions: int = 4096,
) -> Processor:
    hf = tiny_processor(family, chat_template=chat_template)
    return Processor(tiny_config(family, max_positions=max_positions), hf, buckets)


def prompt_of(inputs, row=0):
    """The ids of one prompt without padding."""
    return inputs.tokens[row, : inputs.length[row]]


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# The result, against Hugging Face


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "size", [(60, 60), (200, 50), (50, 200), (1, 1), (1, 90), (90, 1), (300, 280)]
)
def test_ids_and_pixels_are_hugging_faces(family, size):
    image, text = picture(*size), "user: <image>\nWhat is it? é"
    inputs = make(family)(image, text, raw_prompt=True)
    expected = tiny_processor(family)(images=image, text=text, return_tensors="np")
    np.testing.assert_array_equal(prompt_of(inputs), expected["input_ids"][0])
    pixels = expected["pixel_values"].reshape(-1, 3, 56, 56)
    tiles = num_tiles(size[::-1], tiny_config(family))
    np.testing.assert_array_equal(inputs.tiles[:tiles], pixels[:tiles])
    assert not inputs.tiles[tiles:].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_arrays_have_the_documented_types_and_padding(family):
    inputs = make(family)([picture(80, 40), None, picture(30, 90)], ["a", "bc", "def"])
    assert inputs.tokens.shape == inputs.visual_index.shape
    assert inputs.tokens.shape[0] == 3
    for name in ("tokens", "length", "visual_index"):
        assert getattr(inputs, name).dtype == np.int32
    assert inputs.tiles.dtype == np.float32
    assert inputs.tiles.shape == ({"llava": 2, "llava_next": 10}[family], 3, 56, 56)
    for row, length in enumerate(inputs.length):
        assert not inputs.tokens[row, length:].any()
        assert (inputs.visual_index[row, length:] == -1).all()
    is_image = inputs.tokens == IMAGE_TOKEN_ID
    np.testing.assert_array_equal(is_image, inputs.visual_index >= 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_visual_index_counts_tiles_through_the_whole_batch(family):
    config = tiny_config(family)
    sizes = [(80, 40), (30, 90), (200, 200)]  # (width, height)
    first, second, third = (picture(*size) for size in sizes)
    inputs = make(family)([[first, second], [], third], ["a<image>b<image>c", "text", "<image>z"])
    newline = len(inputs.tiles) * PATCHES
    expected, tile = [], 0
    for width, height in sizes:
        rows = visual_rows((height, width), config)
        expected.append(np.where(rows == NEWLINE, newline, rows + tile * PATCHES))
        tile += num_tiles((height, width), config)
    found = [row[row >= 0] for row in inputs.visual_index]
    np.testing.assert_array_equal(found[0], np.concatenate(expected[:2]))
    assert found[1].size == 0
    np.testing.assert_array_equal(found[2], expected[2])
    assert (max(row.max() for row in expected) == newline) == (family == "llava_next")


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_are_the_prompts_alone(family):
    process = make(family)
    images = [picture(80, 40, 1), None, [picture(30, 90, 2), picture(50, 50, 3)]]
    texts = ["a longer question than the others?", "b", "c"]
    batch = process(images, texts)
    tile = 0
    for row, (image, text) in enumerate(zip(images, texts, strict=True)):
        alone = process(image, text)
        np.testing.assert_array_equal(prompt_of(batch, row), prompt_of(alone))
        used = 1 + alone.visual_index[alone.visual_index < len(alone.tiles) * PATCHES].max() // 16
        np.testing.assert_array_equal(batch.tiles[tile : tile + used], alone.tiles[:used])
        tile += used


@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_of_several_images_stand_without_gaps(family):
    process, config = make(family), tiny_config(family)
    sizes = [(80, 40), (200, 200), (40, 150)]  # (width, height): 3, 5 and 4 tiles of NeXT
    images = [picture(*size, seed) for seed, size in enumerate(sizes)]
    counts = [num_tiles((height, width), config) for width, height in sizes]
    assert counts == ([1, 1, 1] if family == "llava" else [3, 5, 4])
    alone = [process(image, "a").tiles[:count] for image, count in zip(images, counts, strict=True)]
    together = process(images, "a").tiles
    np.testing.assert_array_equal(together[: sum(counts)], np.concatenate(alone))
    assert not together[sum(counts) :].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_has_no_tiles(family):
    inputs = make(family)(None, "only text")
    assert inputs.tiles.shape == (0, 3, 56, 56)
    assert (inputs.visual_index == -1).all()
    assert prompt_of(inputs).tolist() == prompt_of(make(family)([], ["only text"][0])).tolist()


def test_inputs_are_a_pytree_of_host_arrays():
    inputs = make()(picture(80, 40), "what?")
    leaves = jax.tree.leaves(inputs)
    assert len(leaves) == 4
    assert all(type(leaf) is np.ndarray for leaf in leaves)
    assert int(jax.jit(lambda x: x.tokens.sum())(inputs)) == inputs.tokens.sum()


def test_calls_leave_no_trace():
    hf = tiny_processor("llava_next")
    hf.patch_size = hf.vision_feature_select_strategy = None
    process = Processor(tiny_config("llava_next"), hf)
    before = process(picture(80, 40), "what?")
    kept = jax.tree.map(np.copy, before)
    process([picture(30, 90), None], ["other <image>", "text"])
    with pytest.raises(ValueError, match="empty"):
        process(None, "")
    same(process(picture(80, 40), "what?"), kept)
    same(before, kept)
    assert hf.patch_size is None
    assert hf.vision_feature_select_strategy is None


def test_decode_leaves_special_tokens_out():
    process = make()
    ids = process.tokenizer.encode("héllo, <image>world</s>")
    assert process.decode(ids) == "héllo, world"
    assert process.decode(np.array(ids, np.int32)) == "héllo, world"
    assert process.decode([]) == ""
    assert process.eos_token_id == 2


# Buckets


def test_shapes_are_padded_to_the_given_buckets():
    buckets = Buckets(prompt=(130, 300), tiles=(0, 3, 7))
    inputs = make(buckets=buckets)([picture(80, 40)] * 2, "<image><image>12345678", raw_prompt=True)
    assert (inputs.tokens.shape[1], len(inputs.tiles)) == (130, 7)


@pytest.mark.parametrize(("size", "groups"), [(None, 1), (1, 5), (2, 3), (3, 2), (9, 1)])
def test_groups_hold_the_batch_in_order_and_in_equal_shapes(size, groups):
    images = [picture(80, 40), None, [picture(30, 90), picture(9, 9)], None, picture(200, 200)]
    texts = ["a", "bcd", "e" * 40, "f", "g"]
    process = make()
    made = process.groups(images, texts, size)
    assert len(made) == groups
    assert len({(g.tokens.shape, g.tiles.shape) for g in made}) == 1
    found = [prompt_of(group, row) for group in made for row in range(len(group.length))]
    for row, (image, text) in enumerate(zip(images, texts, strict=True)):
        np.testing.assert_array_equal(found[row], prompt_of(process(image, text)))
    for repeated in found[5:]:
        np.testing.assert_array_equal(repeated, found[4])


def test_empty_groups_are_refused():
    with pytest.raises(ValueError, match="groups of 0"):
        make().groups(None, ["a"], 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hundred_pictures_make_few_shapes(family):
    process = make(family)
    rng = np.random.default_rng(5)
    shapes, rows, needed = set(), 0, 0
    for side in np.exp(rng.uniform(np.log(32), np.log(2000), (100, 2))).astype(int).tolist():
        inputs = process(Image.new("RGB", side), "x" * int(rng.integers(4, 60)))
        shapes.add((inputs.tokens.shape, inputs.tiles.shape))
        rows, needed = rows + inputs.tokens.size, needed + int(inputs.length[0])
    assert len(shapes) <= 8
    assert 1 - needed / rows <= 0.25


# Prompts


def rendered(process, inputs):
    """The prompt as text, with each run of visual tokens as one mark."""
    ids = prompt_of(inputs)
    keep = [i for i, t in enumerate(ids) if t != IMAGE_TOKEN_ID or ids[i - 1] != IMAGE_TOKEN_ID]
    return process.tokenizer.decode(ids[keep])


def test_chat_template_is_applied():
    process = make()
    image = picture(9, 9)
    with_marks = process([image, image], "one <image> two <image>?")
    assert rendered(process, with_marks) == "<s>user: one <image>\n two <image>\n?\nassistant:"
    without = process([image], "what?")
    assert rendered(process, without) == "<s>user: <image>\nwhat?\nassistant:"
    assert rendered(process, process(image, "")) == "<s>user: <image>\n\nassistant:"
    assert rendered(process, process(None, "hi")) == "<s>user: hi\nassistant:"


def test_a_template_may_move_images_but_not_drop_them():
    image = picture(9, 9)
    process = make("llava", chat_template=IMAGES_FIRST_TEMPLATE)
    inputs = process([image, image], "one <image> two <image>?")
    assert rendered(process, inputs) == "<s>USER: <image>\n<image>\none   two  ? ASSISTANT:"
    assert rendered(process, process(image, "")) == "<s>USER: <image>\nASSISTANT:"
    dropping = make("llava", chat_template="{{ messages[0]['content'][-1]['text'] }}")
    with pytest.raises(ValueError, match=r"wrote 0 <image> marks for 1 images.*--raw-prompt"):
        dropping(image, "what?")


def test_no_chat_template_names_the_remedy():
    process = make(chat_template=None)
    with pytest.raises(ValueError, match="--raw-prompt"):
        process(None, "hi")
    assert rendered(process, process(None, "hi", raw_prompt=True)) == "<s>hi"


@pytest.mark.parametrize("raw_prompt", [True, False])
def test_bos_stands_once(raw_prompt):
    process = make(chat_template="<s>{{ messages[0]['content'][0]['text'] }}")
    text = "<s>hi" if raw_prompt else "hi"
    inputs = process(None, text, raw_prompt=raw_prompt)
    assert rendered(process, inputs) == "<s>hi"


@pytest.mark.parametrize("raw_prompt", [True, False])
@pytest.mark.parametrize(("marks", "images"), [(2, 1), (1, 2), (1, 0)])
def test_marks_and_images_must_agree(raw_prompt, marks, images):
    text = "x".join(["<image>"] * marks)
    with pytest.raises(ValueError, match=f"{marks} <image> marks in the text but {images} images"):
        make()([picture(9, 9)] * images, text, raw_prompt=raw_prompt)


def test_a_raw_prompt_needs_a_mark_for_its_image():
    with pytest.raises(ValueError, match="0 <image> marks in the text but 1 images"):
        make()(picture(9, 9), "what?", raw_prompt=True)


@pytest.mark.parametrize("raw_prompt", [True, False])
@pytest.mark.parametrize("images", [None, []])
def test_an_empty_prompt_is_refused(raw_prompt, images):
    with pytest.raises(ValueError, match="empty"):
        make()(images, "", raw_prompt=raw_prompt)


def test_a_prompt_without_tokens_is_refused():
    hf = tiny_processor("llava")
    hf.tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    hf.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    with pytest.raises(ValueError, match="no tokens"):
        Processor(tiny_config("llava"), hf)(None, "  ", raw_prompt=True)


def test_prompt_length_is_checked_against_the_positions():
    image = picture(9, 9)
    text = "<image>what?"
    length = int(make("llava")(image, text, raw_prompt=True).length[0])
    exact = make("llava", max_positions=length)(image, text, raw_prompt=True)
    assert exact.tokens.shape == (1, length)
    with pytest.raises(
        ValueError, match=rf"{length} tokens \(16 of them visual\).* {length - 1} positions"
    ):
        make("llava", max_positions=length - 1)(image, text, raw_prompt=True)


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        (None, [], "non-empty list"),
        (None, None, "non-empty list"),
        (None, ["a", 5], "non-empty list"),
        (None, 5, "non-empty list"),
        ([None], ["a", "b"], "2 texts but 1 entries"),
        (np.zeros((2, 9, 3), np.uint8), ["a", "b"], "2 texts but 1 entries"),
        ([None, [None]], ["a", "b"], "None is not an image"),
        (5, "a", "5 is not an image"),
    ],
)
def test_bad_arguments(images, text, message):
    with pytest.raises(ValueError, match=message):
        make()(images, text)


# Images (how they are read: test_images.py)


def test_a_file_an_image_and_an_array_are_the_same_picture(tmp_path):
    image, path = picture(80, 40), tmp_path / "image.png"
    image.save(path)
    process = make()
    expected = process(image, "what?")
    for source in (path, str(path), np.asarray(image), np.asarray(image)[:, ::-1][:, ::-1]):
        same(process(source, "what?"), expected)
    hf = tiny_processor("llava_next")(images=str(path), text="<image>", return_tensors="np")
    np.testing.assert_array_equal(expected.tiles[:3], hf["pixel_values"][0][:3])


def test_an_image_too_thin_to_resize(monkeypatch):
    process = make("llava")
    with pytest.raises(ValueError, match=r"2 x 65000 pixels is too thin.*crop it"):
        process(Image.new("RGB", (2, 65000)), "what?")
    assert make("llava_next")(Image.new("RGB", (2, 65000)), "what?").length > 16
    padding = tiny_processor("llava")
    padding.image_processor = LlavaImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_pad=True
    )
    process = Processor(tiny_config("llava"), padding)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    assert process(Image.new("RGB", (20, 200)), "what?").tiles.shape == (1, 3, 56, 56)
    with pytest.raises(ValueError, match="would take 62500 pixels"):
        process(Image.new("RGB", (25, 250)), "what?")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert process(Image.new("RGB", (25, 250)), "what?").tiles.shape == (1, 3, 56, 56)


# Files


@pytest.fixture(params=FAMILIES)
def saved(request, tmp_path):
    """A family and a directory of its processor's files."""
    tiny_processor(request.param).save_pretrained(tmp_path)
    return request.param, tmp_path


def test_files_give_the_same_processor(saved):
    family, path = saved
    image = picture(80, 40)
    expected = make(family)(image, "what?")
    same(Processor.from_pretrained(path, tiny_config(family))(image, "what?"), expected)
    # The older layout: no patch size, the image processor and the template in their own files.
    data = json.loads((path / "processor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(json.dumps(data["image_processor"]))
    (path / "processor_config.json").unlink()
    template = (path / "chat_template.jinja").read_text()
    (path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (path / "chat_template.jinja").unlink()
    same(Processor.from_pretrained(str(path), tiny_config(family))(image, "what?"), expected)


def test_files_that_are_not_there(saved):
    family, path = saved
    config = tiny_config(family)
    with pytest.raises(FileNotFoundError, match="no model directory"):
        Processor.from_pretrained(path / "none", config)
    (path / "processor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no processor_config\.json or preproc"):
        Processor.from_pretrained(path, config)
    (path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        Processor.from_pretrained(path, config)


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}'])
def test_files_that_cannot_be_read(name, content, tmp_path):
    tiny_processor("llava_next").save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        Processor.from_pretrained(tmp_path, tiny_config("llava_next"))


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer_config.json"])
def test_remote_code_is_never_run(name, tmp_path):
    tiny_processor("llava").save_pretrained(tmp_path)
    data = json.loads((tmp_path / name).read_text())
    data["auto_map"] = {"AutoProcessor": "evil.Evil", "AutoTokenizer": [None, "evil.Evil"]}
    (tmp_path / name).write_text(json.dumps(data))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="remote code"):
        Processor.from_pretrained(tmp_path, tiny_config("llava"))
    assert not (tmp_path / "ran").exists()


# A processor of another model


def test_another_image_token():
    config = dataclasses.replace(tiny_config("llava"), image_token_id=200)
    with pytest.raises(ValueError, match="<image> is 4, but the model's image_token_id is 200"):
        Processor(config, tiny_processor("llava"))


def test_other_pinpoints():
    config = tiny_config("llava_next", pinpoints=((56, 112),))
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        Processor(config, tiny_processor("llava_next"))


@pytest.mark.parametrize(
    ("image_size", "message"),
    [(84, "made 36 image tokens.*the model has 16"), (60, r"\(3, 60, 60\).*image_size is 56")],
)
def test_other_tiles(image_size, message):
    process = Processor(tiny_config("llava"), tiny_processor("llava", image_size))
    with pytest.raises(ValueError, match=message):
        process(picture(80, 80), "what?")


def test_a_larger_vocabulary():
    config = tiny_config("llava")
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=60))
    with pytest.raises(ValueError, match="vocabulary has 60 entries"):
        Processor(config, tiny_processor("llava"))(None, "what?")
