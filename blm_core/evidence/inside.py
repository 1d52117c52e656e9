"""Inside the model: where its heads look, which neurons answer to what, what its layers would already say.

- The model runs as it is and is read through hooks, one story at a time
- Heads are chosen by what they look at, after TinyStories (Eldan and Li 2023, section 5)
- One causal test: a head is switched off, and the bits that repeated names cost are counted again
- Logit lens: the final norm and the output embedding, applied to the residual stream after every layer (nostalgebraist 2020)
- Heads and neurons are chosen on some stories and reported on others, so that the choice does not flatter them

Shapes: T tokens, C d_model, V vocabulary, L layers, H query heads, F d_ff, S stories. Layers and heads count from 0.
"""

import contextlib
import math
import re
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from blm_core.evaluate import Interval, mean_interval, ratio_interval
from blm_core.model import LanguageModel, rotate
from blm_core.tokenizer import SPACE_MARK, Tokenizer

CLASSES = ("names", "places", "speech")
# Patterns are of bytes, as tokens may be parts of a character.
NAME = re.compile(rb"(?<=[a-z,;] )[A-Z][a-z]+")  # capitalised where no sentence begins
WORD = re.compile(rb"[A-Za-z]+")
SPEECH = re.compile(rb'"[^"\n]*"')
PLACE = re.compile(
    rb"(?i)\b(?:attic|bakery|barn|beach|bedroom|bridge|cabin|castle|cave|church|city|classroom|cottage|desert|farm|field|forest"
    rb"|garage|garden|hall|harbor|hill|home|hospital|house|island|jungle|kitchen|lake|library|market|meadow|mountain|museum"
    rb"|ocean|park|path|playground|pond|pool|river|road|room|school|sea|shed|shop|stable|store|street|tower|town|village|woods"
    rb"|yard|zoo)(?:e?s)?\b"
)


