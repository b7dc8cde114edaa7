"""Texts with something in them to find, made from a seed alone: nothing is downloaded.

Needles are numbers of keys, hidden in sentences that say nothing or in a text of the user's.
Variable tracking, common words and frequent words follow the tasks of these names in RULER
(arXiv 2404.06654): their form and scoring, with words and sentences of our own. A text is put
together of tokens, so that it has exactly the length that was asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from nsa_dist.checks import check

Encode = Callable[[str], list[int]]

_COLOURS = "amber azure coral crimson golden indigo ivory jade lilac olive pearl scarlet".split()
_THINGS = "anchor basket candle falcon garden hammer lantern meadow needle orchard pepper".split()
_FILLER = (
    "The river is wide.",
    "The road is long.",
    "Bread is on the table.",
    "A bird sings in the tree.",
    "Nobody is at home.",
)
COMMON, COMMON_TIMES, RARE_TIMES = 10, (30, 15, 10, 6), 3
FREQUENT, ZETA = 3, 2.0
HOPS = 4


class TooShortError(ValueError):
    """A length does not hold a task's text."""


@dataclass(frozen=True)
class Example:
    """A text and what it asks for.

    Args:
        tokens: of the text, which ends where the answer begins.
        answers: texts that belong to the answer, in any order.
        reply: the whole answer as one would write it, the answers in one order.
    """

    tokens: list[int]
    answers: tuple[str, ...]
    reply: str


def filler_sentences(text: str = "") -> list[str]:
    """Sentences between which something is hidden: of a text, else of none in particular."""
    lines = [line for line in text.splitlines(keepends=True) if line.strip()]
    return lines or [f"{sentence} " for sentence in _FILLER]


def keys_of(rng: random.Random, count: int) -> list[str]:
    """Different names of two words."""
    pairs = [f"{colour}-{thing}" for colour in _COLOURS for thing in _THINGS]
    check(count <= len(pairs), "needles", count, f"at most {len(pairs)}")
    return rng.sample(pairs, count)


def hide(
    encode: Encode,
    sentences: Sequence[str],
    hidden: Sequence[tuple[float, str]],
    room: int,
) -> list[int]:
    """``room`` tokens of sentences, over and over, with texts at depths from 0 to 1 between them.

    Raises:
        TooShortError: if the texts alone need more tokens.
    """
    placed = sorted(((depth, encode(text)) for depth, text in hidden), key=lambda pair: pair[0])
    free = room - sum(len(tokens) for _, tokens in placed)
    if free < 0:
        raise TooShortError(f"lengths must be at least {-free} tokens more")
    pool = [encode(sentence) for sentence in sentences]
    starts, filler = [0], list[int]()
    while len(filler) < free:
        filler += pool[(len(starts) - 1) % len(pool)]
        starts.append(len(filler))
    # What does not fit is cut from the first sentence, not from the last, which the question
    # follows.
    extra = len(filler) - free
    filler = filler[extra:]
    starts = sorted({max(0, start - extra) for start in starts})
    result, done = list[int](), 0
    for depth, tokens in placed:
        at = min(starts, key=lambda start: abs(start - depth * free))
        result += filler[done : max(at, done)] + tokens
        done = max(at, done)
    return result + filler[done:]


def _assemble(
    encode: Encode, body: Callable[[int], list[int]], question: str, reply: str, length: int
) -> list[int]:
    """A text whose body takes what question and reply leave of the length."""
    asked = encode(question)
    room = length - len(asked) - len(encode(reply))
    return body(room) + asked


def needle(
    encode: Encode,
    length: int,
    depth: float,
    rng: random.Random,
    *,
    count: int,
    sentences: list[str],
) -> Example:
    """A number to find at a depth, the others of ``count`` at depths of their own.

    Raises:
        TooShortError: if the length does not hold them.
    """
    keys = keys_of(rng, count)
    numbers = [str(rng.randrange(1_000_000, 10_000_000)) for _ in keys]
    depths = [depth, *(rng.random() for _ in keys[1:])]
    hidden = [
        (at, f"The magic number of {key} is {number}. ")
        for at, key, number in zip(depths, keys, numbers, strict=True)
    ]
    reply = f" {numbers[0]}"
    question = f"\nThe magic number of {keys[0]} is"

    def body(room: int) -> list[int]:
        return hide(encode, sentences, hidden, room)

    tokens = _assemble(encode, body, question, reply, length)
    return Example(tokens, (numbers[0],), reply)


