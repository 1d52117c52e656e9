"""An endpoint as the judge of pairs: any server that speaks OpenAI's protocol, asked item by item.

Politely (rate limit, back-off), within a price ceiling, and never twice for the same: answers are kept. The key comes from
the environment when a request is made, and is never written anywhere.
"""

import email.utils
import json
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import requests
from tqdm import tqdm

from blm_core.config import ConfigError
from blm_core.evidence.ratings import Rating, RatingsError, check_marks
from blm_core.evidence.sheets import ANSWER, Form, Item, hashed, no_constants, no_doubles
from blm_core.files import read_json, write_json

BACKOFF = 1.0  # seconds before the second attempt, doubled each time
LONGEST_WAIT = 120.0  # seconds that a server may ask for
TIMEOUT = (10, 180)  # seconds to connect, seconds without a byte
TEMPLATE_TOKENS = 100  # what a server may put around a message
THINKING = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL)


class JudgeError(RuntimeError):
    """A judge that cannot be asked."""


class _Retry(Exception):
    """This attempt failed; another may not."""

    def __init__(self, reason: str, wait: float = 0):
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server. Its key is read from BLM_JUDGE_KEY when asked, and never kept.

    Prices are per million tokens; `ceiling`, in the same currency, bounds what all runs with one cache spend together.
    """

    url: str  # up to and without /chat/completions
    model: str
    price_in: float = 0.0
    price_out: float = 0.0
    ceiling: float = math.inf
    requests_per_minute: float = 60.0
    max_tokens: int = 1000
    attempts: int = 6  # to reach the server
    asks: int = 3  # until an answer can be used

    def __post_init__(self):
        if not re.match(r"https?://\w", self.url):
            raise ConfigError(f"BLM_JUDGE_URL is {self.url!r}; set it to an address such as http://localhost:8080/v1.")
        if not self.model:
            raise ConfigError("BLM_JUDGE_MODEL is not set; it names the model that the endpoint shall use.")
        if min(self.price_in, self.price_out) < 0 or self.ceiling < 0:
            raise ConfigError("prices and their ceiling must not be negative.")
        if math.isfinite(self.ceiling) and not (self.price_in or self.price_out):
            raise ConfigError("a price ceiling needs the prices per million tokens, of input and of output.")
        if self.requests_per_minute <= 0 or min(self.max_tokens, self.attempts, self.asks) < 1:
            raise ConfigError("requests per minute, tokens, attempts and asks must be above 0.")

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6


def endpoint_from_environment(**settings) -> Endpoint:
    """The endpoint that BLM_JUDGE_URL and BLM_JUDGE_MODEL name. Raises ConfigError."""
    return Endpoint(os.environ.get("BLM_JUDGE_URL", ""), os.environ.get("BLM_JUDGE_MODEL", ""), **settings)


@dataclass
class Outcome:
    """What came of asking. `refused` says for each item without a usable answer why; `stopped` why items were left."""

    ratings: list[Rating] = field(default_factory=list)
    refused: dict[str, list[str]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    stopped: str = ""
    asked: int = 0  # answers bought now
    reused: int = 0  # answers found in the cache
    spent: float = 0.0  # by all runs with this cache

    def as_dict(self) -> dict:
        """All but the ratings."""
        return {name: value for name, value in vars(self).items() if name != "ratings"}


class Judge:
    """Asks an endpoint, politely, within its price, and never twice for the same."""

    def __init__(self, endpoint: Endpoint, cache: Path, form: Form | None = None):
        """Answers are kept in the folder `cache`, with what was spent. They may quote the texts: do not publish them."""
        self.endpoint, self.cache, self.form = endpoint, Path(cache), form or Form()
        account = self.cache / "account.json"
        known = read_json(account, {})
        if account.exists() and not isinstance(known.get("spent"), int | float):
            raise JudgeError(f"{account} cannot be read, so it is not known what was spent; mend or remove it.")
        self.spent = float(known.get("spent", 0.0))
        self.asked = self.reused = 0
        self._next = 0.0

    def rate(self, items: Sequence[Item], rater: str = "") -> Outcome:
        """Ask for every item. What cannot be asked any more is left and named; what was answered is kept."""
        outcome = Outcome()
        rater = rater or self.endpoint.model
        waiting = list(items)
        with tqdm(total=len(waiting), desc=f"asking {self.endpoint.model}", unit="item") as bar:
            while waiting:
                item = waiting[0]
                try:
                    answer, reasons = self._answer(item)
                except JudgeError as error:
                    outcome.left, outcome.stopped = [item.id for item in waiting], str(error)
                    break
                if answer is None:
                    outcome.refused[item.id] = reasons
                else:
                    outcome.ratings.append(item.rating(rater, answer))
                waiting.pop(0)
                bar.update()
        outcome.asked, outcome.reused, outcome.spent = self.asked, self.reused, self.spent
        return outcome

    def _answer(self, item: Item) -> tuple[dict | None, list[str]]:
        """The marks of `item`, or None and what was wrong with each answer."""
        a, b = item.texts
        question = f"{self.form.task}\n\nBeginning: {item.pair.prompt}\n\nA: {a}\n\nB: {b}\n\n"
        question += f"Answer with one JSON object and nothing else, like this:\n{ANSWER}"
        reasons: list[str] = []
        for number in range(1, self.endpoint.asks + 1):
            again = f"\n\nAn answer before this one could not be used: {reasons[-1]}." if reasons else ""
            try:
                return parse_answer(self._ask(question + again, number)), reasons
            except RatingsError as error:
                reasons.append(str(error))
        return None, reasons

    def _ask(self, question: str, number: int) -> str:
        """The text of the server's answer, from the cache or bought."""
        body = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self.endpoint.max_tokens,
        }
        path = self.cache / f"{hashed([self.endpoint.url, body, number], 32)}.json"
        stored = read_json(path)
        if stored is not None:
            self.reused += 1
            return stored["content"]
        worst = self.endpoint.cost(
            len(question.encode()) + TEMPLATE_TOKENS, self.endpoint.max_tokens
        )  # a token is a byte or more
        for attempt in range(self.endpoint.attempts):
            if self.spent + worst > self.endpoint.ceiling:
                raise JudgeError(
                    f"the next answer may cost {worst:.6f} and {self.spent:.6f} of {self.endpoint.ceiling:.6f} are spent; "
                    "nothing was lost. Raise the ceiling to go on."
                )
            try:
                reply = self._attempt(body, worst)
            except _Retry as error:
                if attempt + 1 == self.endpoint.attempts:
                    raise JudgeError(
                        f"{self.endpoint.url} gave no answer in {attempt + 1} attempts (last: {error}); what was answered "
                        "is kept."
                    ) from error
                time.sleep(max(BACKOFF * 2**attempt, error.wait))
                continue
            self.asked += 1
            write_json(path, reply)
            return reply["content"]
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _attempt(self, body: dict, worst: float) -> dict:
        """One request: the answer's text, why it ended and the tokens. What may have been billed counts as spent."""
        time.sleep(max(0.0, self._next - time.monotonic()))
        self._next = time.monotonic() + 60 / self.endpoint.requests_per_minute
        accepted = False
        address = self.endpoint.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        try:
            with requests.post(
                address, json=body, auth=_authorise, timeout=TIMEOUT, stream=True, allow_redirects=False
            ) as response:
                _refuse(address, response)
                accepted = True
                reply = response.json()
                choice = reply["choices"][0]
                content = choice["message"].get("content")
                usage = reply.get("usage") or {}
        except (requests.RequestException, ValueError, LookupError, TypeError, AttributeError) as error:
            if accepted or isinstance(error, requests.ReadTimeout):
                self._pay(worst)
            raise _Retry(f"{'a broken answer' if accepted else 'no connection'}, {type(error).__name__}") from error
        tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        stated = all(isinstance(count, int) and count >= 0 for count in tokens)
        self._pay(self.endpoint.cost(*tokens) if stated else worst)
        return {
            "content": content if isinstance(content, str) else "",
            "finish_reason": choice.get("finish_reason"),
            "tokens": tokens if stated else None,
        }

    def _pay(self, price: float) -> None:
        self.spent += price
        write_json(self.cache / "account.json", {"spent": self.spent})


