"""The beginnings that both models continue: 66 of this project's own, the TinyStories authors' 44, or those of a file.

The authors' prompts are fetched from their hub or read from `BLM_AUTHORS_PROMPTS`; they are not kept in this repository.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from blm_core import config
from blm_core.clean import words
from blm_core.config import HUB
from blm_core.files import fetch

GROUPS = ("story", "factual", "reasoning", "context-tracking")
OWN = Path(__file__).with_name("prompts.json")
AUTHORS_URL = HUB + "Evaluation%20prompts.yaml"
ANSWER_WORDS = 25  # of a completion, in which an answer has to come


class PromptError(ValueError):
    """A file of prompts that cannot be read as one."""


@dataclass(frozen=True)
class Prompt:
    """A beginning. A good completion soon says one of the words in `answer`, where there are any."""

    id: str
    group: str
    text: str
    answer: tuple[str, ...] = ()


def read_prompts(source: str | Path = "own") -> list[Prompt]:
    """The prompts of `source`: "own", "authors", or a file (.json as ours, .jsonl of recorded completions, .yaml as theirs).

    The same text is kept once. Raises PromptError for a file that holds anything else, DownloadError for the network.
    """
    if source == "own":
        path = OWN
    elif source == "authors":
        folder = config.build() / "prompts"
        path = fetch(os.environ.get("BLM_AUTHORS_PROMPTS") or AUTHORS_URL, folder, "BLM_AUTHORS_PROMPTS")
    else:
        path = Path(source)
    raw = path.read_text(encoding="utf-8")
    try:
        if path.suffix in (".yaml", ".yml"):
            found = [
                {"id": f"authors-{number:02d}", "group": "story", "prompt": text}
                for number, text in enumerate(yaml_list(raw), 1)
            ]
        elif path.suffix == ".jsonl":
            found = [record for record in map(json.loads, raw.splitlines()) if record.get("prompt")]
        else:
            found = json.loads(raw)
        prompts = [
            Prompt(str(r["id"]), r.get("group") or r["kind"], r["prompt"], tuple(map(str.lower, r.get("answer", ()))))
            for r in found
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PromptError(f"{path} cannot be read as prompts, each with id, group and prompt: {error!r}") from error
    unique = list({prompt.text: prompt for prompt in reversed(prompts)}.values())[::-1]
    if not unique or len({prompt.id for prompt in unique}) < len(unique) or not all(prompt.text.strip() for prompt in unique):
        raise PromptError(f"{path} holds {len(unique)} prompts; there must be some, none empty, each with an id of its own.")
    return unique


def answered(prompt: Prompt, completion: str) -> bool | None:
    """Whether one of the prompt's answers is among the completion's first 25 words; None where none is expected."""
    if not prompt.answer:
        return None
    return not set(prompt.answer).isdisjoint(words(completion)[:ANSWER_WORDS])


def yaml_list(text: str) -> list[str]:
    """The strings of a YAML file that is one list of strings, in block (`|-`, `|`), quoted or plain style.

    That is all that the authors' file needs. Raises PromptError naming the line of anything else.
    """
    found: list[str] = []
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if not line.strip() or line.startswith("#") or line.strip() == "---":
            continue
        item = re.fullmatch(r"- +(\S.*?) *", line)
        if not item:
            raise PromptError(f"line {number} of the list of prompts does not begin an item: {line[:40]!r}")
        value = item[1]
        if value in ("|", "|-"):
            block = []
            while number < len(lines) and (not lines[number].strip() or lines[number].startswith(" ")):
                block.append(lines[number])
                number += 1
            indent = min((len(row) - len(row.lstrip(" ")) for row in block if row.strip()), default=0)
            found.append("\n".join(row[indent:] for row in block).rstrip("\n") + ("\n" if value == "|" else ""))
        elif value[0] == value[-1] == "'" and len(value) > 1:
            found.append(value[1:-1].replace("''", "'"))
        elif value[0] == value[-1] == '"' and len(value) > 1:
            try:
                found.append(json.loads(value))
            except ValueError as error:
                raise PromptError(f"line {number} of the list of prompts is no quoted string: {error}") from error
        elif value[0] in "'\"[]{}&*!|>%@`" or re.search(r":( |$)", value):
            raise PromptError(f"line {number} of the list of prompts is not a plain string: {line[:40]!r}")
        else:
            found.append(value)
    return found
