"""The tokenizer that is saved with a reward model, so that whoever scores with it reads the state that was trained.

A reward model is trained at its completion's last token, EOS or what ends a turn. transformers' classifiers read the
last token that is not padding, and vLLM the last token. So texts may not be padded with a token that completions end
in, and a conversation may not be rendered with anything behind its last turn's end (ChatML puts a line break there).
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from otpo.data.template import Rendering
from otpo.data.tokens import tokenize_outputs
from otpo.errors import UserError

NEW_PAD = "<|score_pad|>"

# The template as it was, and behind a whole conversation not what it puts there but what was trained. The empty
# expressions keep Jinja from taking line breaks and spaces beside its tags away.
_ENDING = '{{%- set conversation %}}{{{{ "" }}}}{template}{{{{ "" }}}}{{% endset %}}{{{{ {ended} }}}}'


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


def for_scoring(tokenizer: Any, pad_id: int, rendering: Rendering | str) -> Any:
    """Change a tokenizer, in place, into the one to save with a reward model.

    Args:
        pad_id: from `pad_token`.
        rendering: the training's.
    """
    known = tokenizer.convert_ids_to_tokens(pad_id) if pad_id < len(tokenizer) else None
    if known is None:
        tokenizer.add_special_tokens({"pad_token": NEW_PAD})
    else:
        tokenizer.pad_token = known
    if tokenizer.pad_token_id != pad_id:
        raise ValueError(f"expected padding token {pad_id}, found {tokenizer.pad_token_id} ({tokenizer.pad_token})")
    tokenizer.padding_side = "right"  # on the left it would move learned positions
    tokenizer.chat_template = _ended(tokenizer, rendering) or tokenizer.chat_template
    return tokenizer


def check_template(tokenizer: Any, rendering: Rendering | str) -> None:
    """Refuse to train a reward model on conversations that its readers would render otherwise.

    Args:
        rendering: the training's.

    Raises:
        UserError: the chat template renders a conversation with other tokens than those that are trained.
    """
    if tokenizer.chat_template and _ended(tokenizer, rendering) is None:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} renders a finished conversation with other tokens than the"
            " prompt and the completion that follows it, which training reads. Whoever scores conversations with the"
            " reward model would render them by the template and get other scores. Mend the template (often it drops or"
            " adds something only behind the generation prompt), or set data.template=literal with rows of strings."
        )


def _ended(tokenizer: Any, rendering: Rendering | str) -> Any:
    """The chat template, or each of several with names, as `_ended_one` gives it; None if one renders other tokens."""
    if not isinstance(tokenizer.chat_template, dict):
        return _ended_one(tokenizer, rendering)
    ended = {}
    for name, template in tokenizer.chat_template.items():
        alone = copy.deepcopy(tokenizer)
        alone.chat_template = template
        ended[name] = _ended_one(alone, rendering)
    return None if None in ended.values() else ended


def _ended_one(tokenizer: Any, rendering: Rendering | str) -> str | None:
    """The chat template, with the training's variables and ending a conversation at the token that training ends it
    with; None if it renders other tokens. Literal training leaves it as it is.
    """
    kwargs: dict[str, Any] = {}
    template = str(rendering)
    if isinstance(rendering, Rendering):
        template, kwargs = rendering.template, dict(rendering.chat_template_kwargs)
    if "chat" not in template:
        return tokenizer.chat_template
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        item = tokenize_outputs(["a"], ["b"], tokenizer, template="chat", chat_template_kwargs=kwargs)[0]
    except UserError:  # it refuses such a conversation: the rows say whether it takes theirs
        return tokenizer.chat_template
    trained = item.prompt_ids + item.completion_ids
    text = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    full, bare = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in (text, text.rstrip()))
    variables = "".join(f"{{%- set {name} = {value!r} %}}" for name, value in kwargs.items())
    if trained == full:
        return variables + tokenizer.chat_template
    for ids, ended in ((bare, "conversation.rstrip()"), ([*full, tokenizer.eos_token_id], "conversation + eos_token")):
        if trained == ids:
            kept = f"conversation if add_generation_prompt else {ended}"
            return variables + _ENDING.format(template=tokenizer.chat_template.removesuffix("\n"), ended=kept)
    return None
