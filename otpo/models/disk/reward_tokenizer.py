"""The tokenizer that is saved with a reward model, so that whoever scores with it reads the state that was trained.

A reward model is trained at its completion's last token, EOS or what ends a turn. transformers' classifiers read the
last token that is not padding, and vLLM the last token. So texts may not be padded with a token that completions end
in, and a conversation may not be rendered with anything behind its last turn's end (ChatML puts a line break there).
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from otpo.data.tokens import tokenize_outputs

NEW_PAD = "<|score_pad|>"

# The template as it was, and behind a whole conversation not what it puts there but what was trained. The empty
# expressions keep Jinja from taking line breaks and spaces beside its tags away.
_ENDING = (
    '{{%- set conversation %}}{{{{ "" }}}}{template}{{{{ "" }}}}{{% endset %}}'
    "{{{{ conversation if add_generation_prompt else {ended} }}}}"
)


def pad_token(tokenizer: Any, ends: Collection[int] = ()) -> int:
    """The id to pad scored texts with: the tokenizer's own padding token unless completions end in it, else another
    special token, else one that is added (`NEW_PAD`), whose id is the vocabulary's next.

    Args:
        ends: the last ids of the completions that are trained on.
    """
    taken = {tokenizer.eos_token_id, *ends}
    tokens = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    found = next((token for token in tokens if token is not None and token not in taken), None)
    if found is None:
        extended = copy.deepcopy(tokenizer)
        extended.add_special_tokens({"pad_token": NEW_PAD})
        found = int(extended.pad_token_id)
    return found


def for_scoring(tokenizer: Any, pad_id: int, template: str) -> Any:
    """Change a tokenizer, in place, into the one to save with a reward model.

    Args:
        pad_id: from `pad_token`.
        template: the training's (`otpo.data.template`).
    """
    known = tokenizer.convert_ids_to_tokens(pad_id) if pad_id < len(tokenizer) else None
    if known is None:
        tokenizer.add_special_tokens({"pad_token": NEW_PAD})
    else:
        tokenizer.pad_token = known
    if tokenizer.pad_token_id != pad_id:
        raise ValueError(f"expected padding token {pad_id}, found {tokenizer.pad_token_id} ({tokenizer.pad_token})")
    tokenizer.padding_side = "right"  # on the left it would move learned positions
    if "chat" in template and isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = _ended(tokenizer)
    return tokenizer


def _ended(tokenizer: Any) -> str:
    """The chat template, ending a conversation at the token that training ends it with."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    item = tokenize_outputs(["a"], ["b"], tokenizer, template="chat")[0]
    trained = item.prompt_ids + item.completion_ids
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    full, bare = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in (text, text.rstrip()))
    template = tokenizer.chat_template.removesuffix("\n")
    if trained != full and trained == bare:
        return _ENDING.format(template=template, ended="conversation.rstrip()")
    if trained == [*full, tokenizer.eos_token_id]:
        return _ENDING.format(template=template, ended="conversation + eos_token")
    return tokenizer.chat_template
