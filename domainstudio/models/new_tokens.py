"""New words for a text encoder: tokens such as [V] whose embeddings are learned (textual inversion)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from domainstudio.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


class ExtendedEmbedding(nn.Module):
    """An embedding table, frozen, and further rows that are trained (arXiv 2208.01618, section 3).

    Args:
        table: the tokenizer's own words.
        added: the new words' first embeddings, with shape (K, C).
    """

    def __init__(self, table: nn.Embedding, added: Tensor) -> None:
        super().__init__()
        self.table = table
        self.added = nn.Parameter(added.detach().clone().float())

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return embeddings, with shape (N, L, C), of ids, with shape (N, L)."""
        number = self.table.num_embeddings
        known = self.table(input_ids.clamp(max=number - 1))
        new = self.added[(input_ids - number).clamp(min=0)].to(known.dtype)
        return torch.where((input_ids >= number).unsqueeze(-1), new, known)

    def merged(self) -> nn.Embedding:
        """Return one table with all rows."""
        weight = torch.cat([self.table.weight.float(), self.added])
        return nn.Embedding.from_pretrained(weight, freeze=True)  # type: ignore[no-untyped-call, no-any-return]


def add_tokens(tokenizers: Sequence[Any], text_encoders: Sequence[Any], words: Mapping[str, str]) -> None:
    """Add tokens to every text encoder, and train their embeddings.

    Args:
        tokenizers: one for each text encoder.
        text_encoders: the text encoders.
        words: each new token, and the known word whose embedding it begins as.

    Raises:
        ConfigError: a token is known already.
    """
    for tokenizer, encoder in zip(tokenizers, text_encoders, strict=True):
        taken = sorted(set(words) & set(tokenizer.get_vocab()))
        if taken:
            raise ConfigError(f"prompts.new_tokens: the tokenizer knows {taken} already: choose other words")
        table = encoder.get_input_embeddings()
        first = [_mean_embedding(tokenizer, table, word) for word in words.values()]
        tokenizer.add_tokens(list(words))
        encoder.set_input_embeddings(ExtendedEmbedding(table, torch.stack(first)))


@contextmanager
def merged_tokens(text_encoders: Sequence[Any]) -> Iterator[None]:
    """Give the text encoders plain tables in this block, as saved pipelines have them."""
    extended: list[tuple[Any, ExtendedEmbedding]] = []
    for encoder in text_encoders:
        if isinstance(embedding := encoder.get_input_embeddings(), ExtendedEmbedding):
            extended.append((encoder, embedding))
            encoder.set_input_embeddings(table := embedding.merged())
            encoder.config.vocab_size = table.num_embeddings
    try:
        yield
    finally:
        for encoder, embedding in extended:
            encoder.set_input_embeddings(embedding)


def _mean_embedding(tokenizer: Any, table: nn.Embedding, word: str) -> Tensor:
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if not ids:
        raise ConfigError(f"prompts.new_tokens: {word!r} is no word to begin with: name one, such as style")
    return table.weight[ids].mean(dim=0)
