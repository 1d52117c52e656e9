"""A sentencepiece vocabulary in which any text survives encoding and decoding unchanged.

- Byte-pair encoding, identity normalisation, byte fallback, newline as a piece of its own.
- `<|endoftext|>` is a control symbol: it stands before and after every story, and no text can produce it.
"""

import io
import re
from pathlib import Path

import sentencepiece

from blm_core import END_OF_TEXT
from blm_core.files import sha256, written_aside

# sentencepiece writes a space as this character, so the character itself is encoded as its three bytes.
SPACE_MARK = "\u2581"


class TokenizerError(ValueError):
    """A vocabulary that cannot be learned or loaded."""


class Tokenizer:
    """A learned vocabulary. `eot` is the id of `<|endoftext|>`."""

    def __init__(self, path: Path):
        """Raises TokenizerError where `path` is not a vocabulary made by `train`."""
        self.path = Path(path)
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (OSError, RuntimeError) as error:
            raise TokenizerError(f"{path} is not a sentencepiece model: {error}") from error
        self.eot = self._pieces.piece_to_id(END_OF_TEXT)
        if not self._pieces.is_control(self.eot):
            raise TokenizerError(f"{path} has no control symbol {END_OF_TEXT}; it was not made by this project.")
        self._space_mark = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]

    def __len__(self) -> int:
        return self._pieces.get_piece_size()

    @property
    def hash(self) -> str:
        return sha256(self.path)[:16]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without `<|endoftext|>`."""
        text.encode()  # raises UnicodeEncodeError for half a surrogate pair, and names the place; sentencepiece does not
        first, *rest = (self._pieces.encode(part) for part in text.split(SPACE_MARK))
        return first + [token for part in rest for token in (*self._space_mark, *part)]

    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens`; `<|endoftext|>` is silent, and bytes that are not UTF-8 become U+FFFD."""
        return self._pieces.decode([int(token) for token in tokens])

    def piece(self, token: int) -> str:
        return self._pieces.id_to_piece(int(token))

    def score(self, token: int) -> float:
        return self._pieces.get_score(int(token))

    def is_normal(self, token: int) -> bool:
        """Whether `token` was learned: no byte, no control symbol, no newline."""
        special = (self._pieces.is_byte, self._pieces.is_control, self._pieces.is_unknown)
        return not any(kind(int(token)) for kind in special) and self.piece(token) != "\n"


def train(stories, path: Path, vocab_size: int) -> Tokenizer:
    """Learn `vocab_size` pieces from an iterable of stories and write them to `path`.

    Raises TokenizerError where the stories do not yield that many pieces, or need more; it names the bound.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(stories),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=1.0,
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=-1,
            eos_id=1,
            eos_piece=END_OF_TEXT,
            pad_id=-1,
            max_sentence_length=1 << 20,
            num_threads=1,  # with more, ties may be broken differently from run to run
            minloglevel=2,
        )
    except RuntimeError as error:
        # sentencepiece states the bound that the size breaks, below or above
        most, least = (re.search(bound, str(error)) for bound in (r"too high.*<= (\d+)", r"required_chars\. \d+ vs (\d+)"))
        why = f"at most {most[1]}" if most else f"at least {least[1]}" if least else error
        raise TokenizerError(f"{vocab_size} pieces cannot be learned from these stories: {why}") from error
    with written_aside(path) as aside:
        aside.write_bytes(model.getvalue())
    return Tokenizer(path)
