"""Clean one story: repair what is broken, say why what cannot be repaired is dropped.

- `repair` makes the text that the model learns: printable ASCII, the six typographic marks that the official files hold,
  single newlines between paragraphs. What the official files have, such as a space before a line end, stays.
- `normalise` folds a text further, to printable ASCII and white space without meaning, so that copies can be compared.
"""

import re
import unicodedata

from blm_core.files import text_sha256

DROPS = (
    *("no story", "empty", "too short", "cut off", "foreign characters"),
    *("repeats another story", "near a held-out story"),
)
TYPOGRAPHY = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4`", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2212", "-"),
        "\u2044": "/",  # of fractions
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", ""),
    }
)
KEPT = "\u2018\u2019\u201c\u201d\u2013\u2014"  # curly quotes and dashes
NOT_KEPT = re.compile(f"[^{KEPT}]+")
DASH = re.compile(" *[\u2013\u2014\u2015]+ *")
NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
# The byte that each character of a misread text stands for. Windows-1252 gives no meaning to five; readers pass those through.
MISREAD = {chr(b): b for b in range(128, 256)} | {bytes([b]).decode("cp1252", "ignore"): b for b in range(128, 256)}
# A closing curly quote, read in the wrong encoding, often loses its last, invisible character.
HALF_QUOTE = re.compile("\u00e2\u20ac(?![^\x00-\x7f])")
CLOSED = re.compile(r"[.!?][\"')\u2019\u201d]*$")
FOREIGN = re.compile(rf"[^\n\x20-\x7e{KEPT}]")
WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


def repair_mojibake(text: str) -> str:
    """Undo UTF-8 that was read as Windows-1252, run by run, where the run turns back into valid UTF-8; folded."""

    def undo(run: re.Match) -> str:
        try:
            return fold(bytes(MISREAD[c] for c in run[0]).decode("utf-8"))
        except (KeyError, UnicodeDecodeError):
            return run[0]

    return HALF_QUOTE.sub('"', NOT_ASCII.sub(undo, text))


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


def tidy_white_space(text: str) -> str:
    """One space between words, one newline between paragraphs, none at the ends; a space before a newline may stay."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    tidy = (" ".join(line.split()) + " " * line[-1:].isspace() for line in lines)
    return "\n".join(line for line in tidy if line.strip()).strip()


REPAIRS = {"mojibake repaired": repair_mojibake, "characters folded": fold_but_kept, "white space tidied": tidy_white_space}


def repair(text: str) -> tuple[str, list[str]]:
    """The text to learn from, and the names of the REPAIRS that changed it."""
    done = []
    for name, step in REPAIRS.items():
        before, text = text, step(text)
        if text != before:
            done.append(name)
    return text, done


def normalise(text: str) -> str:
    """`text` in printable ASCII, with white space that says nothing left out."""
    return tidy_white_space(fold(repair_mojibake(text))).replace(" \n", "\n")


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
