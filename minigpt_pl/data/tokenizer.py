"""Text to token ids and back: characters, or byte pairs merged over lines. JSON in, JSON out, and a hash of it.

Knows no files; reading and splitting are in `text`, what is kept of a whole text in `tokens`.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from itertools import chain
from typing import ClassVar

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import models, pre_tokenizers, trainers

from minigpt_pl.data.corpus import code_points
from minigpt_pl.runtime.errors import UserError

MAX_LINE_CHARACTERS = 1024
"""Characters after which a line is cut for byte pairs: learning merges takes the square of a line's length."""


class Tokenizer:
    """What both kinds share; a token is always a string of whole characters.

    Attributes:
        vocabulary: The string of each token id.
    """

    kind: ClassVar[str]
    vocabulary: list[str]

    def encode_chunks(self, texts: Iterable[str]) -> Iterator[NDArray[np.integer]]:
        """Token ids, of `dtype`, of one text that comes in pieces; where it is cut into them makes no difference.

        Raises:
            InputError: If the text has characters that the vocabulary lacks; names them.
        """
        raise NotImplementedError

    def encode(self, text: str) -> NDArray[np.integer]:
        """Token ids of a text.

        Raises:
            InputError: As `encode_chunks`.
        """
        return np.concatenate([np.empty(0, self.dtype), *self.encode_chunks([text])])

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids to continue; an empty prompt is a newline, or where the vocabulary has none its first token."""
        start = "\n" if "\n" in self.vocabulary else self.vocabulary[0]
        return self.encode(prompt or start).tolist()

    def decode(self, ids: list[int]) -> str:
        return "".join([self.vocabulary[i] for i in ids])

    def dump(self) -> str:
        """The tokenizer as canonical JSON, which `load` reads."""
        raise NotImplementedError

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.dump().encode()).hexdigest()

    @cached_property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smallest that holds every id, and one more that is none."""
        return np.min_scalar_type(len(self.vocabulary))

    @cached_property
    def token_lengths(self) -> NDArray[np.int64]:
        """Characters and UTF-8 bytes of each token, (V, 2)."""
        return np.array([(len(token), len(token.encode())) for token in self.vocabulary], np.int64)

    def check_known(self, unknown: set[str]) -> None:
        if unknown:
            names = " ".join(repr(c) for c in sorted(unknown)[:10]) + (" ..." if len(unknown) > 10 else "")
            raise UserError(f"the model never saw {names}: leave out these characters")


class CharTokenizer(Tokenizer):
    """One token a character, numbered by code point.

    Args:
        alphabet: The characters, in any order.
    """

    kind = "char"

    def __init__(self, alphabet: str):
        self.vocabulary = sorted(set(alphabet))
        points = code_points("".join(self.vocabulary))
        self.unknown = len(points)
        self.table = np.full(points[-1] + 2, self.unknown, self.dtype)  # its last place is for all that lies beyond
        self.table[points] = np.arange(len(points))

    def encode_chunks(self, texts: Iterable[str]) -> Iterator[NDArray[np.integer]]:
        for text in texts:
            ids = self.table.take(code_points(text), mode="clip")
            if ids.max(initial=0) == self.unknown:
                self.check_known(set(text) - set(self.vocabulary))
            yield ids

    def dump(self) -> str:
        return json.dumps({"kind": self.kind, "alphabet": "".join(self.vocabulary)}, sort_keys=True)


class BPETokenizer(Tokenizer):
    """Byte-pair encoding (Sennrich et al., arXiv 1508.07909) over characters; no merge crosses a line's end.

    Args:
        vocabulary: The tokens, characters first.
        merges: Pairs of tokens that become one, in the order in which they were learned.
        longest: Characters after which a line is cut.
    """

    kind = "bpe"

    def __init__(self, vocabulary: list[str], merges: list[tuple[str, str]], longest: int = MAX_LINE_CHARACTERS):
        self.vocabulary, self.merges, self.longest = vocabulary, merges, longest
        self.alphabet = {token for token in vocabulary if len(token) == 1}
        ids = {token: i for i, token in enumerate(vocabulary)}
        self.library = tokenizers.Tokenizer(models.BPE(ids, merges))
        self.library.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(line_pattern(longest)), "isolated")

    @classmethod
    def train(cls, alphabet: str, texts: Iterable[str], vocab_size: int, min_pair_freq: int) -> "BPETokenizer":
        """Learns merges.

        Args:
            alphabet: Every character of the whole text, the first tokens.
            texts: The text to learn merges from, in pieces.
            vocab_size: Most tokens in the vocabulary.
            min_pair_freq: A pair seen less often is not merged.

        Raises:
            InputError: If the alphabet alone is larger than vocab_size.
        """
        if vocab_size < len(alphabet):
            raise UserError(
                f"data.bpe_vocab_size is {vocab_size}, but the text has {len(alphabet)} distinct characters: "
                f"give at least {len(alphabet)}"
            )
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_pair_freq,
            initial_alphabet=sorted(alphabet),
            special_tokens=[],
            show_progress=False,
        )
        untrained = cls(sorted(alphabet), [])
        untrained.library.train_from_iterator(iter_lines(texts, untrained.longest), trainer)
        learned = json.loads(untrained.library.to_str())["model"]
        vocabulary = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
        return cls(vocabulary, [(left, right) for left, right in learned["merges"]])

    def encode_chunks(self, texts: Iterable[str]) -> Iterator[NDArray[np.integer]]:
        for batch in iter_lines(texts, self.longest):
            self.check_known(set("".join(batch)) - self.alphabet)  # the library would leave them out
            encoded = self.library.encode_batch_fast(batch, add_special_tokens=False)
            yield np.fromiter(chain.from_iterable(line.ids for line in encoded), self.dtype)

    def dump(self) -> str:
        definition = {"vocabulary": self.vocabulary, "merges": self.merges, "longest": self.longest}
        return json.dumps({"kind": self.kind} | definition, sort_keys=True)


def line_pattern(longest: int) -> str:
    """A regular expression for a line with its newline, or as much of a longer one."""
    return rf"[^\n]{{0,{longest - 1}}}\n|[^\n]{{1,{longest}}}"


def iter_lines(texts: Iterable[str], longest: int) -> Iterator[list[str]]:
    """The lines of a text that comes in pieces, each with its newline; one longer than `longest` is cut."""
    pattern, rest = re.compile(line_pattern(longest)), ""
    for text in texts:
        found = pattern.findall(rest + text)
        rest = found.pop() if found and not found[-1].endswith("\n") else ""  # it may go on
        yield found
    yield [rest]


@lru_cache(maxsize=2)
def load_tokenizer(dumped: str, sha256: str | None = None) -> Tokenizer:
    """The tokenizer that `dump` wrote.

    Raises:
        InputError: If it is not the one of that hash.
    """
    if sha256 is not None and hashlib.sha256(dumped.encode()).hexdigest() != sha256:
        raise UserError("the checkpoint's tokenizer differs from its hash: the file is damaged, give another")
    saved = json.loads(dumped)
    if saved["kind"] == CharTokenizer.kind:
        return CharTokenizer(saved["alphabet"])
    assert saved["kind"] == BPETokenizer.kind, saved["kind"]
    return BPETokenizer(saved["vocabulary"], [(left, right) for left, right in saved["merges"]], saved["longest"])
