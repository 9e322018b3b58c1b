"""Conversations as prompts: where pictures go, what templates make of them, what is malformed."""

import copy

import jax
import numpy as np
import pytest

from tests.tiny import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN_ID,
    IMAGES_FIRST_TEMPLATE,
    picture,
    tiny_config,
    tiny_processor,
)
from vlcache_jax.requests.processing import Processor

MARK = {"type": "image"}

# As Mistral's: turns that alternate, and no system role.
STRICT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}"
    "{% endif %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def say(role, *content):
    return {"role": role, "content": content[0] if len(content) == 1 else list(content)}


def text(words):
    return {"type": "text", "text": words}


def make(chat_template=CHAT_TEMPLATE, family="llava"):
    return Processor(tiny_config(family), tiny_processor(family, chat_template=chat_template))


def rendered(process, images, messages):
    """The prompt as text, with each run of visual tokens as one mark."""
    inputs = process(images, messages)
    ids = inputs.tokens[0, : inputs.length[0]]
    keep = [i for i, t in enumerate(ids) if t != IMAGE_TOKEN_ID or ids[i - 1] != IMAGE_TOKEN_ID]
    return process.tokenizer.decode(ids[keep])


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("words", ["what?", "one <image> two <image>?", "<image><image>", ""])
def test_a_message_of_the_user_is_the_prompt_that_it_says(family, words):
    process, images = make(family=family), [picture(80, 40), picture(30, 90)]
    for messages in ([say("user", words)], ({"content": [text(words)], "role": "user"},)):
        jax.tree.map(
            np.testing.assert_array_equal, process(images, messages), process(images, words)
        )


def test_turns_and_a_system_prompt_go_through_the_template():
    messages = [
        say("system", "Be brief."),
        say("user", MARK, text("What is it?")),
        say("assistant", "A cat."),
        say("user", text("And "), text("here?"), MARK),
    ]
    before = copy.deepcopy(messages)
    images = [picture(9, 9), picture(9, 9)]
    assert rendered(make(), images, messages) == (
        "<s>system: Be brief.\nuser: <image>\nWhat is it?\nassistant: A cat.\n"
        "user: And here?<image>\n\nassistant:"
    )
    assert messages == before
    assert rendered(make(IMAGES_FIRST_TEMPLATE), images, messages) == (
        "<s>SYSTEM: Be brief. USER: <image>\nWhat is it? ASSISTANT: A cat. "
        "USER: <image>\nAnd  here? ASSISTANT:"
    )


@pytest.mark.parametrize(
    ("second", "third", "expected"),
    [
        ("b", "d", "user: <image>\n<image>\nb\nassistant: c\nuser: d\n"),  # of the first user
        ("b<image>", "<image>d", "user: b<image>\n\nassistant: c\nuser: <image>\nd\n"),
        ("b", [MARK, text("d<image>")], "user: b\nassistant: c\nuser: <image>\nd<image>\n\n"),
        ([MARK, MARK], [], "user: <image>\n<image>\n\nassistant: c\nuser: \n"),
    ],
)
def test_places_of_pictures(second, third, expected):
    messages = [say("system", "a"), say("user", second), say("assistant", "c"), say("user", third)]
    found = rendered(make(), [picture(9, 9)] * 2, messages)
    assert found == f"<s>system: a\n{expected}assistant:"


def test_a_batch_may_hold_conversations_and_strings():
    process, image = make(), picture(80, 40)
    turns = [say("user", "a"), say("assistant", "b"), say("user", "c")]
    batch = process([None, image, [image]], [turns, "what?", [say("user", MARK, text("d"))]])
    alone = [
        process(None, turns),
        process(image, "what?"),
        process(image, "<image>d"),
    ]
    for row, inputs in enumerate(alone):
        length = inputs.length[0]
        assert batch.length[row] == length
        np.testing.assert_array_equal(batch.tokens[row, :length], inputs.tokens[0, :length])
    assert len(process.groups([None, image], [turns, "what?"], size=1)) == 2


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user"}], r"messages\[0\] has the keys \['role'\]: give it a role and a cont"),
        ([{"content": "a"}], r"messages\[0\] has the keys \['content'\]"),
        ([say("user", "a") | {"name": "b"}], r"the keys \['role', 'content', 'name'\]"),
        ([say("user", "a"), say("tool", "b")], r"messages\[1\] has the role 'tool': choose one of"),
        ([say(["user"], "a")], r"has the role \['user'\]"),
        ([say("user", 5)], r"messages\[0\] has the content 5: give a string or a list"),
        ([say("user", None)], "has the content None"),
        ([say("user", ["a"])], r"messages\[0\] has the part 'a': give {\"type\": \"text\""),
        ([say("user", [{"type": "text"}])], "has the part"),
        ([say("user", [{"type": "text", "text": 5}])], "has the part"),
        ([say("user", [MARK | {"url": "x" * 9000}])], "the pictures themselves as images"),
        ([say("user", [{"type": "image_url", "image_url": {"url": "x"}}])], "has the part"),
        ([say("user", "")], "the prompt is empty"),
        ([say("user", "a<image>")], "1 <image> marks in the messages but 0 images: give one mark"),
        ([say("user", MARK, MARK, text("a"))], "2 <image> marks in the messages but 0 images"),
        ([say("user", "a"), "b"], "non-empty list"),
        ([[]], "non-empty list"),
        ([[say("user", "a")], say("user", "a")], "non-empty list"),
    ],
)
def test_malformed_messages_are_refused_in_one_line(messages, message):
    with pytest.raises(ValueError, match=message) as error:
        make()(None, messages)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_pictures_need_a_user():
    with pytest.raises(ValueError, match="no message is the user's"):
        make()(picture(9, 9), [say("system", "a")])
    with pytest.raises(ValueError, match=r"1 <image> marks in the messages but 2 images.*come fi"):
        make()([picture(9, 9)] * 2, [say("user", MARK, text("a"))])


