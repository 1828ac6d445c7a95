"""Chat: prompts made with the tokenizer's template, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mor.data.tokenizer import Tokenizer
from mor.files import extra

Message = Mapping[str, str]


class Chat:
    """The chat template of a tokenizer.

    stop_token_ids: the tokens that end a text and the one that the template puts after an answer.
    Raises ValueError if the tokenizer has no template, ImportError if transformers is missing.
    """

    def __init__(self, tokenizer: Tokenizer, *, template: str | None = None) -> None:
        """template: in place of the tokenizer's own."""
        with extra("hf", needed_for="chat"):
            self.theirs = tokenizer.to_transformers()
        self.theirs.chat_template = template or self.theirs.chat_template
        if not self.theirs.chat_template:
            raise ValueError(
                "this checkpoint's tokenizer has no chat template; it was not trained to chat, so "
                "leave out --chat"
            )
        self.tokenizer = tokenizer
        self.stop_token_ids = tuple({*tokenizer.end_ids, *self._end_of_answer()})

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation, up to where the assistant's answer begins.

        messages: role (system, user or assistant) and content of each turn.
        """
        return self.tokenizer.encode(self._render(messages, add_generation_prompt=True))

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        try:
            text: str = self.theirs.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program, and may raise anything
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"the chat template of this tokenizer does not take a conversation of {roles}: "
                f"{error}"
            ) from error
        return text

    def _end_of_answer(self) -> list[int]:
        """The token that follows an answer, not always end-of-text (Llama 3: <|eot_id|>)."""
        marker = "8d1f"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]
        after = self._render(turns, add_generation_prompt=False).rpartition(marker)[2]
        special = {
            i
            for i, token in self.tokenizer.backend.get_added_tokens_decoder().items()
            if token.special
        }
        return [i for i in self.tokenizer.encode(after) if i in special][:1]
