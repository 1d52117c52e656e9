"""Inside the model: where its heads look, what one head is good for, what its layers would already say.

- The model runs as it is and is read through hooks, one story at a time
- Heads are chosen by what they look at, after TinyStories (Eldan and Li 2023, section 5), on other stories than reported
- One causal test: a head is switched off, and the bits that repeated names cost are counted again
- Logit lens: the final norm and the output embedding, applied to the residual stream after every layer (nostalgebraist 2020)

Shapes: T tokens, C d_model, V vocabulary, L layers, H query heads, S stories. Layers and heads count from 0.
"""

import contextlib
import math
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from blm_core.evaluate import Interval, ratio_interval
from blm_core.model import LanguageModel, rotate
from blm_core.tokenizer import SPACE_MARK, Tokenizer

# Patterns are of bytes, as tokens may be parts of a character.
NAME = re.compile(rb"(?<=[a-z,;] )[A-Z][a-z]+")  # capitalised where no sentence begins
WORD = re.compile(rb"[A-Za-z]+")
SPEECH = re.compile(rb'"[^"\n]*"')  # within one paragraph


@dataclass(frozen=True)
class Reading:
    """A text as the model reads it, `<|endoftext|>` first. Arrays are (T,); -1 says that a token belongs to none."""

    tokens: np.ndarray
    pieces: list[str]
    word: np.ndarray  # number of the word
    name: np.ndarray  # number of the name, the same wherever it occurs
    opener: np.ndarray  # for tokens of speech, the position of the mark that opened it

    def repeated_names(self) -> np.ndarray:
        """Which tokens write a name that the story has used before, (T,) of bool."""
        first = dict(zip(self.name[::-1], self.word[::-1], strict=True))
        return np.array([n >= 0 and w > first[n] for n, w in zip(self.name, self.word, strict=True)])


def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", piece := tokenizer.piece(token))
    return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE_MARK, " ").encode()


def shown(tokenizer: Tokenizer, token: int) -> str:
    """A token on its own, for a picture: a word's beginning bare, its continuation behind a hyphen."""
    if token == tokenizer.eot:
        return "(end)"
    piece = _bytes(tokenizer, token).decode(errors="replace").replace("\n", "(newline)")
    return piece.strip() or "(space)" if piece.startswith(" ") or not piece[:1].isalpha() else f"-{piece}"


def read(tokenizer: Tokenizer, text: str, seq_len: int) -> Reading:
    """The first `seq_len` tokens of `text` and what plain rules say of them.

    A name is a capitalised word that stands somewhere in the text where no sentence begins.
    """
    tokens = np.array([tokenizer.eot, *tokenizer.encode(text)][:seq_len])
    raw = [b"", *(_bytes(tokenizer, token) for token in tokens[1:])]
    ends = np.cumsum([len(piece) for piece in raw])
    text = text.encode()
    word, name, speech = labels = np.full((3, len(text)), -1)  # of every byte; of speech, where its opening mark stands
    names = {found: number for number, found in enumerate(sorted(set(NAME.findall(text))))}
    for number, match in enumerate(WORD.finditer(text)):
        word[match.start() : match.end()], name[match.start() : match.end()] = number, names.get(match[0], -1)
    for match in SPEECH.finditer(text):
        speech[match.start() + 1 : match.end() - 1] = match.start()
    of_tokens = [labels[:, end - len(piece) : end].max(1, initial=-1) for piece, end in zip(raw, ends, strict=True)]
    word, name, speech = np.array(of_tokens).T
    opener = np.where(speech >= 0, np.searchsorted(ends, speech, side="right"), -1)
    return Reading(tokens, [piece.decode(errors="replace") for piece in raw], word, name, opener)


