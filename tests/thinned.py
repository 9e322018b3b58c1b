"""Which cases of a test with many are left to `make test-all`.

Cases that differ in one axis mostly fail together: `make test` runs every n-th of those below. The
numbers share no factor with the lengths of most axes, so that all values of these come.
"""

from collections import Counter

import pytest

THINNED = {
    "tests/cache/test_methods.py::test_a_method_is_its_formula": 3,
    "tests/cache/test_options.py::test_a_share_of_the_budget_is_given_to_all_layers_alike": 4,
    "tests/cache/test_options.py::test_text_is_kept_before_any_ranking": 5,
    "tests/cache/test_token_budgets.py::test_every_method_keeps_as_many_as_were_asked_for": 3,
    "tests/convert/test_conversion.py::test_a_failure_in_the_middle_leaves_the_old_target": 5,
    "tests/convert/test_conversion.py::test_every_spelling_converts_to_the_same": 3,
    "tests/convert/test_conversion.py::test_there_and_back_is_bit_identical": 2,
    "tests/convert/test_transformers.py::test_saved_by_transformers_and_loaded_by_it_again": 5,
    "tests/evaluation/test_replay.py::test_replay_equals_step_by_step_decoding": 5,
    "tests/kernels/test_chunks.py::test_against_the_reference": 3,
    "tests/kernels/test_chunks.py::test_scores_are_those_of_the_layer_alone": 5,
    "tests/kernels/test_prefill_attention.py::test_against_the_reference": 3,
    "tests/kernels/test_quantized_decode.py::test_attention_is_that_of_the_rows_spelled_out": 3,
    "tests/kernels/test_ragged_decode.py::test_against_the_reference": 3,
    "tests/kernels/test_window_scores.py::test_against_the_reference": 3,
    "tests/kernels/test_window_scores.py::test_rows_that_count_more_or_less": 5,
    "tests/models/test_compression.py::test_decoding_equals_a_pruned_cache_of_transformers": 4,
    "tests/models/test_decoders.py::test_a_batch_of_unequal_prompts_equals_batch_one": 5,
    "tests/models/test_decoders.py::test_a_quantized_cache_begins_the_same_answer": 5,
    "tests/models/test_decoders.py::test_converted_and_loaded_by_transformers_again": 5,
    "tests/models/test_decoders.py::test_the_same_greedy_tokens": 5,
    "tests/models/test_parity.py::test_a_batch_of_unequal_prompts_equals_batch_one": 3,
    "tests/models/test_parity.py::test_bfloat16_is_no_further_from_float32_than_hugging_face_is": 3,
    "tests/models/test_parity.py::test_the_same_greedy_tokens": 4,
    "tests/models/test_qwen_vl.py::test_the_same_greedy_tokens": 3,
    "tests/running/test_cache_methods.py::test_a_batch_of_unequal_prompts_equals_batch_one": 4,
    "tests/running/test_cache_methods.py::test_every_length_fits_its_pool": 5,
    "tests/running/test_parts.py::test_a_chunk_may_be_of_any_size": 3,
    "tests/running/test_parts.py::test_chunks_are_the_whole_prompt": 4,
    "tests/running/test_quantized_generate.py::test_new_tokens_are_packed_too": 3,
    "tests/sessions/test_session.py::test_a_question_is_answered_as_by_a_whole_prompt": 4,
    "tests/sessions/test_session.py::test_so_it_is_with_other_widths_and_budgets": 3,
    "tests/test_mutations_config.py::test_a_changed_file_is_answered_or_refused_in_one_line": 7,
    "tests/test_mutations_input.py::test_a_changed_picture_is_answered_or_refused_in_one_line": 4,
    "tests/test_mutations_input.py::test_a_changed_prompt_is_answered_or_refused_in_one_line": 4,
}
"""n of each test."""


@pytest.hookimpl(tryfirst=True)  # before the marks are looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all cases but every n-th as `full`."""
    seen = Counter[str]()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if seen[test] % THINNED.get(test, 1):
            item.add_marker(pytest.mark.full)
        seen[test] += 1
