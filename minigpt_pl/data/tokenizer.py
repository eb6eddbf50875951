"""Text to token ids and back: characters, or byte pairs merged within or across lines; saved as JSON with a hash.

It opens no files. How a text is read and split is in `corpus`, how its token ids are cached in `token_cache`.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
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

MAX_LINE_CHARACTERS = 1024  # bpe cuts longer lines: the time to learn merges grows with the square of their length


class Tokenizer(ABC):
    """Base of both tokenizers; a token is always a string of whole characters."""

    kind: ClassVar[str]
    vocabulary: list[str]
    """The string of each token id."""

    @abstractmethod
    def encode_chunks(self, chunks: Iterable[str]) -> Iterator[NDArray[np.integer]]:
        """Token ids, of `dtype`, of one text that is given in chunks; the chunks' boundaries do not matter.

        Raises:
            UserError: If the text has characters that are not in the vocabulary; names them.
        """

    def encode(self, text: str) -> NDArray[np.integer]:
        """Token ids of a text; raises as `encode_chunks`."""
        return np.concatenate([np.empty(0, self.dtype), *self.encode_chunks([text])])

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids to continue; an empty prompt is a newline, or the first token if there is no newline."""
        start = "\n" if "\n" in self.vocabulary else self.vocabulary[0]
        return self.encode(prompt or start).tolist()

    def decode(self, ids: list[int]) -> str:
        return "".join([self.vocabulary[i] for i in ids])

    @abstractmethod
    def dump(self) -> str:
        """The tokenizer as canonical JSON, which `load_tokenizer` reads."""

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.dump().encode()).hexdigest()

    @cached_property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smallest type that holds every id and the vocabulary size."""
        return np.min_scalar_type(len(self.vocabulary))

    @cached_property
    def token_lengths(self) -> NDArray[np.int64]:
        """Characters and UTF-8 bytes of each token, (V, 2)."""
        return np.array([(len(token), len(token.encode())) for token in self.vocabulary], np.int64)

    def _check_known(self, unknown: set[str]) -> None:
        if unknown:
            names = " ".join(repr(c) for c in sorted(unknown)[:10]) + (" ..." if len(unknown) > 10 else "")
            raise UserError(f"the model never saw {names}", remedy="leave out these characters")


class CharTokenizer(Tokenizer):
    """One token for each character of `alphabet`, numbered by code point."""

    kind = "char"

    def __init__(self, alphabet: str):
        self.vocabulary = sorted(set(alphabet))
        points = code_points("".join(self.vocabulary))
        self.unknown_id = len(points)
        self.table = np.full(points[-1] + 2, self.unknown_id, self.dtype)  # the last entry: all larger code points
        self.table[points] = np.arange(len(points))

    def encode_chunks(self, chunks: Iterable[str]) -> Iterator[NDArray[np.integer]]:
        for chunk in chunks:
            ids = self.table.take(code_points(chunk), mode="clip")
            if ids.max(initial=0) == self.unknown_id:
                self._check_known(set(chunk) - set(self.vocabulary))
            yield ids

    def dump(self) -> str:
        return json.dumps({"kind": self.kind, "alphabet": "".join(self.vocabulary)}, sort_keys=True)


class BPETokenizer(Tokenizer):
    """Byte-pair encoding (Sennrich et al., arXiv 1508.07909) over characters.

    Characters are the first tokens. `merges` has the pairs of tokens that become one, in the order of their training:
    the most frequent pair, and of equally frequent ones that of the lowest ids. Overlapping pairs count (aaa has two).

    No merge crosses the end of a line, nor the end of `max_line` characters. With `max_line` None a text is one
    sequence, as in the reference report. Its program skips a pair that spells an existing token; here that is merged
    into this token.
    """

    kind = "bpe"

    def __init__(
        self, vocabulary: list[str], merges: list[tuple[str, str]], max_line: int | None = MAX_LINE_CHARACTERS
    ):
        self.vocabulary, self.merges, self.max_line = vocabulary, merges, max_line
        self.alphabet = {token for token in vocabulary if len(token) == 1}
        ids = {token: i for i, token in enumerate(vocabulary)}
        self.library = tokenizers.Tokenizer(models.BPE(ids, merges))
        if max_line is not None:
            self.library.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(line_pattern(max_line)), "isolated")

    @classmethod
    def train(
        cls, alphabet: str, chunks: Iterable[str], vocab_size: int, min_pair_freq: int,
        max_line: int | None = MAX_LINE_CHARACTERS,
    ) -> "BPETokenizer":  # fmt: skip
        """Learns merges from a text; `alphabet` has every character that must become a token.

        Raises:
            UserError: If the alphabet alone is larger than vocab_size.
        """
        if vocab_size < (least := len(alphabet)):
            problem, remedy = f"the text has {least} distinct characters", f"use at least {least}"
            raise UserError(problem, option="data.bpe_vocab_size", value=vocab_size, remedy=remedy)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, min_frequency=min_pair_freq, initial_alphabet=sorted(alphabet),
            special_tokens=[], show_progress=False,
        )  # fmt: skip
        untrained = cls(sorted(alphabet), [], max_line)
        untrained.library.train_from_iterator(iter_lines(chunks, max_line), trainer)
        trained = json.loads(untrained.library.to_str())["model"]
        vocabulary = sorted(trained["vocab"], key=trained["vocab"].get)
        return cls(vocabulary, [(a, b) for a, b in trained["merges"]], max_line)

    def encode_chunks(self, chunks: Iterable[str]) -> Iterator[NDArray[np.integer]]:
        for lines in iter_lines(chunks, self.max_line):
            self._check_known(set("".join(lines)) - self.alphabet)  # the library would leave them out
            encoded = self.library.encode_batch_fast(lines, add_special_tokens=False)
            yield np.fromiter(chain.from_iterable(line.ids for line in encoded), self.dtype)

    def dump(self) -> str:
        definition = {"vocabulary": self.vocabulary, "merges": self.merges, "longest": self.max_line}
        return json.dumps({"kind": self.kind} | definition, sort_keys=True)


def line_pattern(max_line: int) -> str:
    """A regular expression for a line with its newline, or for the next `max_line` characters of a longer line."""
    return rf"[^\n]{{0,{max_line - 1}}}\n|[^\n]{{1,{max_line}}}"


def max_line_of(pattern: str) -> int:
    """The `max_line` of a `line_pattern`."""
    return int(pattern.rpartition(",")[2].rstrip("}"))


def iter_lines(chunks: Iterable[str], max_line: int | None) -> Iterator[list[str]]:
    """The lines of a text that is given in chunks, each with its newline; lines above `max_line` are cut.

    With `max_line` None, the whole text.
    """
    if max_line is None:
        yield ["".join(chunks)]
        return
    pattern, rest = re.compile(line_pattern(max_line)), ""
    for chunk in chunks:
        lines = pattern.findall(rest + chunk)
        rest = lines.pop() if lines and not lines[-1].endswith("\n") else ""  # the next chunk may continue it
        yield lines
    yield [rest]


@lru_cache(maxsize=2)
def load_tokenizer(definition: str, sha256: str | None = None) -> Tokenizer:
    """The tokenizer that `dump` wrote.

    Raises:
        UserError: If the hash differs.
    """
    if sha256 is not None and hashlib.sha256(definition.encode()).hexdigest() != sha256:
        raise UserError("the checkpoint's tokenizer differs from its hash, so the file is damaged")
    fields = json.loads(definition)
    if fields["kind"] == CharTokenizer.kind:
        return CharTokenizer(fields["alphabet"])
    assert fields["kind"] == BPETokenizer.kind, fields["kind"]
    return BPETokenizer(fields["vocabulary"], [(a, b) for a, b in fields["merges"]], fields["longest"])