@dataclass(frozen=True)
class Reading:
    """A text as the model reads it, `<|endoftext|>` first. Arrays are (T,); -1 says that a token belongs to none."""

    tokens: np.ndarray
    pieces: list[str]
    word: np.ndarray  # number of the word
    name: np.ndarray  # number of the name, the same wherever it occurs
    place: np.ndarray
    quote: np.ndarray  # 0 for quotation marks
    opener: np.ndarray  # for tokens of speech, the position of the mark that opened it

    def members(self, token_class: str) -> np.ndarray:
        """Which tokens belong to a class of CLASSES, (T,) of bool."""
        return {"names": self.name, "places": self.place, "speech": self.opener}[token_class] >= 0

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

    A name is any capitalised word that stands somewhere in the text where no sentence begins; a place is a word of PLACE or its
    plural; speech is what stands between two quotation marks of one paragraph.
    """
    tokens = np.array([tokenizer.eot, *tokenizer.encode(text)][:seq_len])
    raw = [b"", *(_bytes(tokenizer, token) for token in tokens[1:])]
    ends = np.cumsum([len(piece) for piece in raw])
    text = text.encode()
    word, name, place, quote, speech = labels = np.full((5, len(text)), -1)  # of every byte; of speech, its first byte
    names = {found: number for number, found in enumerate(sorted(set(NAME.findall(text))))}
    for number, match in enumerate(WORD.finditer(text)):
        word[match.start() : match.end()], name[match.start() : match.end()] = number, names.get(match[0], -1)
    for match in PLACE.finditer(text):
        place[match.start() : match.end()] = 0
    quote[np.frombuffer(text, np.uint8) == ord('"')] = 0
    for match in SPEECH.finditer(text):
        speech[match.start() + 1 : match.end() - 1] = match.start()
    of_tokens = [labels[:, end - len(piece) : end].max(1, initial=-1) for piece, end in zip(raw, ends, strict=True)]
    *columns, speech = np.array(of_tokens).T
    opener = np.where(speech >= 0, np.searchsorted(ends, speech, side="right"), -1)
    return Reading(tokens, [piece.decode(errors="replace") for piece in raw], *columns, opener)


@dataclass(frozen=True)
class Trace:
    """What passed through the model on one text."""

    attention: Tensor  # (L, H, T, T), query position, key position
    hidden: Tensor  # (L, T, F), input of `down_proj`: the neurons
    residual: Tensor  # (L + 1, T, C), the embedding first


@torch.no_grad()
def trace(model: LanguageModel, tokens: np.ndarray) -> Trace:
    """Run `model` on tokens (T,) and keep what is inside. Attention is computed anew from queries and keys."""
    T, config, kept = len(tokens), model.config, {}
    with contextlib.ExitStack() as hooks:
        for block in model.model["layers"]:
            attention = block.self_attn
            parts = {"block": block, "q": attention.q_proj, "k": attention.k_proj, "down": block.mlp.down_proj}
            for name, module in parts.items():
                keep = partial(
                    lambda seen, _module, inputs, output: seen.append((inputs[0], output)), kept.setdefault(name, [])
                )
                hooks.enter_context(module.register_forward_hook(keep))
        model(torch.from_numpy(tokens.astype(np.int64))[None].to(model.device))
    before, after = ({name: torch.cat([both[i] for both in seen]) for name, seen in kept.items()} for i in (0, 1))
    q, k = (after[name].unflatten(-1, (-1, config.d_head)).transpose(1, 2) for name in "qk")  # (L, H or K, T, D)
    if config.position == "rope":
        q, k = rotate(q, model.cos[:T], model.sin[:T]), rotate(k, model.cos[:T], model.sin[:T])
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(-1, -2) / config.d_head**0.5
    future = torch.ones(T, T, dtype=torch.bool, device=scores.device).triu(1)
    attention = scores.masked_fill(future, -torch.inf).softmax(-1)
    return Trace(attention, before["down"], torch.cat([before["block"][:1], after["block"]]))


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
        "quotation marks": before & (r.quote == 0),
        "the mark that opened the speech": key == r.opener[:, None],
    }


def lens(model: LanguageModel, residual: Tensor) -> Tensor:
    """What the output layer makes of each state of the residual stream (L + 1, T, C): log-probabilities (L + 1, T, V)."""
    with torch.no_grad():
        return F.linear(model.model["norm"](residual), model.model["embed_tokens"].weight).float().log_softmax(-1)


@dataclass(frozen=True)
class Survey:
    """What was read in every story. Arrays are NumPy's, on the CPU."""

    kinds: tuple[str, ...]
    readings: list[Reading]
    looked: np.ndarray  # (S, kinds, L, H), attention to the keys of a kind, summed over the queries that have any
    evenly: np.ndarray  # (S, kinds), the same for a head that looks at all tokens alike
    queries: np.ndarray  # (S, kinds)
    auc: np.ndarray  # (S, classes, L, F), how well each neuron tells a class; nan where a story has no token of it
    lens: np.ndarray  # (S, 2, L + 1): final choice foretold, log-probability of the true next token, summed
    predicted: np.ndarray  # (S,), tokens


def survey(model: LanguageModel, tokenizer: Tokenizer, stories: list[str]) -> Survey:
    """Read each story once, up to the model's context."""
    rows, readings = [], [read(tokenizer, text, model.config.seq_len) for text in stories]
    for reading in tqdm(readings, desc="reading", unit="story"):
        seen, kinds, T = trace(model, reading.tokens), looks(reading), len(reading.tokens)
        masks = torch.from_numpy(np.stack(list(kinds.values())))  # (kinds, T, T)
        looked = torch.einsum("lhqk,nqk->nlh", seen.attention.cpu(), masks.float())
        evenly = (masks.sum(-1) / torch.arange(1, T + 1)).sum(-1)
        hidden = seen.hidden.transpose(0, 1).cpu().numpy()  # (T, L, F)
        aucs = np.stack([auc(hidden, reading.members(name)) for name in CLASSES])
        said = lens(model, seen.residual[:, :-1]).cpu()  # (L + 1, T - 1, V)
        true = said.gather(-1, torch.from_numpy(reading.tokens[1:]).expand(len(said), -1)[..., None])
        foretold = said.argmax(-1) == said[-1].argmax(-1)
        sums = torch.stack([foretold.float().sum(-1), true.sum((-1, -2))])
        rows.append((looked, evenly, masks.any(-1).sum(-1), aucs, sums, T - 1))
    return Survey(tuple(kinds), readings, *(np.stack(column) for column in zip(*rows, strict=True)))


