"""Kimi's tokenizer as the files that other readers know: `tokenizer.json` and what is beside it.

A `tiktoken.model` has ranks alone. The `tokenizers` package wants merges: the two tokens that each
token is made of. They follow from the ranks, for every token is made in one way only: whatever is
merged within its bytes is what would be merged if they stood alone.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from k2jax.text.hf_tokenizer import printable_bytes
from k2jax.text.kimi_tokenizer import PATTERN, Tokenizer

# Kept in replies by readers that drop special tokens, for their parsers look for them.
KEPT = ("<|tool_call", "<think>", "</think>")
# K2's template, as `kimi_template.KIMI_K2` writes it.
CHAT_TEMPLATE = """\
{%- if tools -%}
<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>
{%- endif -%}
{%- if not messages or messages[0]['role'] != 'system' -%}
<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>
{%- endif -%}
{%- for message in messages -%}
{%- set role = message['role'] -%}
{%- if role in ('user', 'assistant') -%}<|im_{{ role }}|>{%- else -%}<|im_system|>{%- endif -%}
{{ message.get('name') or role }}<|im_middle|>
{%- if role == 'tool' -%}{{ '## Return of ' ~ message['tool_call_id'] ~ '\\n' }}{%- endif -%}
{%- set content = message.get('content') -%}
{%- if content is string -%}{{ content }}
{%- elif content -%}
{%- for part in content -%}{{ part if part is string else part['text'] }}{%- endfor -%}
{%- endif -%}
{%- if message.get('tool_calls') -%}
<|tool_calls_section_begin|>
{%- for call in message['tool_calls'] -%}
{%- set arguments = call['function']['arguments'] -%}
<|tool_call_begin|>{{ call['id'] }}<|tool_call_argument_begin|>
{{- arguments if arguments is string else arguments | tojson -}}
<|tool_call_end|>
{%- endfor -%}
<|tool_calls_section_end|>
{%- endif -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""


def merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two tokens that each longer token is made of, in the order of ranks.

    A token that its own bytes never become has none: text reaches it only where it is a whole
    piece, which readers with `ignore_merges` take as it is.
    """
    found = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1 and (pair := _last_pair(token, ranks)):
            found.append(pair)
    return found


def _last_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """What byte pair encoding has of a token's bytes just before they are one; None: never that."""
    parts = [token[i : i + 1] for i in range(len(token))]
    joined = [ranks.get(a + b) for a, b in itertools.pairwise(parts)]
    while len(parts) > 2:
        best, at = None, 0
        for i, rank in enumerate(joined):
            if rank is not None and (best is None or rank < best):
                best, at = rank, i
        if best is None:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del joined[at]
        if at:
            joined[at - 1] = ranks.get(parts[at - 1] + parts[at])
        if at < len(joined):
            joined[at] = ranks.get(parts[at] + parts[at + 1])
    return (parts[0], parts[1]) if len(parts) == 2 else None


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a `tokenizer.json` that gives the same ids.

    Nothing is added to a text, as `Tokenizer.encode` adds nothing.
    """
    char = {byte: letter for letter, byte in printable_bytes().items()}

    def spell(token):
        return "".join(char[byte] for byte in token)

    ranks = tokenizer.ranks
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id_, **_added(name)} for name, id_ in sorted(tokenizer.specials.items(), key=_id)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                _byte_level(),
            ],
        },
        "post_processor": None,
        "decoder": _byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # as tiktoken: a piece that is a token is that token
            "vocab": {spell(token): rank for token, rank in sorted(ranks.items(), key=_id)},
            "merges": [[spell(a), spell(b)] for a, b in merges(ranks)],
        },
    }


def tokenizer_config(tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    """The content of a `tokenizer_config.json` for it.

    Args:
        tokenizer: of the model.
        context: its longest, in tokens.
    """
    names = {id_: name for name, id_ in tokenizer.specials.items()}
    return {
        "added_tokens_decoder": {
            str(id_): _added(name) for name, id_ in sorted(tokenizer.specials.items(), key=_id)
        },
        "bos_token": names[tokenizer.bos],
        "eos_token": names[tokenizer.eos],
        "pad_token": names[tokenizer.pad],
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a `generation_config.json`: what begins, ends and fills a text."""
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": list(tokenizer.stops),
        "pad_token_id": tokenizer.pad,
    }


def _id(item: tuple[Any, int]) -> int:
    return item[1]


def _added(name: str) -> dict[str, Any]:
    return {
        "content": name,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": not name.startswith(KEPT),
    }


def _byte_level() -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
