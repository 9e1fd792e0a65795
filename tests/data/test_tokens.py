"""Token ids of examples: templates, BOS and EOS, boundaries, truncation."""

import warnings
from itertools import pairwise

import pytest
from conftest import SENTENCES
from support.chat_templates import LLAMA3
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from otpo.data.load import load_rows
from otpo.data.tokens import load_tokenizer, tokenize_completions, tokenize_pairs
from otpo.errors import UserError
from otpo.models.fresh import make_tokenizer

SYSTEM = {"role": "system", "content": "Be brief. 简短。"}
USER = {"role": "user", "content": "Where does the train leave?  "}
THEN = {"role": "assistant", "content": "At nine."}
MORE = {"role": "user", "content": "And\n\nfrom which platform? 😀"}
GOOD, BAD = (
    {"role": "assistant", "content": "From the third."},
    {"role": "assistant", "content": "\n\nI cannot say 🚂 "},
)
TALK = {"prompt": [SYSTEM, USER, THEN, MORE], "chosen": [GOOD], "rejected": [BAD]}
PLAIN = {"prompt": "Where does the train leave?", "chosen": " From the third platform.", "rejected": " 😀 no"}

LONG = " ".join(SENTENCES)


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerFast:
    return make_tokenizer(SENTENCES, vocab_size=600)


@pytest.fixture
def llama3() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(SENTENCES, vocab_size=600)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]}
    )
    tokenizer.chat_template = LLAMA3
    return tokenizer


@pytest.fixture
def metaspace() -> PreTrainedTokenizerFast:
    """As Llama 2's: spaces are part of the next piece, and a text's first piece gets one too; no BOS of its own."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    inner.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")


def one(row, tokenizer, **settings):
    (pair,), report = tokenize_pairs([row], tokenizer, **settings)
    return pair, report


def test_strings_are_literal_with_bos_and_eos(chatml):
    pair, report = one(PLAIN, chatml)
    assert report.template == "literal"
    for side in ("chosen", "rejected"):
        ids = pair.prompt_ids + getattr(pair, f"{side}_ids")
        assert chatml.decode(ids) == "<|bos|>" + PLAIN["prompt"] + PLAIN[side] + "<|im_end|>"
        assert ids == chatml(PLAIN["prompt"] + PLAIN[side])["input_ids"] + [chatml.eos_token_id]


def test_bos_and_eos_that_the_text_has_already_are_not_doubled(chatml):
    marked = {"prompt": "<|bos|>Where?", "chosen": "Here.<|im_end|>", "rejected": "There.<|im_end|>"}
    bare = {"prompt": "Where?", "chosen": "Here.", "rejected": "There."}
    assert one(marked, chatml)[0] == one(bare, chatml)[0]


def test_messages_go_through_the_template_once(chatml):
    pair, report = one(TALK, chatml)
    assert report.template == "chat" and not report.notes
    assert chatml.decode(pair.prompt_ids) == (
        "<|bos|><|im_start|>system\nBe brief. 简短。<|im_end|>\n"
        "<|im_start|>user\nWhere does the train leave?  <|im_end|>\n"
        "<|im_start|>assistant\nAt nine.<|im_end|>\n<|im_start|>user\nAnd\n\nfrom which platform? 😀<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert pair.prompt_ids == chatml.apply_chat_template(TALK["prompt"], add_generation_prompt=True)["input_ids"]
    assert chatml.decode(pair.chosen_ids) == "From the third.<|im_end|>"
    assert pair.chosen_ids[-1] == chatml.eos_token_id
    assert chatml.decode(pair.rejected_ids) == "\n\nI cannot say 🚂 <|im_end|>"


def test_llama3_has_one_bos_its_header_in_the_prompt_and_its_end_of_turn_in_the_answer(llama3):
    assert (
        llama3("a")["input_ids"][0] == llama3.bos_token_id
    )  # a second tokenisation with special tokens would double it
    pair, report = one(TALK, llama3)
    end = llama3.convert_tokens_to_ids("<|eot_id|>")
    assert pair.prompt_ids == llama3.apply_chat_template(TALK["prompt"], add_generation_prompt=True)["input_ids"]
    assert llama3.decode(pair.prompt_ids).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    for ids in (pair.chosen_ids, pair.rejected_ids):
        assert (pair.prompt_ids + ids).count(llama3.bos_token_id) == 1
        assert ids[-1] == end and ids.count(end) == 1
    assert llama3.decode(pair.rejected_ids) == "I cannot say 🚂<|eot_id|>"
    assert report.notes == {"white space at the ends of a completion cut by the chat template": [0]}


def test_template_chat_wraps_strings_as_messages(llama3):
    strings = {"prompt": USER["content"], "chosen": GOOD["content"], "rejected": BAD["content"]}
    messages = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    assert one(strings, llama3, template="chat")[0] == one(messages, llama3)[0]
    mixed = {"prompt": [USER], "chosen": GOOD["content"], "rejected": BAD["content"]}
    assert one(mixed, llama3)[0] == one(messages, llama3)[0]


def test_trl_makes_the_same_ids(tmp_path, tiny_llama):
    """TRL's own trainer as the oracle; it also trains the white space after the end of turn, ours ends there."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = load_tokenizer(tiny_llama)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    config = DPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    plain = [PLAIN] + [{"prompt": a, "chosen": " " + b, "rejected": "\n" + a} for a, b in pairwise(SENTENCES)]
    talk = [TALK, {"prompt": [USER], "chosen": [THEN], "rejected": [GOOD]}]
    for rows, tail in ((plain, []), (talk, newline)):
        with warnings.catch_warnings(action="ignore"):
            trainer = DPOTrainer(
                str(tiny_llama), args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
            )
        pairs, report = tokenize_pairs(rows, tokenizer)
        boundary = [row for name, where in report.notes.items() if "merge" in name for row in where]
        assert len(boundary) < len(rows) / 2
        for pair in pairs:
            theirs = trainer.train_dataset[pair.row]
            if pair.row not in boundary:
                assert pair.prompt_ids == theirs["prompt_ids"]
                assert pair.chosen_ids + tail == theirs["chosen_ids"]
                assert pair.rejected_ids + tail == theirs["rejected_ids"]


