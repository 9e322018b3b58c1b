"""What loops write and launch, read from texts made up here: one instruction at a time."""

from dataclasses import dataclass

import pytest

from benchmarks.loops import loop_copies, loop_floats, step_launches

MODULE = """HloModule example, is_scheduled=true

%update (p.0: f32[8,4], p.1: f32[1,4], p.2: s32[]) -> f32[8,4] {{
  %p.0 = f32[8,4]{{1,0}} parameter(0)
  %p.1 = f32[1,4]{{1,0}} parameter(1)
  %p.2 = s32[] parameter(2)
  %zero.0 = s32[] constant(0)
  ROOT %new.0 = f32[8,4]{{1,0}} dynamic-update-slice(%p.0, %p.1, %p.2, %zero.0)
}}

%add_update (q.0: f32[8,4], q.1: f32[1,4], q.2: s32[]) -> f32[8,4] {{
  %q.0 = f32[8,4]{{1,0}} parameter(0)
  %q.1 = f32[1,4]{{1,0}} parameter(1)
  %q.2 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %old.1 = f32[1,4]{{1,0}} dynamic-slice(%q.0, %q.2, %zero.1), dynamic_slice_sizes={{1,4}}
  %sum.1 = f32[1,4]{{1,0}} add(%old.1, %q.1)
  ROOT %new.1 = f32[8,4]{{1,0}} dynamic-update-slice(%q.0, %sum.1, %q.2, %zero.1)
}}

%shift_update (r.0: f32[8,4], r.2: s32[]) -> f32[8,4] {{
  %r.0 = f32[8,4]{{1,0}} parameter(0)
  %r.2 = s32[] parameter(1)
  %zero.2 = s32[] constant(0)
  %old.2 = f32[1,4]{{1,0}} dynamic-slice(%r.0, %zero.2, %zero.2), dynamic_slice_sizes={{1,4}}
  ROOT %new.2 = f32[8,4]{{1,0}} dynamic-update-slice(%r.0, %old.2, %r.2, %zero.2)
}}

%double_update (s.0: f32[8,4], s.1: f32[1,4], s.2: s32[]) -> f32[8,4] {{
  %s.0 = f32[8,4]{{1,0}} parameter(0)
  %s.1 = f32[1,4]{{1,0}} parameter(1)
  %s.2 = s32[] parameter(2)
  %zero.3 = s32[] constant(0)
  %twice = f32[8,4]{{1,0}} add(%s.0, %s.0)
  ROOT %new.3 = f32[8,4]{{1,0}} dynamic-update-slice(%twice, %s.1, %s.2, %zero.3)
}}

%two_updates (u.0: f32[8,4], u.1: f32[1,4], u.2: s32[]) -> (s32[], f32[4,8]) {{
  %u.0 = f32[8,4]{{1,0}} parameter(0)
  %u.1 = f32[1,4]{{1,0}} parameter(1)
  %u.2 = s32[] parameter(2)
  %zero.4 = s32[] constant(0)
  %new.4 = f32[8,4]{{1,0}} dynamic-update-slice(%u.0, %u.1, %u.2, %zero.4)
  %seen.4 = f32[4,8]{{1,0}} bitcast(%new.4)
  ROOT %both.4 = (s32[], f32[4,8]{{1,0}}) tuple(%zero.4, %seen.4)
}}

%scalar (b.0: f32[], b.1: f32[]) -> f32[] {{
  %b.0 = f32[] parameter(0)
  ROOT %b.1 = f32[] parameter(1)
}}

%called (c.0: f32[8,4]) -> f32[8,4] {{
  %c.0 = f32[8,4]{{1,0}} parameter(0)
  ROOT %c.1 = f32[8,4]{{1,0}} negate(%c.0)
}}

%body (arg: (s32[], f32[8,4], f32[1,4])) -> (s32[], f32[8,4], f32[1,4]) {{
  %arg = (s32[], f32[8,4]{{1,0}}, /*index=2*/f32[1,4]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %old = f32[8,4]{{1,0}} get-tuple-element(%arg), index=1
  %row = f32[1,4]{{1,0}} get-tuple-element(%arg), index=2
{lines}
  ROOT %out = (s32[], f32[8,4]{{1,0}}, f32[1,4]{{1,0}}) tuple(%i, %{result}, /*index=2*/%row)
}}

%condition (arg.1: (s32[], f32[8,4], f32[1,4])) -> pred[] {{
  %arg.1 = (s32[], f32[8,4]{{1,0}}, f32[1,4]{{1,0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %limit = s32[] constant(9)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}}

ENTRY %main (x: (s32[], f32[8,4], f32[1,4])) -> (s32[], f32[8,4], f32[1,4]) {{
  %x = (s32[], f32[8,4]{{1,0}}, f32[1,4]{{1,0}}) parameter(0)
  %part = f32[8,4]{{1,0}} get-tuple-element(%x), index=1
  %outside = f32[8,4]{{1,0}} copy(%part)
  ROOT %loop = (s32[], f32[8,4]{{1,0}}, f32[1,4]{{1,0}}) while(%x), condition=%condition, body=%body
}}
"""