@torch.no_grad()
def trace(model: LanguageModel, tokens: np.ndarray) -> tuple[Tensor, Tensor]:
    """Attention (L, H, T, T), query by key, and residual stream (L + 1, T, C), the embedding first, on tokens (T,)."""
    attention, residual = [], []
    future = torch.ones(len(tokens), len(tokens), dtype=torch.bool, device=model.device).triu(1)

    def keep(block, inputs: tuple, output: Tensor) -> None:
        x, cos, sin, *_ = inputs
        residual.extend([output] if residual else [x, output])
        # The model's kernel does not give its weights away: they are computed anew from queries and keys.
        x, attend = block.input_layernorm(x), block.self_attn
        q, k = (y.unflatten(-1, (-1, attend.d_head)).transpose(1, 2) for y in (attend.q_proj(x), attend.k_proj(x)))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin).repeat_interleave(attend.n_heads // attend.n_kv_heads, dim=1)
        scores = q @ k.transpose(-1, -2) / attend.d_head**0.5  # (1, H, T, T)
        attention.append(scores.masked_fill(future, -torch.inf).softmax(-1))

    with contextlib.ExitStack() as hooks:
        for block in model.model["layers"]:
            hooks.enter_context(block.register_forward_hook(keep))
        model(torch.from_numpy(tokens.astype(np.int64))[None].to(model.device))
    return torch.cat(attention), torch.cat(residual)


def looks(reading: Reading) -> dict[str, np.ndarray]:
    """What there is to look at: by kind, for every query (row) the keys (column) that count, (T, T) of bool.

    All but "the token itself" are earlier than the query; names count only where they are another word than its own.
    The query of "earlier uses of the name that comes next" stands right before a name.
    """
    r, T = reading, len(reading.tokens)
    query, key = np.arange(T)[:, None], np.arange(T)[None]
    before, same = key < query, r.tokens[:, None] == r.tokens
    is_name, elsewhere = r.name >= 0, before & (r.word[:, None] != r.word)
    following, its_name = (np.append(column[1:], -1) for column in (r.word, r.name))
    coming = np.where(following != r.word, its_name, -1)  # a name that begins with the next token
    return {
        "the start token": before & (key == 0),
        "the token itself": (key == query) & (query > 0),
        "the token before": key == query - 1,
        "the same token, earlier": before & same,
        "what followed the same token": before & np.roll(same, 1, axis=1) & (key > 0),
        "names": elsewhere & is_name,
        "the same name, earlier": elsewhere & is_name & (r.name[:, None] == r.name),
        "earlier uses of the name that comes next": before & is_name & (coming[:, None] == r.name),
        "quotation marks": before & np.array(['"' in piece for piece in r.pieces]),
        "the mark that opened the speech": key == r.opener[:, None],
    }


@torch.no_grad()
def lens(model: LanguageModel, residual: Tensor) -> Tensor:
    """What the output layer makes of each state of the residual stream (L + 1, T, C): log-probabilities (L + 1, T, V)."""
    return F.linear(model.model["norm"](residual), model.model["embed_tokens"].weight).float().log_softmax(-1)


@dataclass(frozen=True)
class Survey:
    """What was read in every story. Arrays are NumPy's, on the CPU."""

    kinds: tuple[str, ...]
    readings: list[Reading]
    looked: np.ndarray  # (S, kinds, L, H), attention to the keys of a kind, summed over the queries that have any
    evenly: np.ndarray  # (S, kinds), the same for a head that looks at all tokens alike
    queries: np.ndarray  # (S, kinds)
    lens: np.ndarray  # (S, 2, L + 1): final choice foretold, log-probability of the true next token, summed
    predicted: np.ndarray  # (S,), tokens


def survey(model: LanguageModel, tokenizer: Tokenizer, stories: list[str]) -> Survey:
    """Read every story and keep what the tables and figures need."""
    readings, rows = [read(tokenizer, story, model.config.seq_len) for story in stories], []
    for reading in tqdm(readings, desc="reading", unit="story"):
        (attention, residual), kinds, T = trace(model, reading.tokens), looks(reading), len(reading.tokens)
        masks = torch.from_numpy(np.stack(list(kinds.values())))  # (kinds, T, T)
        looked = torch.einsum("lhqk,nqk->nlh", attention.cpu(), masks.float())
        evenly = (masks.sum(-1) / torch.arange(1, T + 1)).sum(-1)
        said = lens(model, residual[:, :-1]).cpu()  # (L + 1, T - 1, V)
        true = said[:, range(T - 1), reading.tokens[1:]]
        foretold = said.argmax(-1) == said[-1].argmax(-1)
        sums = torch.stack([foretold.float().sum(-1), true.sum(-1)])
        rows.append((looked, evenly, masks.any(-1).sum(-1), sums, T - 1))
    return Survey(tuple(kinds), readings, *(np.stack(column) for column in zip(*rows, strict=True)))


def strongest_head(found: Survey, kind: str, chosen_on: slice, reported_on: slice) -> tuple[int, int, Interval, float]:
    """Layer and head that look most at a kind in some of the stories; in others, their attention to it and an even share.

    Attention is the mean over the tokens that have any of the kind to look at.
    """
    n = found.kinds.index(kind)
    total = found.looked[chosen_on, n].sum(0)  # (L, H)
    layer, head = map(int, np.unravel_index(total.argmax(), total.shape))
    looked, evenly, queries = (x[reported_on, n] for x in (found.looked, found.evenly, found.queries))
    return layer, head, ratio_interval(looked[:, layer, head], queries), float(evenly.sum() / queries.sum())


def switched_off(model: LanguageModel, layer: int, head: int) -> RemovableHandle:
    """A context manager: as long as it lasts, `head` of `layer` writes nothing."""

    def silence(_module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        heads = inputs[0].unflatten(-1, (model.config.n_heads, -1)).clone()  # (B, T, H, D)
        heads[:, :, head] = 0
        return (heads.flatten(2),)

    return model.model["layers"][layer].self_attn.o_proj.register_forward_pre_hook(silence)


@torch.no_grad()
def costs(model: LanguageModel, readings: list[Reading]) -> np.ndarray:
    """(S, 3): bits of the repeated names of each story, how often one of their tokens was the likeliest, bits of the rest."""
    rows = []
    for reading in readings:
        tokens = torch.from_numpy(reading.tokens.astype(np.int64)).to(model.device)
        logits = model(tokens[None, :-1])[0]
        bits = (F.cross_entropy(logits, tokens[1:], reduction="none") / math.log(2)).cpu().numpy()
        right = (logits.argmax(-1) == tokens[1:]).cpu().numpy()
        names = reading.repeated_names()[1:]
        rows.append((bits[names].sum(), right[names].sum(), bits[~names].sum()))
    return np.array(rows, dtype=np.float64)


def draw_tokens(ax, pieces: list[str], shades: np.ndarray, underlined: int) -> None:
    """Write a text on matplotlib's `ax`, each token on its shade between 0 and 1, one of them underlined."""
    width, line, column, text, placed = 84, 0, 0, "".join(pieces), []
    for at, piece in zip(np.cumsum([0, *map(len, pieces)]), pieces, strict=False):
        word = re.match(r"\s?[^\s]*", text[at:])[0]  # what is left of it
        if piece.startswith("\n") or (column + len(word) > width and piece.startswith(" ")):
            line, column, piece = line + 1, 0, piece[1:]  # the space or newline itself falls off the edge
        placed.append((line, column, piece))
        column += len(piece)
    grid = np.zeros((line + 1, width))
    write = {"family": "monospace", "fontsize": 8.5, "va": "center", "parse_math": False}
    for i, ((row, left, piece), shade) in enumerate(zip(placed, shades, strict=True)):
        right = left + len(piece)
        grid[row, left:right] = shade
        ax.text(left, row + 0.5, piece, color="white" if shade > 0.6 else "black", **write)
        if i == underlined:
            ax.texts[-1].set_weight("bold")
            ax.plot([left, right], [row + 0.95] * 2, color="C1", linewidth=2, linestyle="-")
    ax.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto", extent=(0, width, line + 1, 0))
    ax.axis("off")
