"""Clean one story: repair what is broken, say why what cannot be repaired is dropped.

- `repair` makes the text that the model learns: printable ASCII, the six typographic marks that the official files hold,
  single newlines between paragraphs. What the official files have, such as a space before a line end, stays.
- `normalise` folds a text further, to printable ASCII and white space without meaning, so that copies can be compared.
"""

import re
import unicodedata
from functools import partial

from blm_core.files import text_sha256

REPAIRS = ("mojibake repaired", "characters folded", "white space tidied")
DROPS = (
    "no story",
    "other source",
    "empty",
    "too short",
    "cut off",
    "foreign characters",
    "repeats another story",
    "near a held-out story",
)
TYPOGRAPHY = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4`", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2212", "-"),
        "\u2026": "...",
        "\u2044": "/",  # of fractions
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", ""),
    }
)
KEPT = "\u2018\u2019\u201c\u201d\u2013\u2014"  # curly quotes and dashes
NOT_KEPT = re.compile(f"[^{KEPT}]+")
DASH = re.compile(" *[\u2013\u2014\u2015]+ *")
NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
# A closing curly quote, read in the wrong encoding, often loses its last, invisible character.
HALF_QUOTE = re.compile("\u00e2\u20ac(?![^\x00-\x7f])")
CLOSED = re.compile(r"[.!?][\"')\u2019\u201d]*$")
FOREIGN = re.compile(rf"[^\n\x20-\x7e{KEPT}]")
WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


def repair_mojibake(text: str) -> str:
    """Undo UTF-8 that was read as Windows-1252, run by run, where the run turns back into valid UTF-8; folded."""

    def undo(match: re.Match) -> str:
        try:
            raw = b"".join(_windows_1252(c) for c in match[0])
            return fold(raw.decode("utf-8"))
        except (UnicodeEncodeError, UnicodeDecodeError):
            return match[0]

    if text.isascii():
        return text
    return HALF_QUOTE.sub('"', NOT_ASCII.sub(undo, text))


def _windows_1252(character: str) -> bytes:
    try:
        return character.encode("cp1252")
    except UnicodeEncodeError:  # five bytes have no meaning in Windows-1252 and are passed through
        return character.encode("latin-1")


def fold(text: str) -> str:
    """Typographic characters and accents as ASCII; other scripts are left as they are."""
    text = text.translate(TYPOGRAPHY)
    if text.isascii():
        return text
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return DASH.sub(" - ", text.translate(TYPOGRAPHY))  # again: some characters decompose into typographic ones


def fold_but_kept(text: str) -> str:
    """As `fold`, but the marks in KEPT stay."""
    return text if text.isascii() else NOT_KEPT.sub(lambda run: fold(run[0]), text)


def tidy_white_space(text: str, line_ends: bool = False) -> str:
    """One space between words, one newline between paragraphs, none at the ends; with `line_ends` a space before a newline."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = (" ".join(line.split()) + " " * (line_ends and line[-1:].isspace()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line.strip()).strip()


def repair(text: str) -> tuple[str, list[str]]:
    """The text to learn from, and the names of the REPAIRS that changed it."""
    done = []
    for name, step in zip(REPAIRS, (repair_mojibake, fold_but_kept, partial(tidy_white_space, line_ends=True)), strict=True):
        repaired = step(text)
        if repaired != text:
            done.append(name)
        text = repaired
    return text, done


def normalise(text: str) -> str:
    """`text` in printable ASCII, with white space that says nothing left out."""
    return tidy_white_space(fold(repair_mojibake(text)))


def reason_to_drop(text: str, min_characters: int) -> str | None:
    """Why a repaired story is not used, as one of DROPS, or None."""
    if not text:
        return "empty"
    if FOREIGN.search(text):
        return "foreign characters"
    if len(text) < min_characters:
        return "too short"
    if not CLOSED.search(text):
        return "cut off"
    return None


def words(text: str) -> list[str]:
    """Lower-case words, without punctuation."""
    return WORD.findall(text.lower().replace("\u2019", "'"))


def story_key(text: str) -> int:
    """64 bits that name a story whatever its case, punctuation and white space."""
    return int(text_sha256(" ".join(words(text)))[:16], 16)


def is_held_out(key: int, share: float) -> bool:
    """Whether the story named by `key` belongs to the validation set: no order and no machine has a say in it."""
    return key < int(share * 2**64)