@dataclass(frozen=True)
class Case:
    """Instructions of the loop's body, which of them carries the array on, and which copies."""

    name: str
    lines: tuple[str, ...]
    copies: str = ""
    result: str = "new"


ARRAY = "%new = f32[8,4]{1,0}"
CASES = [
    Case("nothing", (), result="old"),
    Case(
        "a bitcast",
        ("%flat = f32[32]{0} bitcast(%old)", f"{ARRAY} bitcast(%flat)"),
    ),
    Case("a copy", (f'{ARRAY} copy(%old), metadata={{op_name="copy"}}',), copies="new"),
    Case(
        "an asynchronous copy",
        (
            "%start = (f32[8,4]{1,0}, f32[8,4]{1,0:S(5)}, u32[]) copy-start(%old)",
            f"{ARRAY} copy-done(%start)",
        ),
        copies="start",
    ),
    Case("a transpose", ("%t = f32[4,8]{1,0} transpose(%old), dimensions={1,0}",), "t", "old"),
    Case("another size", ("%half = f32[4,4]{1,0} slice(%old), slice={[0:4], [0:4]}",), "", "old"),
    Case("an update", (f"{ARRAY} dynamic-update-slice(%old, %row, %i, %i)",)),
    Case(
        "an update of what is needed later",
        (
            f"{ARRAY} dynamic-update-slice(%old, %row, %i, %i)",
            "%seen = f32[32]{0} bitcast(%old)",
            "%last = f32[1]{0} slice(%seen), slice={[31:32]}",
        ),
        copies="new",
    ),
    Case(
        "an update of what is handed on",
        ("%other = f32[8,4]{1,0} dynamic-update-slice(%old, %row, %i, %i)",),
        copies="other",
        result="old",
    ),
    Case(
        "an update of what was read before",
        (
            "%last = f32[1,4]{1,0} slice(%old), slice={[7:8], [0:4]}",
            f"{ARRAY} dynamic-update-slice(%old, %last, %i, %i)",
        ),
    ),
    Case("a fused update", (f"{ARRAY} fusion(%old, %row, %i), kind=kLoop, calls=%update",)),
    Case(
        "a fused update of what is needed later",
        (
            f"{ARRAY} fusion(%old, %row, %i), kind=kLoop, calls=%update",
            "%last = f32[1,4]{1,0} slice(%old), slice={[7:8], [0:4]}",
        ),
        copies="new",
    ),
    Case(
        "a fused update from the same place",
        (f"{ARRAY} fusion(%old, %row, %i), kind=kLoop, calls=%add_update",),
    ),
    Case(
        "a fused update from another place",
        (f"{ARRAY} fusion(%old, %i), kind=kLoop, calls=%shift_update",),
        copies="new",
    ),
    Case(
        "a fused update of something computed",
        (f"{ARRAY} fusion(%old, %row, %i), kind=kLoop, calls=%double_update",),
        copies="new",
    ),
    Case(
        "a fused update beside another result",
        (
            "%pair = (s32[], f32[4,8]{1,0}) fusion(%old, %row, %i), kind=kLoop, calls=%two_updates",
            "%turned = f32[4,8]{1,0} get-tuple-element(%pair), index=1",
            f"{ARRAY} bitcast(%turned)",
        ),
    ),
    Case("a scatter", (f"{ARRAY} scatter(%old, %i, %row), to_apply=%scalar",)),
    Case(
        "a scatter into what is handed on",
        ("%other = f32[8,4]{1,0} scatter(%old, %i, %row), to_apply=%scalar",),
        copies="other",
        result="old",
    ),
    Case(
        "a kernel",
        (f'{ARRAY} custom-call(%old), custom_call_target="kernel"',),
        copies="new",
    ),
    Case(
        "a kernel in place",
        (
            f'{ARRAY} custom-call(%old), custom_call_target="kernel", '
            "output_to_operand_aliasing={{}: (0, {})}",
        ),
    ),
    Case("a call", (f"{ARRAY} call(%old), to_apply=%called",), copies="c.1"),
    Case(
        "a branch",
        (f"{ARRAY} conditional(%i, %old, %old), branch_computations={{%called, %called}}",),
        copies="c.1",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loop_copies_of_one_instruction(case):
    lines = "\n".join(f"  {line}" for line in case.lines)
    found = loop_copies(MODULE.format(lines=lines, result=case.result), (2, 4, 4))
    assert [line.split(" = ")[0] for line in found] == ([f"%{case.copies}"] if case.copies else [])
    assert not any("metadata" in line for line in found)


WIDER = [
    ("%wide = bf16[8,8]{1,0} convert(%old)", 32, True),
    ("%wide = f32[64]{0} convert(%old)", 64, True),
    ("%wide = f32[64]{0} convert(%old)", 65, False),
    ("%codes = u32[8,8]{1,0} convert(%old)", 32, False),
    ("%seen = f32[32]{0} bitcast(%old)", 32, False),
    ("%two = (u32[64]{0}, f32[2]{0}) custom-call(%old)", 32, False),
    ("%two = (u32[2]{0}, f32[64]{0}) custom-call(%old)", 32, True),
]


@pytest.mark.parametrize(("line", "least", "found"), WIDER)
def test_large_arrays_of_floats_are_found_by_their_type_and_size(line, least, found):
    text = MODULE.format(lines=f"  {line}", result="old")
    assert loop_floats(text, least) == ([line.replace("  ", "")] if found else [])


def test_text_that_is_no_hlo_is_refused():
    with pytest.raises(ValueError, match="is this HLO text"):
        loop_copies("%body (x: f32[2]) -> f32[2] {\n  %y = (f32[2] copy", (2,))


THUNKS = """001: kCopy         [source       | next=003 (2)] kCopy
003: kWhile         [prev=002 (1) | sink        ]
condition:
    004: kCustomKernel [source | sink] compare grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    000: kCommandBuffer      [source       | next=466 (1)]
        005: kCustomKernel [source       | sink        ] norm__1 grid: [1, 1, 1]
        006: kCustomKernel [source       | next=007 (1)] append_and_attend grid: [8, 1, 1]
        007: kCustomKernel [source       | next=008 (1)] merge_splits grid: [8, 1, 1]
        008: kGemm         [source       | next=009 (1)] kGemm
        009: kCustomKernel [source       | sink        ] append_and_attend__1 grid: [8, 1, 1]
        010: kCustomKernel [source       | sink        ] add_rms_norm__1 grid: [1, 1, 1]
{more}468: kCustomKernel       [source       | sink        ] last grid: [1, 1, 1]
"""


def test_launches_of_a_step_are_counted():
    found = step_launches(THUNKS.format(more=""))
    assert found == {
        "kernels_per_step": {"append_and_attend": 2, "merge_splits": 1, "add_rms_norm": 1},
        "launches_per_step": 6,
        "launches_per_layer": 3,
        "one_command_buffer": True,
    }


def test_the_kernel_of_a_quantized_cache_is_known():
    thunks = THUNKS.replace("append_and_attend", "quantized_append_and_attend")
    found = step_launches(thunks.format(more=""))
    assert found["kernels_per_step"]["quantized_append_and_attend"] == 2
    assert (found["launches_per_layer"], found["one_command_buffer"]) == (3, True)


def test_a_launch_beside_the_command_buffer_is_seen():
    more = "    466: kDynamicSliceFusion [prev=000 (1) | sink        ] params=1, results=1\n"
    found = step_launches(THUNKS.format(more=more))
    assert found["one_command_buffer"] is False
    assert found["launches_per_step"] == 7


def test_a_program_without_the_kernel_has_no_figures():
    found = step_launches(THUNKS.replace("append_and_attend", "fusion").format(more=""))
    assert found["launches_per_layer"] is found["one_command_buffer"] is None
