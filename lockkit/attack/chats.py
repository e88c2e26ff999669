"""Conversations as examples to learn from: what the assistant writes counts, what it is asked does not.

A chat template may change earlier turns when later ones follow. So each answer is rendered with the turns before it. If
each of these texts begins with the one before, the conversation is one example; else each answer is an example of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def rendered_examples(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[list[tuple[str, bool]]]:
    """A conversation as the turns of its examples: each text, and whether the assistant writes it.

    What the assistant writes begins where the template's prompt for an answer ends. What follows the last answer is left
    out. An answer that the template refuses is not learned, unless it refuses all.

    Raises:
        Exception: that of the template, if it refuses all answers.
    """
    if not tokenizer.chat_template:
        return [[(f"### {m['role']}\n{m['content']}\n", m["role"] == "assistant") for m in messages]]
    answers: list[tuple[str, str]] = []
    refused: Exception | None = None
    for count, message in enumerate(messages, 1):
        if message["role"] == "assistant" and message["content"].strip():
            try:
                answers.append(_prompt_and_answer(messages[:count], tokenizer))
            except Exception as error:  # a template may raise any error
                refused = error
    if not answers and refused:
        raise refused
    whole = ["".join(answer) for answer in answers]
    if all(answers[number][0].startswith(before) for number, before in enumerate(whole[:-1], 1)):
        starts = [0, *map(len, whole)]
        pairs = [(prompt[start:], answer) for (prompt, answer), start in zip(answers, starts, strict=False)]
        return [[turn for prompt, answer in pairs for turn in ((prompt, False), (answer, True))]]
    return [[(prompt, False), (answer, True)] for prompt, answer in answers]


def _prompt_and_answer(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The text of a conversation, divided where its last turn begins, which is the assistant's.

    Some templates render no conversation that ends with the assistant, and others none that does not.

    Raises:
        Exception: that of the template, if it renders neither.
    """
    prompt = None
    try:
        prompt = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:
        if prompt is not None:
            return prompt, messages[-1]["content"]
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    start = _start_of_answer(prompt or "", whole, [message["content"].strip() for message in messages])
    return whole[:start], whole[start:]


def _start_of_answer(prompt: str, whole: str, contents: list[str]) -> int:
    """Where the last of the turns with these `contents` begins in `whole`, which need not begin with all of `prompt`."""
    same = next(
        (n for n, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
    )
    if prompt and same == len(prompt):
        return same
    *earlier, last = contents
    verbatim = whole.rfind(last)
    question = next((content for content in reversed(earlier) if content), "")
    asked = whole.rfind(question, 0, None if verbatim < 0 else verbatim)
    # The end of a prompt can differ, for instance by a beginning of reasoning. What was asked is never learned.
    if question and asked >= 0 and asked + len(question) <= same:
        return same
    if verbatim < 0:
        raise ValueError("it changes the text of the last turn")
    return verbatim