def test_a_token_that_would_span_the_boundary_is_split_there_and_noted(chatml):
    row = {"prompt": "The capital is ", "chosen": "sea level", "rejected": "\nthe sea"}
    pair, report = one(row, chatml)
    assert chatml("The capital is sea")["input_ids"][: len(pair.prompt_ids)] != pair.prompt_ids
    assert pair.prompt_ids == chatml("The capital is ")["input_ids"]
    assert chatml.decode(pair.chosen_ids) == "sea level<|im_end|>"
    assert report.notes == {"tokens merge across the end of the prompt: completion tokenised alone": [0]}


def test_an_answer_within_a_sentence_gets_no_space_of_a_new_text(metaspace):
    row = {"prompt": "The capital of Mongolia is", "chosen": " lower", "rejected": " boils"}
    pair, report = one(row, metaspace)
    assert not report.notes
    assert pair.prompt_ids + pair.chosen_ids == metaspace("The capital of Mongolia is lower")["input_ids"] + [1]


def test_a_literal_prompt_that_is_empty_still_has_a_token_that_predicts(chatml, metaspace):
    row = {"prompt": "", "completion": "water boils"}
    for tokenizer, first in ((chatml, chatml.bos_token_id), (metaspace, metaspace.eos_token_id)):
        (item,), report = tokenize_completions([row], tokenizer)
        assert item.prompt_ids == [first] and report.notes == {"empty prompt": [0]}
    _, report = tokenize_pairs([PLAIN, {**PLAIN, "prompt": ""}], chatml, template="chat")
    assert report.problems == {"empty prompt": [1]}


def test_messages_that_the_template_refuses_are_counted(chatml):
    chatml = make_tokenizer(SENTENCES, vocab_size=600)
    chatml.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + chatml.chat_template
    )
    pairs, report = tokenize_pairs([TALK, {**TALK, "prompt": [USER]}], chatml)
    assert [pair.row for pair in pairs] == [1]
    way = "write the system prompt into the user's message; data.columns: {system: null} leaves a column out"
    assert report.problems == {f"the chat template refuses the messages: System role not supported ({way})": [0]}
    with pytest.raises(UserError, match="1 the chat template refuses"):
        tokenize_pairs([TALK], chatml)


