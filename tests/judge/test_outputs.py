"""Model outputs joined with the reference's, and with the prompts that were judged."""

import json

import pytest

from eval.outputs import load_outputs, match_outputs, rows_of_prompts
from otpo.errors import UserError


def outputs(*texts, generator="model"):
    return [{"instruction": t, "output": f"{generator} {i}", "generator": generator} for i, t in enumerate(texts)]


def test_outputs_are_paired_with_the_reference_by_instruction_in_its_order():
    pairs = match_outputs(outputs("b", "c", "a"), outputs("a", "b", "c", generator="ref"))
    assert [(p.index, p.instruction, p.output, p.reference) for p in pairs] == [
        (0, "a", "model 2", "ref 0"),
        (1, "b", "model 0", "ref 1"),
        (2, "c", "model 1", "ref 2"),
    ]
    assert (pairs[0].generator, pairs[0].reference_generator) == ("model", "ref")


def test_repeated_instructions_are_matched_in_order():
    model, reference = outputs("a", "b", "a"), outputs("a", "a", "b", generator="ref")
    assert [(p.output, p.reference) for p in match_outputs(model, reference)] == [
        ("model 0", "ref 0"),
        ("model 2", "ref 1"),
        ("model 1", "ref 2"),
    ]
    assert [row["output"] for row in rows_of_prompts(["b", "a", "a"], model, "m")] == ["model 1", "model 0", "model 2"]
    with pytest.raises(UserError, match=r"outputs of m: expected one for each of the 3 .* 1 are missing .*'a'"):
        rows_of_prompts(["a", "a", "a"], model, "m")


def test_other_instructions_are_refused_with_counts_and_examples():
    with pytest.raises(UserError, match=r"2 outputs have no reference, e\.g\. 'x'; 'y'.*1 instructions .*'b'"):
        match_outputs(outputs("a", "x", "y"), outputs("a", "b", generator="ref"))


def test_a_part_is_judged_only_when_asked_for():
    with pytest.raises(UserError, match="1 instructions of the reference have no output"):
        match_outputs(outputs("b"), outputs("a", "b", generator="ref"))
    assert [p.index for p in match_outputs(outputs("b"), outputs("a", "b", generator="ref"), subset=True)] == [1]
    with pytest.raises(UserError, match="1 outputs have no reference"):
        match_outputs(outputs("b", "x"), outputs("a", "b", generator="ref"), subset=True)


def test_outputs_without_text_are_refused(tmp_path):
    path = tmp_path / "o.json"
    path.write_text(json.dumps([{"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}]))
    with pytest.raises(UserError, match=r"1 of 2 rows have no text under output \(rows 1"):
        load_outputs(path)


def test_a_reference_without_an_output_is_refused():
    with pytest.raises(UserError, match=r"The reference: 1 of 2 rows have no text under output \(rows 1"):
        match_outputs(outputs("a", "b"), [*outputs("a"), {"instruction": "b", "output": None}])


def test_real_outputs_match_their_reference(shared_data):
    reference = load_outputs(shared_data / "alpaca_eval" / "reference_gpt4_1106_preview.json.gz")
    model = load_outputs(shared_data / "alpaca_eval" / "alpaca-7b" / "model_outputs.json.gz")
    pairs = match_outputs(model[::-1], reference)
    assert [p.instruction for p in pairs] == [row["instruction"] for row in reference]
    assert [p.output for p in pairs] == [row["output"] for row in model]
    assert len(pairs) == 805