def variables(encode: Encode, length: int, rng: random.Random, sentences: list[str]) -> Example:
    """Variable tracking: names that get one value through a chain of assignments.

    Raises:
        TooShortError: if the length does not hold the chain.
    """

    def chain() -> tuple[list[str], str, list[str]]:
        names = ["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(HOPS + 1)]
        value = str(rng.randrange(10_000, 100_000))
        lines = [f"VAR {names[0]} = {value}. "]
        lines += [f"VAR {b} = VAR {a}. " for a, b in pairwise(names)]
        return names, value, lines

    def question(value: str) -> str:
        return f"\nAll variables that have the value {value} are:"

    shown, shown_value, shown_lines = chain()
    names, value, lines = chain()
    head = encode("".join(shown_lines) + question(shown_value) + f" {' '.join(shown)}\n\n")
    depths = sorted(rng.random() for _ in lines)
    reply = f" {' '.join(names)}"

    def body(room: int) -> list[int]:
        hidden = list(zip(depths, lines, strict=True))
        return head + hide(encode, sentences, hidden, room - len(head))

    return Example(_assemble(encode, body, question(value), reply, length), tuple(names), reply)


def made_up_words(rng: random.Random, count: int) -> list[str]:
    """Different words that mean nothing."""
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = (f"{rng.choice('bdfgklmnprstvz')}{rng.choice('aeiou')}" for _ in range(3))
        words["".join(syllables)] = None
    return list(words)


def _fit(encode: Encode, make: Callable[[int], str], room: int, most: int) -> list[int]:
    """The longest text of ``make(count)``, count 1 to ``most``, that has at most ``room`` tokens.

    Raises:
        TooShortError: if there is none.
    """
    low, high = 0, 1
    while (size := len(encode(make(high)))) <= room and high < most:
        low, high = high, 2 * high
    if low == 0:
        raise TooShortError(f"lengths must be at least {size - room} tokens more")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(encode(make(middle))) <= room else (low, middle)
    return encode(make(low))


def common_words(encode: Encode, length: int, rng: random.Random) -> Example:
    """Ten words that stand in a list 30 times (fewer where the length does not hold that, of
    ``COMMON_TIMES``), among words that stand there 3 times.

    Raises:
        TooShortError: if the length does not hold the list.
    """
    pool = made_up_words(rng, 2 * COMMON)
    common, example = pool[:COMMON], pool[COMMON : 2 * COMMON]
    seed = rng.random()
    rare = [w for w in made_up_words(random.Random(seed), min(length, 100_000)) if w not in pool]

    def listed(words: list[str], often: int, count: int) -> str:
        items = words * often + rare[:count] * RARE_TIMES
        random.Random(seed).shuffle(items)
        return "".join(f"{i}. {word} " for i, word in enumerate(items, 1))

    question = "\nThe ten most common words of the list are:"
    head = encode(listed(example, 4, 0) + question + f" {' '.join(example)}\n\n")
    reply = f" {' '.join(common)}"

    def body(room: int) -> list[int]:
        for often in COMMON_TIMES:
            try:
                text = _fit(encode, partial(listed, common, often), room - len(head), len(rare))
            except TooShortError:
                if often == COMMON_TIMES[-1]:
                    raise
            else:
                break
        return head + text

    return Example(_assemble(encode, body, question, reply, length), tuple(common), reply)


def frequent_words(encode: Encode, length: int, rng: random.Random) -> Example:
    """The three most frequent of made up words whose frequencies fall as 1 / rank^2.

    Raises:
        TooShortError: if the length does not hold the first three.
    """
    words = made_up_words(rng, 200)
    weights = [1 / rank**ZETA for rank in range(1, len(words) + 1)]
    seed = rng.random()

    def listed(count: int) -> str:
        # Not drawn, which might swap the first ones: each as often as its weight says.
        total = sum(weights)
        items = [
            word
            for word, weight in zip(words, weights, strict=True)
            for _ in range(round(count * weight / total))
        ]
        random.Random(seed).shuffle(items)
        return " ".join(items)

    answers = tuple(words[:FREQUENT])
    reply = f" {' '.join(answers)}"
    question = "\nThe three most frequent words of the text are:"

    def body(room: int) -> list[int]:
        # Of 50 words the third has three.
        return _fit(encode, lambda count: listed(count + 49), room, 1 << 30)

    return Example(_assemble(encode, body, question, reply, length), answers, reply)
