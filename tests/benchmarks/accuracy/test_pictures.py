"""The drawn pictures: glyphs where they belong and unlike each other, fast."""

import time

import numpy as np
import pytest

from benchmarks.accuracy.glyphs import CELL, atlas
from benchmarks.accuracy.tasks import TASKS, make_item

all_tasks = pytest.mark.parametrize("task", TASKS)


@all_tasks
@pytest.mark.parametrize("jitter", [0, 2, 4])
def test_glyphs_stay_near_their_cells(task, jitter):
    strays = 0
    for seed in range(12):
        item = make_item(task, seed, jitter=jitter)
        for image, table in zip(item.images, item.cells, strict=True):
            paper = np.median(image, axis=(0, 1), keepdims=True)
            inked = np.any(np.abs(image - paper) > 62, axis=2)  # noise has deviations of 9 at most
            near = np.zeros_like(inked)
            for row, col in zip(*np.nonzero(table >= 0), strict=True):
                y, x = row * CELL, col * CELL
                reach = (slice(max(0, y - jitter), y + CELL + jitter),
                         slice(max(0, x - jitter), x + CELL + jitter))  # fmt: skip
                assert inked[reach].sum() >= 3
                near[reach] = True
            assert not (inked & ~near).any()
            cells = (table >= 0).repeat(CELL, 0).repeat(CELL, 1)
            strays += int((inked & ~cells).sum())
    assert (strays > 0) == (jitter > 0)


def test_glyphs_differ_and_leave_room():
    masks = atlas().astype(int)
    assert masks.max((2, 3)).min() > 180
    flat = masks.reshape(*masks.shape[:2], -1)
    apart = np.abs(flat[:, :, None] - flat[:, None]).sum(-1) / 255  # in pixels
    apart += 1000 * np.eye(apart.shape[1])
    assert apart.min() > 5


def test_pictures_cannot_be_changed_by_one_of_their_users():
    item = make_item("reading", 0)
    with pytest.raises(ValueError, match="read-only"):
        item.images[0][0, 0] = 0
    with pytest.raises(ValueError, match="read-only"):
        item.cells[0][0, 0] = 0


def test_drawing_is_fast_enough_to_train_from():
    make_item("document", 0)  # makes the atlas and the noise
    start, pictures = time.process_time(), 0
    for seed in range(60):
        pictures += sum(len(make_item(task, seed).images) for task in TASKS)
    assert pictures / (time.process_time() - start) > 150
