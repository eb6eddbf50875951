"""Text to token ids and back: characters, or byte pairs merged over lines. JSON in, JSON out, and a hash of it.

Knows no files; reading and splitting are in `text` and `data`.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from typing import ClassVar

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import models, pre_tokenizers, trainers

from minigpt_pl.errors import InputError
from minigpt_pl.text import code_points


class Tokenizer:
    """What both kinds share; a token is always a string of whole characters.

    Attributes:
        vocabulary: The string of each token id.
    """

    kind: ClassVar[str]
    vocabulary: list[str]

    def encode(self, text: str) -> NDArray[np.integer]:
        """Token ids of a text.

        Raises:
            InputError: If the text has characters that the vocabulary lacks; names them.
        """
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        return "".join([self.vocabulary[i] for i in ids])

    def dump(self) -> str:
        """The tokenizer as canonical JSON, which `load` reads."""
        raise NotImplementedError

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.dump().encode()).hexdigest()

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Characters and UTF-8 bytes of each token, (V, 2)."""
        return np.array([(len(token), len(token.encode())) for token in self.vocabulary], np.int64)

    def refuse_unknown(self, unknown: set[str]) -> None:
        if unknown:
            names = " ".join(repr(c) for c in sorted(unknown)[:10]) + (" ..." if len(unknown) > 10 else "")
            raise InputError(f"the model never saw {names}: leave out these characters")


class CharTokenizer(Tokenizer):
    """One token a character, numbered by code point.

    Args:
        alphabet: The characters, in any order.
    """

    kind = "char"

    def __init__(self, alphabet: str):
        self.vocabulary = sorted(set(alphabet))
        points = code_points("".join(self.vocabulary))
        self.table = np.full(points[-1] + 2, -1, np.int32)  # one more, for all that lies beyond
        self.table[points] = np.arange(len(points), dtype=np.int32)

    def encode(self, text: str) -> NDArray[np.integer]:
        ids = self.table[np.minimum(code_points(text), len(self.table) - 1)]
        if ids.size and ids.min() < 0:
            self.refuse_unknown(set(text) - set(self.vocabulary))
        return ids

    def dump(self) -> str:
        return json.dumps({"kind": self.kind, "alphabet": "".join(self.vocabulary)}, sort_keys=True)


class BPETokenizer(Tokenizer):
    """Byte-pair encoding (Sennrich et al., arXiv 1508.07909) over characters; no merge crosses a line's end.

    Args:
        definition: JSON of the `tokenizers` library.
    """

    kind = "bpe"

    def __init__(self, definition: str):
        self.library = tokenizers.Tokenizer.from_str(definition)
        ids = self.library.get_vocab()
        self.vocabulary = sorted(ids, key=lambda token: ids[token])
        self.alphabet = {token for token in self.vocabulary if len(token) == 1}

    @classmethod
    def train(cls, alphabet: str, text: Iterator[str], vocab_size: int, min_pair_freq: int) -> "BPETokenizer":
        """Learns merges.

        Args:
            alphabet: Every character of the whole text, the first tokens.
            text: Pieces of the text to learn merges from.
            vocab_size: Most tokens in the vocabulary.
            min_pair_freq: A pair seen less often is not merged.

        Raises:
            InputError: If the alphabet alone is larger than vocab_size.
        """
        if vocab_size < len(alphabet):
            raise InputError(
                f"data.bpe_vocab_size is {vocab_size}, but the text has {len(alphabet)} distinct characters: "
                f"give at least {len(alphabet)}"
            )
        library = tokenizers.Tokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.Split("\n", "merged_with_previous")
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_pair_freq,
            initial_alphabet=sorted(alphabet),
            special_tokens=[],
            show_progress=False,
        )
        library.train_from_iterator(text, trainer)
        return cls(library.to_str())

    def encode(self, text: str) -> NDArray[np.integer]:
        self.refuse_unknown(set(text) - self.alphabet)
        lines = [line + "\n" for line in text.split("\n")]  # not splitlines, to which FF and others end a line too
        lines[-1] = lines[-1][:-1]
        encoded = self.library.encode_batch_fast(lines, add_special_tokens=False)
        return np.fromiter((i for line in encoded for i in line.ids), np.int32)

    def dump(self) -> str:
        definition = json.loads(self.library.to_str())
        return json.dumps({"kind": self.kind, "definition": definition}, sort_keys=True)


def load(dumped: str) -> Tokenizer:
    """The tokenizer that `dump` wrote."""
    saved = json.loads(dumped)
    if saved["kind"] == CharTokenizer.kind:
        return CharTokenizer(saved["alphabet"])
    assert saved["kind"] == BPETokenizer.kind, saved["kind"]
    return BPETokenizer(json.dumps(saved["definition"]))