def test_a_raw_prompt_is_no_conversation():
    with pytest.raises(ValueError, match="raw_prompt takes a string, not messages"):
        make()(None, [say("user", "a")], raw_prompt=True)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (STRICT_TEMPLATE, [say("system", "a"), say("user", "b")], r"\(Conversation roles must alt"),
        (STRICT_TEMPLATE, [say("user", "a"), say("user", "b")], r"\(Conversation roles must alter"),
        ("{{ messages[1].content.x.y }}", [say("user", "a")], "refuses the messages"),
        ("{{ messages[0].content[0].text + messages[0].content }}", [say("user", "a")], "refuses"),
        ("{% for %}", [say("user", "a")], "refuses the messages"),
        (None, [say("user", "a")], "no chat template"),
    ],
)
def test_a_template_that_does_not_take_them(template, messages, message):
    with pytest.raises(ValueError, match=rf"(?s){message}.*--raw-prompt") as error:
        make(template)(None, messages)
    assert "\n" not in str(error.value)


def test_a_strict_template_takes_what_it_is_for():
    turns = [say("user", "a"), say("assistant", "b"), say("user", "c<image>")]
    assert rendered(make(STRICT_TEMPLATE), picture(9, 9), turns) == "<s>abc<image>"


STRINGS = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
SYSTEM_AS_STRING = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}|"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}|{% endfor %}"
).replace("{% endfor %}|{% endfor %}", "{% endfor %}|{% endif %}{% endfor %}")


@pytest.mark.parametrize(
    ("template", "messages", "text"),
    [
        (STRINGS, "what?", "<s>user: what?\nassistant:"),
        (STRINGS, [say("system", "be brief"), say("user", "a")],
         "<s>system: be brief\nuser: a\nassistant:"),
        ("{{ messages[0]['content'] | trim }}", [say("user", " a ")], "<s>a"),
        ("{% if messages[0].content is string %}{{ messages[0].content }}{% endif %}", "a", "<s>a"),
        (SYSTEM_AS_STRING, [say("system", "s"), say("user", "u")], "<s>s|u|"),
    ],
)  # fmt: skip
def test_templates_that_take_strings_work_for_each_role(template, messages, text):
    assert rendered(make(template), None, messages) == text


def test_a_picture_in_a_string_is_a_mark_and_a_line_break():
    image = picture(9, 9)
    assert rendered(make(STRINGS), image, "what?") == "<s>user: <image>\nwhat?\nassistant:"
    assert rendered(make(STRINGS), image, "a<image>b") == "<s>user: a<image>\nb\nassistant:"


@pytest.mark.parametrize("text", ["<image>\nwhat?", "what?\n<image>", "<image>what?"])
def test_the_line_break_of_llavas_own_data_is_not_doubled(text):
    for template in (IMAGES_FIRST_TEMPLATE, STRINGS):
        whole = rendered(make(template), picture(9, 9), text)
        assert "\n\n" not in whole
        assert "<image>\n" in whole
        assert "what?" in whole
    two = rendered(make(IMAGES_FIRST_TEMPLATE), [picture(9, 9)] * 2, "<image>\n<image>\nwhat?")
    assert two.startswith("<s>USER: <image>\n<image>\nwhat? ")
    # Parts are taken as they are, and a template without line breaks keeps the prompt's own.
    parts = [say("user", [{"type": "image"}, {"type": "text", "text": "\nwhat?"}])]
    assert "<image>\n\nwhat?" in rendered(make(STRINGS), picture(9, 9), parts)
    assert "<image>\nwhat?" in rendered(make(STRICT_TEMPLATE), picture(9, 9), "<image>\nwhat?")


def test_a_prompt_in_the_templates_own_form_gets_a_warning(recwarn):
    process = make(IMAGES_FIRST_TEMPLATE)
    for text in ("USER: what? ASSISTANT:", "USER: <image>\nwhat?\nASSISTANT:"):
        with pytest.warns(UserWarning, match="pass raw_prompt=True"):
            process(picture(9, 9), text)
    process(None, "who is the USER: of ASSISTANT: here?")
    process(None, "USER: what? ASSISTANT:", raw_prompt=True)
    assert not recwarn.list


def test_any_string_is_a_prompt():
    for text in ("\udcff", "a\ud83d", "\ud83d\ude00", "\0", "\u202e", "\ufeff", "é" * 9):
        for raw in (False, True):
            inputs = make()(None, text, raw_prompt=raw)
            assert inputs.length[0] > 0
    assert rendered(make(STRICT_TEMPLATE), None, "a\udcffb") == "<s>a\ufffdb"
    assert rendered(make(STRICT_TEMPLATE), None, "\ud83d\ude00") == "<s>\U0001f600"


@pytest.mark.parametrize("text", [5, b"what?", None, [5], {"role": "user"}, "x", object()])
@pytest.mark.parametrize("long", [1, 10**6])
def test_what_is_no_prompt_is_refused_in_one_short_line(text, long):
    messages = [{"role": "user" * long, "content": text}] if long > 1 else text
    if messages == "x":
        return
    with pytest.raises(ValueError) as error:
        make()(None, messages)
    assert len(str(error.value)) <= 400
    assert "\n" not in str(error.value)