def test_a_prompt_rendered_differently_beside_an_answer_stays_as_generation_sees_it():
    tokenizer = make_tokenizer(SENTENCES, vocab_size=600)
    tokenizer.chat_template = "{{ messages | length }} messages. " + tokenizer.chat_template
    pair, report = one(TALK, tokenizer)
    assert pair.prompt_ids == tokenizer.apply_chat_template(TALK["prompt"], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(pair.chosen_ids) == "From the third.<|im_end|>"
    assert report.notes == {"chat template renders the prompt differently beside the completion": [0]}


def test_a_template_without_an_end_of_turn_gets_eos():
    tokenizer = make_tokenizer(SENTENCES, vocab_size=600)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    pair, report = one({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, tokenizer)
    assert pair.chosen_ids[-1] == tokenizer.eos_token_id
    assert report.notes["chat template ends the completion without a special token: EOS added"] == [0]


def test_a_tokenizer_that_lacks_something_says_what_to_do(tmp_path, metaspace):
    with pytest.raises(UserError, match=r"at '' has none\. Give a tokenizer with a chat template"):
        tokenize_pairs([TALK], metaspace)
    with pytest.raises(UserError, match="has none"):
        tokenize_pairs([PLAIN], metaspace, template="chat")
    metaspace.eos_token = None
    with pytest.raises(UserError, match=r"no EOS token.* set `eos_token`"):
        tokenize_pairs([PLAIN], metaspace)
    with pytest.raises(UserError, match="expected a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="expected a tokenizer"):
        load_tokenizer(tmp_path / "missing")


@pytest.mark.parametrize(
    "settings", [{"template": "chatml"}, {"truncation": "keep_end"}, {"max_length": 0}, {"max_prompt_length": 1}]
)
def test_a_setting_that_cannot_be_is_refused(chatml, settings):
    with pytest.raises(UserError, match="data." + next(iter(settings))):
        tokenize_pairs([PLAIN], chatml, **settings)


def test_keep_start_cuts_the_answers_end_and_its_eos(chatml):
    whole, _ = one(PLAIN, chatml)
    p, c, r = map(len, (whole.prompt_ids, whole.chosen_ids, whole.rejected_ids))
    assert c != r
    longest = p + max(c, r)
    same, report = one(PLAIN, chatml, max_length=longest)
    assert same == whole and not report.notes
    cut, report = one(PLAIN, chatml, max_length=p + 2)
    assert cut.prompt_ids == whole.prompt_ids
    assert cut.chosen_ids == whole.chosen_ids[:2] and cut.rejected_ids == whole.rejected_ids[:2]
    assert report.notes == {
        "chosen cut to max_length, without EOS": [0],
        "rejected cut to max_length, without EOS": [0],
    }
    assert report.lengths["chosen tokens"]["max"] == c  # as they were, to choose max_length by


def test_a_long_prompt_loses_its_left_but_not_bos(chatml):
    whole, _ = one(TALK, chatml)
    cut, report = one(TALK, chatml, max_prompt_length=12)
    assert cut.prompt_ids == [chatml.bos_token_id, *whole.prompt_ids[-11:]]
    assert cut.chosen_ids == whole.chosen_ids
    assert report.notes == {"prompt cut at its left to max_prompt_length": [0]}


def test_rows_that_truncation_leaves_nothing_of_are_counted(chatml):
    long = {"prompt": LONG, "chosen": "a", "rejected": "b"}
    alike = {"prompt": "Tell:", "chosen": LONG + " Yes.", "rejected": LONG + " No."}
    pairs, report = tokenize_pairs([long, PLAIN, alike], chatml, max_length=30)
    assert [pair.row for pair in pairs] == [1]
    assert report.problems == {
        "prompt alone fills max_length": [0],
        "completions identical once cut to max_length": [2],
    }
    assert report.n_usable == 1


def test_drop_leaves_out_what_is_too_long(chatml):
    long = {"prompt": "And?", "chosen": LONG, "rejected": "no"}
    pairs, report = tokenize_pairs([PLAIN, long], chatml, max_length=64, truncation="drop")
    assert [pair.row for pair in pairs] == [0] and not report.notes
    assert report.problems == {"longer than max_length": [1]}
    whole, _ = one(PLAIN, chatml)
    with pytest.raises(UserError, match="1 longer than max_prompt_length"):
        one(PLAIN, chatml, max_prompt_length=len(whole.prompt_ids) - 1, truncation="drop")


def test_completions_carry_their_label_and_pairs_give_their_chosen_answer(chatml):
    rows = [{"prompt": "Is it?", "completion": " It is.", "label": label} for label in (True, False)]
    items, _ = tokenize_completions(rows, chatml)
    assert [item.label for item in items] == [True, False]
    (item,), report = tokenize_completions([PLAIN], chatml)
    pair, _ = one(PLAIN, chatml)
    assert (item.prompt_ids, item.completion_ids, item.label) == (pair.prompt_ids, pair.chosen_ids, None)
    assert set(report.lengths) == {
        f"{part} {unit}" for part in ("prompt", "completion") for unit in ("characters", "tokens")
    }


def test_the_real_file(shared_data):
    path = shared_data / "preferences" / "instruction-data-with-preference.json"
    rows = load_rows(path)
    tokenizer = make_tokenizer((row[key] for row in rows for key in ("instruction", "chosen", "rejected")), 2000)
    for template in ("auto", "chat"):
        pairs, report = tokenize_pairs(rows, tokenizer, template=template, source=str(path))
        assert (report.n_usable, len(pairs)) == (1094, 1094)
        merged = {row for name, where in report.notes.items() if "merge" in name for row in where}
        assert len(merged) < 30 and (template == "auto" or not merged)
        for pair in pairs:
            row = rows[pair.row]
            text = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
            if template == "chat":
                text = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
            assert tokenizer.decode(pair.prompt_ids) == "<|bos|>" + text
            assert tokenizer.decode(pair.chosen_ids) == row["chosen"] + "<|im_end|>"
            assert tokenizer.decode(pair.rejected_ids) == row["rejected"] + "<|im_end|>"
            if pair.row not in merged:
                whole = tokenizer(text + row["chosen"])["input_ids"]
                assert pair.prompt_ids + pair.chosen_ids == [*whole, tokenizer.eos_token_id]