def strongest_head(found: Survey, kind: str, chosen_on: slice, reported_on: slice) -> tuple[int, int, Interval, float]:
    """Layer and head that look most at a kind in some of the stories, and how they do in others.

    That is the mean attention to the kind, over the tokens that have any to look at, and what it would be if attention were
    spread evenly over all tokens.
    """
    n = found.kinds.index(kind)
    total = found.looked[chosen_on, n].sum(0)  # (L, H)
    layer, head = map(int, np.unravel_index(total.argmax(), total.shape))
    queries = found.queries[reported_on, n]
    value = ratio_interval(found.looked[reported_on, n, layer, head], queries)
    return layer, head, value, float(found.evenly[reported_on, n].sum() / queries.sum())


def auc(values: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Chance that a token of the class has the higher value than one outside it, a tie counting half (Mann-Whitney's U).

    `values` (T, ...), `member` (T,) of bool; (...), nan where all tokens are of one side.
    """
    inside, pairs = member.sum(), member.sum() * (~member).sum()
    wins = rankdata(values, axis=0)[member].sum(0) - inside * (inside + 1) / 2
    return wins / pairs if pairs else np.full(wins.shape, np.nan)


def clearest_neuron(found: Survey, token_class: str, chosen_on: slice, reported_on: slice) -> tuple[int, int, int, Interval]:
    """Layer, neuron, sign and AUC of the neuron that best tells a class from the rest of its story, mean over stories.

    Neuron and sign are chosen on some stories, the AUC comes from others. A sign of -1 says that it answers by falling.
    """
    values = found.auc[:, CLASSES.index(token_class)]  # (S, L, F)
    has = ~np.isnan(values[:, 0, 0])
    strength = values[chosen_on][has[chosen_on]].mean(0) - 0.5
    layer, neuron = map(int, np.unravel_index(np.abs(strength).argmax(), strength.shape))
    sign = 1 if strength[layer, neuron] > 0 else -1
    reported = values[reported_on][has[reported_on], layer, neuron]
    return layer, neuron, sign, mean_interval(0.5 + sign * (reported - 0.5))


def spelling(found: Survey, token_class: str, learned_on: slice, reported_on: slice) -> Interval:
    """The same AUC for a rule without a model: how often a token was of the class in the stories learned from."""
    known = found.readings[learned_on]
    tokens, member = (np.concatenate(x) for x in zip(*((r.tokens, r.members(token_class)) for r in known), strict=True))
    size = 1 + max(int(r.tokens.max()) for r in found.readings)
    share = np.bincount(tokens, member, size) / np.bincount(tokens, minlength=size).clip(1)
    each = np.array([auc(share[r.tokens], r.members(token_class)) for r in found.readings[reported_on]])
    return mean_interval(each[~np.isnan(each)])


def switched_off(model: LanguageModel, layer: int, head: int) -> RemovableHandle:
    """A context manager: as long as it lasts, `head` of `layer` writes nothing."""
    own = slice(head * model.config.d_head, (head + 1) * model.config.d_head)

    def silence(_module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        heads = inputs[0].clone()  # (B, T, H * D)
        heads[..., own] = 0
        return (heads,)

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


def draw_tokens(ax, pieces: list[str], shades: np.ndarray, width: int = 84, underlined: int | None = None) -> None:
    """Write a text on matplotlib's `ax`, `width` characters a line, each token on its shade between 0 and 1."""
    line, column, text, places = 0, 0, "".join(pieces), []
    for at, piece in zip(np.cumsum([0, *map(len, pieces)]), pieces, strict=False):
        rest = re.match(r"\s?[^\s]*", text[at:])[0]  # to the end of the word
        if piece.startswith("\n") or (column + len(rest) > width and piece.startswith(" ")):
            line, column = line + 1, -1  # the space or newline itself falls off the edge
        places.append((line, column))
        column += len(piece)
    grid = np.zeros((line + 1, width))
    write = {"family": "monospace", "fontsize": 8.5, "va": "center", "parse_math": False}
    for i, ((row, first), piece, shade) in enumerate(zip(places, pieces, shades, strict=True)):
        left, right = max(first, 0), first + len(piece)
        grid[row, left:right] = shade
        weight = "bold" if i == underlined else "normal"
        ax.text(left, row + 0.5, piece[first < 0 :], color="white" if shade > 0.6 else "black", weight=weight, **write)
        if i == underlined:
            ax.plot([left, right], [row + 0.95] * 2, color="C1", linewidth=2, linestyle="-")
    ax.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto", extent=(0, width, line + 1, 0))
    ax.axis("off")