def parse_answer(text: str) -> dict:
    """The one JSON object in `text` that holds marks. Raises RatingsError saying why there is none; nothing is guessed."""
    found, problems = [], []
    text = THINKING.sub("", text)
    decoder = json.JSONDecoder(object_pairs_hook=no_doubles, parse_constant=no_constants)
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            problems.append(f"not valid JSON ({error})")
            end = start + 1
        else:
            wrong = check_marks(value)
            problems += wrong
            if not wrong and value not in found:
                found.append(value)
        start = text.find("{", end)
    if len(found) == 1:
        return found[0]
    if found:
        raise RatingsError(f"it holds {len(found)} different sets of marks")
    raise RatingsError(problems[0] if problems else "it holds no JSON object")


def _authorise(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Add the key, if there is one. As requests' `auth` it also keeps a .netrc file from taking its place."""
    key = os.environ.get("BLM_JUDGE_KEY", "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise JudgeError("BLM_JUDGE_KEY holds characters that no key has, such as a line break.")
    if key:
        request.headers["Authorization"] = f"Bearer {key}"
    return request


def _refuse(address: str, response: requests.Response) -> None:
    """The server's body is not repeated: it may echo the key."""
    status = response.status_code
    if status in (408, 429) or status >= 500:
        raise _Retry(f"HTTP status {status}", _wait(response.headers.get("Retry-After", "")))
    if status != 200:
        raise JudgeError(
            f"{address} answers with HTTP status {status}. Look at BLM_JUDGE_URL, BLM_JUDGE_MODEL and BLM_JUDGE_KEY; what "
            "was answered before is kept."
        )


def _wait(stated: str) -> float:
    """Seconds that Retry-After asks for, as a number or a date; 0 where it says nothing."""
    try:
        seconds = float(stated)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(stated).timestamp() - time.time()
        except (ValueError, TypeError):
            seconds = 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT) if math.isfinite(seconds) else 0.0
