"""From text to token ids as the model was trained: what the tokenizer puts before a text, what ends one, and chats."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allocator.blocks.hf_model import open_tokenizer
from allocator.contract.errors import InputError
from allocator.model.hf_config import read_config
from allocator.model.shape import read_shape

__all__ = ["TextTokenizer", "added_before"]


@dataclass(frozen=True)
class TextTokenizer:
    """The tokenizer of a model folder.

    prefix: the ids that it puts before every text (BOS of Gemma and Llama; none of Qwen). separator: its EOS, if any.
    rows: how many tokens the embedding has.
    """

    folder: Path
    prefix: list[int]
    separator: list[int]
    rows: int
    _tokenizer: Any

    @classmethod
    def of(cls, folder: Path) -> "TextTokenizer":
        """Raises InputError for a folder without a tokenizer that can be used."""
        tokenizer = open_tokenizer(folder)
        separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        shape = read_shape(read_config(folder))
        rows = next(kind.shape[0] for kind in shape.modules if kind.role == "embedding")
        return cls(folder, added_before(tokenizer), separator, rows, tokenizer)

    def ids(self, text: str) -> list[int]:
        """The ids of `text` alone. Raises InputError for a token that the embedding has no row for."""
        found: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        highest = max(found, default=0)
        if highest >= self.rows:
            raise InputError(
                f"{self.folder}: the text has the token {self._tokenizer.convert_ids_to_tokens(highest)!r}, number "
                f"{highest}, and the embedding {self.rows} rows; the tokenizer is not the model's: take that of the "
                "original, or give the embedding a row for each token (resize_token_embeddings of transformers)"
            )
        return found

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """A chat as text by the model's own template, without the BOS and EOS that every text is given.

        Raises ValueError with the reason where there is no template, or it refuses the chat.
        """
        if not self._tokenizer.chat_template:
            raise ValueError(
                "it is a chat, and the model has no chat template; give plain text, or put the chat_template.jinja of "
                "its instruction-tuned version into the model folder"
            )
        try:
            text: str = self._tokenizer.apply_chat_template(list(messages), tokenize=False)
        except Exception as error:  # templates raise what they like
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"the model's chat template refuses it ({reason}); change or leave out this chat"
            ) from None
        if self.prefix:
            text = text.removeprefix(self._tokenizer.decode(self.prefix))
        if self.separator and text.rstrip().endswith(self._tokenizer.eos_token):
            text = text.rstrip().removesuffix(self._tokenizer.eos_token)
        return text


def added_before(tokenizer: Any) -> list[int]:
    """The ids that `tokenizer` puts before every text."""
    bare, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    places = range(len(full) - len(bare) + 1) if bare else ()
    return next((list(full[:at]) for at in places if full[at : at + len(bare)] == bare), [])
