"""The tokenizer of the shipped text models: one token per character."""

from __future__ import annotations

import string
from typing import Any

SPECIALS = ("<pad>", "<end>", "<unk>", "<system>", "<user>", "<assistant>")
CHARACTERS = "\n " + string.digits + string.ascii_letters + string.punctuation
TEMPLATE = (
    "{% for message in messages %}{{ '<user>' if message.role == 'tool' else '<' + message.role + '>' }}{{ "
    "message.content }}"
    "{% if message.role == 'assistant' %}<end>{% endif %}{% endfor %}{% if add_generation_prompt "
    "%}<assistant>{% endif %}"
)


def character_tokenizer() -> Any:
    """A PreTrainedTokenizerFast for printable ASCII and the newline. Any other character is <unk>.

    A turn consists of its role token and its text. An assistant turn ends with <end>, the end-of-text token.
    A tool message has the role token of a user.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((*SPECIALS, *CHARACTERS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=["<system>", "<user>", "<assistant>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=512,
    )
