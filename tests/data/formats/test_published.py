"""Formats of published data sets: what becomes of rows as their files hold them, as text and as messages."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import SENTENCES
from support.published_rows import (
    HH,
    HH_PROMPT,
    HH_TURNS,
    KTO,
    PREFERRED,
    STEER,
    TLDR,
    TLDR_PROMPT,
    ULTRA,
    assistant,
    parts,
    same,
    user,
)
from trl import maybe_extract_prompt
from typer.testing import CliRunner

from jobs.cli import app
from otpo.data.convert import convert
from otpo.data.formats import FORMATS
from otpo.data.formats.reading import recognise
from otpo.data.load import load_rows
from otpo.data.tokens import tokenize_completions, tokenize_pairs
from otpo.errors import UserError
from otpo.models.fresh import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(SENTENCES, vocab_size=600)


TRANSLATE = {"instruction": "Translate into English.", "input": "Es regnet."}
EVERY = {
    "instruction": ([TRANSLATE | {"chosen": "It rains.", "rejected": "It snows."}], "after a blank line the input"),
    "instruction-ranked": ([TRANSLATE | {"output": ["It rains.", "It snows."]}], "output = [chosen, rejected]"),
    "instruction-output": ([TRANSLATE | {"output": "It rains."}], "one completion a row, as Alpaca's"),
    "hh": ([HH], "Human/Assistant transcripts"),
    "ultrafeedback": ([ULTRA], "UltraFeedback binarized"),
    "helpsteer": (STEER, "two rows of one prompt make a pair"),
    "helpsteer-preference": ([PREFERRED], "below 0 response_1 is chosen"),
    "tldr": ([TLDR], "prompt = SUBREDDIT, TITLE, POST"),
    "unpaired": (KTO, "good or bad (KTO)"),
}


@pytest.mark.parametrize("name", EVERY)
def test_data_says_which_format_it_is_and_how_it_is_read(tmp_path, name):
    rows, about = EVERY[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, {**rows[0], "chosen": None, "choice": 5, "helpfulness": "no"}])))
    done = CliRunner().invoke(app, ["data", str(path)])
    assert done.exit_code == 0
    (line,) = [line for line in done.output.splitlines() if line.startswith("format")]
    assert line.startswith(f"format    {name}: columns {', '.join(FORMATS[name].columns)}") and about in line


@pytest.mark.parametrize("name", EVERY)
def test_parquet_gives_what_json_gives(tmp_path, name):
    """Parquet fills absent keys with None, and its tables have the columns of all rows."""
    rows, _ = EVERY[name]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    assert recognise(load_rows(path)) == name
    assert convert(load_rows(path))[0] == convert(rows)[0] != []


# ---- HH-RLHF ----


def test_hh_transcripts_are_cut_at_their_last_shared_turn_and_nothing_is_lost():
    prompt, chosen, rejected = parts(HH)
    assert (prompt, chosen, rejected) == (HH_PROMPT, " About an hour, or more.", " About a week.")
    assert prompt + chosen == HH["chosen"] and prompt + rejected == HH["rejected"]


def test_hh_is_literal_unless_the_template_is_chat(tokenizer):
    (pair,), report = tokenize_pairs([HH], tokenizer)
    assert report.template == "literal"
    assert tokenizer.decode(pair.prompt_ids + pair.chosen_ids) == "<|bos|>" + HH["chosen"] + "<|im_end|>"
    answers = {"chosen": [assistant("About an hour, or more.")], "rejected": [assistant("About a week.")]}
    same([HH], [{"prompt": HH_TURNS, **answers}], tokenizer)
    (pair,), _ = tokenize_pairs([HH], tokenizer, template="chat")
    (item,), _ = tokenize_completions([HH], tokenizer, template="chat")
    assert (item.prompt_ids, item.completion_ids) == (pair.prompt_ids, pair.chosen_ids)
    assert tokenizer.decode(pair.prompt_ids).count("<|im_start|>user\n") == 2
    assert "Human:" not in tokenizer.decode(pair.prompt_ids)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (" Yes.", " Yes.\n\nHuman: Sure?\n\nAssistant: No.", "rejected is more than one turn"),
        (" No.\n\nHuman: Sure?\n\nAssistant: Yes.", " Yes.", "chosen is more than one turn"),
        (
            " A.\n\nHuman: B?\n\nAssistant: C.",
            " A.\n\nHuman: D?\n\nAssistant: C.",
            "chosen is more than one turn",
        ),
        (" Yes.", "", "rejected is empty"),
        (" Yes.", " Yes.", "identical completions"),
    ],
)
def test_hh_rows_that_are_no_pair_of_answers_are_left_out(chosen, rejected, reason):
    bad = {"chosen": HH_PROMPT + chosen, "rejected": HH_PROMPT + rejected}
    for template in ("auto", "chat"):
        examples, report = convert([HH, bad], template=template)
        assert [example.row for example in examples] == [0] and report.problems == {reason: [1]}


def test_hh_transcripts_that_share_no_prompt_are_left_out():
    other = {"chosen": HH["chosen"], "rejected": HH["rejected"].replace("whale", "shark", 1)}
    _, report = convert([HH, other])
    assert report.problems == {"the transcripts share no beginning that ends in '\\n\\nAssistant:'": [1]}


def test_text_that_only_mentions_a_human_is_no_transcript():
    row = {"chosen": "A Human: a\n\nAssistant: b", "rejected": "A Human: a\n\nAssistant: d"}
    assert recognise([row]) == "preference-implicit"
    assert recognise([{"prompt": "", **HH}]) == "preference"


# ---- UltraFeedback ----


@pytest.mark.parametrize("drop", [(), ("prompt", "prompt_id", "messages")])
def test_ultrafeedback_prompts_are_trls(drop):
    row = {column: value for column, value in ULTRA.items() if column not in drop}
    theirs = maybe_extract_prompt({key: ULTRA[key] for key in ("chosen", "rejected")})
    assert recognise([row]) == "ultrafeedback"
    assert parts(row) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])


def test_ultrafeedback_goes_through_the_template_without_being_told(tokenizer):
    (pair,), report = tokenize_pairs([ULTRA], tokenizer)
    assert report.template == "chat" and not report.notes
    assert tokenizer.decode(pair.prompt_ids + pair.chosen_ids) == (
        "<|bos|><|im_start|>user\nWhen does the train leave?<|im_end|>\n"
        "<|im_start|>assistant\nAt a quarter past nine.<|im_end|>"
    )


def test_ultrafeedback_scores_that_do_not_order_the_answers_are_noted_and_the_rows_used():
    scores = [(8.5, 6.0), (7.0, 7.0), (5.0, 7), (None, 7.0), ("8", "8.0")]
    rows = [{**ULTRA, "score_chosen": chosen, "score_rejected": rejected} for chosen, rejected in scores]
    examples, report = convert(rows)
    assert len(examples) == 5 and not report.problems
    assert report.notes["equal scores"] == [1, 4]
    assert report.notes["chosen completion scored below the rejected one"] == [2]


# ---- TL;DR ----


def test_tldr_is_rendered_as_trl_renders_it(tokenizer):
    chosen, rejected = " She sold her bicycle and rode a new one.", " Bicycle sold."
    assert parts(TLDR) == (TLDR_PROMPT, chosen, rejected)
    assert parts({**TLDR, "choice": 0}) == (TLDR_PROMPT, rejected, chosen)
    (pair,), _ = tokenize_pairs([TLDR], tokenizer)
    assert tokenizer.decode(pair.prompt_ids + pair.chosen_ids) == "<|bos|>" + TLDR_PROMPT + chosen + "<|im_end|>"
    answers = {"chosen": [assistant(chosen.strip())], "rejected": [assistant(rejected.strip())]}
    same([TLDR], [{"prompt": [user(TLDR_PROMPT)], **answers}], tokenizer)


def test_tldr_comparisons_of_news_have_the_article_for_their_prompt():
    info = {
        "id": "0f3",
        "post": None,
        "title": "Rain",
        "subreddit": None,
        "site": "cnn",
        "article": "It rained.\n\nA lot.",
    }
    assert parts({**TLDR, "info": info, "batch": "cnndm0"})[0] == "TITLE: Rain\n\nIt rained.\nA lot.\n\nTL;DR:"


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"choice": 2}, "choice is neither 0 nor 1"),
        ({"choice": None}, "choice is neither 0 nor 1"),
        ({"summaries": TLDR["summaries"][:1]}, "summaries are not two objects"),
        ({"summaries": [{"text": " Sold."}, {"policy": "ref"}]}, "no text"),
        ({"info": "a post"}, "info is no object"),
        ({"info": {**TLDR["info"], "title": None}}, "no title"),
        ({"info": {**TLDR["info"], "post": None}}, "no article"),
    ],
)
def test_tldr_rows_that_lack_something_are_counted(wrong, reason):
    _, report = convert([TLDR, {**TLDR, **wrong}])
    assert report.problems == {reason: [1]}


# ---- KTO ----


def test_unpaired_rows_are_counted_by_label_and_keep_it(tokenizer):
    rows = [*KTO, {**KTO[0], "label": None}]
    items, report = tokenize_completions(rows, tokenizer)
    assert [item.label for item in items] == [True, False, True]
    assert report.labels == {"true": 2, "false": 1} and "labels    2 true, 1 false" in report.lines()
    assert report.problems == {"label is neither true nor false": [3]}
    assert tokenizer.decode(items[1].prompt_ids + items[1].completion_ids).endswith("assistant\nBananas.<|im_end|>")
    with pytest.raises(UserError, match="expected preference pairs"):
        tokenize_pairs(KTO, tokenizer)
