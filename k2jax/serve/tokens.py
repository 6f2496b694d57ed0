"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as open-source servers have them."""

from collections.abc import Mapping
from typing import Any

from k2jax.serve.body import Body
from k2jax.serve.chat_request import read_conversation, read_variables, write_prompt
from k2jax.serve.service import ModelCard
from k2jax.serve.token_text import name_token
from k2jax.text.hf_export import CHAT_TEMPLATE
from k2jax.text.jinja_template import FolderTemplate
from k2jax.text.kimi_template import KIMI_K2

FIELDS = (
    "model",
    "prompt",
    "messages",
    "tools",
    "chat_template_kwargs",
    "thinking",
    "preserve_thinking",
    "reasoning_effort",
    "add_generation_prompt",
    "add_special_tokens",
    "parse_special",
    "return_token_strs",
)


def tokenize(content: Mapping[str, Any], card: ModelCard) -> dict[str, Any]:
    """Token ids of a text, or of a conversation.

    Raises:
        Refusal: a field is wrong.
    """
    body = Body(content, FIELDS, {})
    card.check_name(body.value("model"))
    tokenizer = card.need_tokenizer()
    if "messages" in body:
        messages, tools = read_conversation(body)
        opened = body.flag("add_generation_prompt", True)
        variables = read_variables(body)
        ids = list(write_prompt(tokenizer, messages, tools, variables, opened))
    else:
        if "prompt" not in body:
            body.refuse("prompt", "or 'messages' is needed")
        text = body.text("prompt")
        ids = [tokenizer.bos] if body.flag("add_special_tokens", True) else []
        ids += tokenizer.encode(text, special=body.flag("parse_special", True))
    named = body.flag("return_token_strs")
    return {
        "count": len(ids),
        "max_model_len": card.context,
        "tokens": ids,
        "token_strs": [name_token(tokenizer, id_) for id_ in ids] if named else None,
    }


def detokenize(content: Mapping[str, Any], card: ModelCard) -> dict[str, Any]:
    """The text of token ids.

    Raises:
        Refusal: a field is wrong.
    """
    body = Body(content, ("model", "tokens"), {})
    card.check_name(body.value("model"))
    tokenizer = card.need_tokenizer()
    if "tokens" not in body:
        body.refuse("tokens", "is needed")
    return {"prompt": tokenizer.decode(body.ids("tokens", tokenizer.vocab))}


def describe_tokenizer(card: ModelCard) -> dict[str, Any]:
    """Names of the tokens that programs ask for, and the chat template.

    Raises:
        Refusal: there is no tokenizer.
    """
    tokenizer = card.need_tokenizer()
    names = {id_: name for name, id_ in tokenizer.specials.items()}
    pad = getattr(tokenizer, "pad", None)
    template = None
    if tokenizer.template is KIMI_K2:
        template = CHAT_TEMPLATE
    elif isinstance(tokenizer.template, FolderTemplate):
        template = tokenizer.template.source
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "bos_token": names.get(tokenizer.bos),
        "eos_token": names.get(tokenizer.eos),
        "pad_token": names.get(pad) if pad is not None else None,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "stop_token_ids": list(tokenizer.stops),
        "vocab_size": tokenizer.vocab,
        "model_max_length": card.context,
        "chat_template": template,
    }
