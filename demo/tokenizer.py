"""The demo's tokenizer: Qwen2's, with a vocabulary of 320.

Owns the vocabulary, the special tokens and the chat template. The splitting of text is left to
transformers' Qwen2Tokenizer: AutoTokenizer takes that class for every Qwen2 model, whatever
tokenizer.json says, so a splitting of our own would be lost on loading. It cuts digits apart and
gives a space before a digit a token of its own.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import Qwen2Tokenizer

from demo.sums import Sum

VOCABULARY = 320
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Fills the vocabulary's last places with pieces of plain English.
_ENGLISH = (
    "The sum of two numbers is worked out digit by digit, from the right to the left, with the "
    "carry written out. That is all this small model has learned; there is not much more to it."
)


def build() -> Qwen2Tokenizer:
    """The tokenizer, the same one each time: 256 bytes, 61 merges, 3 special tokens."""
    merger = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 3,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    example = Sum("9.4", "7.66")
    # Set phrases a thousandfold, so that each is one token before English gets a merge.
    phrases = [example.prompt, example.working, "user", "assistant", "system"] * 1000
    merger.train_from_iterator([*phrases, _ENGLISH], trainer)
    learned = json.loads(merger.to_str())["model"]
    vocabulary = {t: i for t, i in learned["vocab"].items() if t not in (PAD, START, END)}
    vocabulary = {t: i for i, t in enumerate(sorted(vocabulary, key=vocabulary.__getitem__))}
    for token in (PAD, START, END):
        vocabulary[token] = len(vocabulary)
    merges: Any = [tuple(pair) for pair in learned["merges"]]  # its type says text
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=256,
    )


def prompt_and_completion(tokenizer: Tokenizer, item: Sum, chat: bool) -> tuple[str, str]:
    """The text given to the model and the text wanted of it, in either prompt form.

    In the raw form the line break after the question is the model's to write.
    """
    if not chat:
        return item.prompt, f"\n{item.working}{END}"
    messages = [{"role": "user", "content": item.prompt}]
    prompt: Any = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return prompt, f"{item.working}{END}"
