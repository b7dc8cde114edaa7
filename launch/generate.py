"""Text from a trained model, on the terminal as it is made.

    python launch/generate.py CHECKPOINT --prompt "def main(" --max-new-tokens 200

CHECKPOINT is a run's folder (its newest checkpoint) or one of its ``checkpoints/step_N``, of any
engine. The model runs on one device, with a cache. The text alone goes to standard output; what is
said about it goes to standard error.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Import from the checkout, not from this file's folder.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

import io
import os
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import Tensor

from launch.data.tokenizer import Tokenizer
from launch.loading import Device, Dtype, Trained, alone, load
from launch.processes.mistakes import BAD_INPUT, end, read_once
from nsa_dist.checks import check

INTERRUPTED = 130
CONTEXT = 64
"""Tokens before the new ones that decide how these read (spaces, characters of several bytes)."""


@dataclass(frozen=True)
class GenerateOptions:
    """Continue a prompt by a trained model.

    Args:
        checkpoint: a run's folder or its checkpoints/step_N.
        prompt: text to continue.
        prompt_file: a file with the text instead; - reads standard input.
        max_new_tokens: how long the continuation is; the model knows no end of a text.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: draw among this many likeliest tokens; 0: among all.
        top_p: draw among the likeliest tokens that together have this probability.
        min_p: draw among tokens with at least this fraction of the likeliest one's probability.
        repetition_penalty: above 1 makes tokens that are there already less likely.
        stop: end behind the first of these texts.
        seed: of the draws; the same line gives the same text.
        tokenizer: of the run, where it lies elsewhere now.
        device: auto takes cuda where there is a GPU.
        dtype: of the model; auto as in training.
    """

    checkpoint: tyro.conf.Positional[Path]
    prompt: str = ""
    prompt_file: str = ""
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    tokenizer: str = ""
    device: Device = "auto"
    dtype: Dtype = "auto"


def check_options(options: GenerateOptions) -> None:
    """Refuse values that no text can be drawn with.

    Raises:
        ValueError: naming the option.
    """
    one = bool(options.prompt) != bool(options.prompt_file)
    given = (options.prompt, options.prompt_file)
    check(one, "prompt, prompt_file", given, "some text in one of the two")
    check(options.max_new_tokens >= 1, "max_new_tokens", options.max_new_tokens, "at least 1")
    for option, least, most in (
        ("temperature", 0.0, 1e6),
        ("top_k", 0, 1 << 31),
        ("min_p", 0.0, 1.0),
    ):
        value = getattr(options, option)
        check(least <= value <= most, option, value, f"from {least} to {most}")
    check(0 < options.top_p <= 1, "top_p", options.top_p, "above 0 and at most 1")
    value = options.repetition_penalty
    check(0 < value <= 1e6, "repetition_penalty", value, "a positive number")
    check(all(options.stop), "stop", options.stop, "texts that are not empty")
    check(0 <= options.seed < 1 << 63, "seed", options.seed, "an integer from 0, of 63 bits")
    if options.temperature == 0:
        for option, default in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            value = getattr(options, option)
            check(value == default, option, value, f"{default} with temperature = 0")


def read_prompt(options: GenerateOptions) -> bytes:
    """The text to continue.

    Raises:
        ValueError: if it cannot be read.
    """
    if options.prompt:
        # What the terminal gave that is not UTF-8 stays the bytes that it was.
        return options.prompt.encode("utf-8", "surrogateescape")
    if options.prompt_file == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(options.prompt_file).read_bytes()
    except OSError as error:
        must = "a file that can be read, or -"
        raise ValueError(
            f"prompt_file must be {must}, got {options.prompt_file!r} ({error})"
        ) from None


class Stream:
    """A streamer of transformers: writes the text of the new tokens, as far as later tokens cannot
    change it.

    Args:
        prompt: tokens that come first and are not written.
        stops: no text from behind the first of these on is written.

    Attributes:
        text: what was written.
        ended: whether a stop was found.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        write: Callable[[str], Any],
        stops: Sequence[str] = (),
    ) -> None:
        self._tokenizer, self._write, self._stops = tokenizer, write, stops
        self._waits_for_prompt, self.text, self.ended = True, "", False
        self._begin(prompt)

    def _begin(self, tokens: Sequence[int]) -> None:
        """Decode from the last few of these on, whose own text is known: not all, each time."""
        self._tokens = list(tokens[-CONTEXT:])
        self._known = len(self._tokenizer.decode(self._tokens))

    def put(self, tokens: Tensor) -> None:
        """Take the next tokens; transformers hands over the prompt first."""
        if self._waits_for_prompt:
            self._waits_for_prompt = False
            return
        self._tokens += tokens.flatten().tolist()
        self._show(last=False)

    def end(self) -> None:
        """No token follows."""
        self._show(last=True)

    def _show(self, last: bool) -> None:
        if self.ended:
            return
        text = self._tokenizer.decode(self._tokens)
        # The last character may still lack bytes.
        whole = text if last else text.rstrip("\ufffd")
        new = whole[self._known :]
        self._known = max(self._known, len(whole))
        before = len(self.text)
        self.text += new
        for stop in self._stops:
            # A stop may begin in what was written before.
            found = self.text.find(stop, max(0, before - len(stop) + 1))
            if found >= 0:
                self.text, self.ended = self.text[: found + len(stop)], True
        if len(self.text) > before:
            self._write(self.text[before:])
        if len(self._tokens) > 4 * CONTEXT and whole == text:
            self._begin(self._tokens)


def generate(
    model: Any, tokens: Tensor, options: GenerateOptions, streamer: Stream | None = None
) -> Tensor:
    """Tokens [new] that continue ``tokens`` [T], by a model of transformers with a cache."""
    import transformers

    drawn = options.temperature > 0
    sampling: dict[str, Any] = {}
    if drawn:
        sampling = dict(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p or None,
        )
    config = transformers.GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        do_sample=drawn,
        repetition_penalty=options.repetition_penalty,
        use_cache=True,
        **sampling,
    )
    # Not the model's own, whose draws would join these.
    model.generation_config = transformers.GenerationConfig()
    stopping = []
    if streamer is not None:
        stopping = [lambda ids, *_, **__: ids.new_full(ids.shape[:1], streamer.ended).bool()]
    torch.manual_seed(options.seed)
    inputs = tokens.to(model.device)[None]
    with torch.no_grad():
        made = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=config,
            streamer=streamer,
            stopping_criteria=transformers.StoppingCriteriaList(stopping),
        )
    return made[0, inputs.shape[1] :]


def run(options: GenerateOptions, write: Callable[[str], Any], say: Callable[[str], Any]) -> str:
    """Load a model and continue the prompt.

    Args:
        write: takes the text, piece by piece.
        say: takes what is to be known about it, line by line.

    Returns:
        The continuation.

    Raises:
        ValueError: naming the option, what it must be and its value.
    """
    check_options(options)
    with alone():
        trained = load(options.checkpoint)
    tokenizer = trained.tokenizer(options.tokenizer)
    text = read_prompt(options)
    tokens = tokenizer.encode(text, "prompt").to(torch.int64)
    check(tokens.numel() > 0, "prompt", text.decode(errors="replace"), "text of at least one token")
    model = trained.transformers(options.device, options.dtype)
    say(describe(trained, model, tokens.numel(), options))
    stream = Stream(tokenizer, tokens.tolist(), write, options.stop)
    started = time.perf_counter()
    new = generate(model, tokens, options, stream)
    seconds = time.perf_counter() - started
    say(f"{new.numel()} {tokenizer.unit}s in {seconds:.1f} s")
    return stream.text


def describe(trained: Trained, model: Any, prompt: int, options: GenerateOptions) -> str:
    """What makes the text, in a line."""
    line = f"step {trained.step} of {trained.path}, {model.dtype} on {model.device.type}"
    length, trained_on = prompt + options.max_new_tokens, trained.settings.data.length
    if length > trained_on:
        line += f"; up to {length:,} tokens, which is beyond the {trained_on:,} of its training"
    return line


def main(arguments: Sequence[str] | None = None) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What an encoding lacks does not end a text.
        sys.stdout.reconfigure(errors="backslashreplace")
    options = read_once(lambda: tyro.cli(GenerateOptions, args=arguments))
    out = sys.stdout

    def write(text: str) -> None:
        print(text, end="", file=out, flush=True)

    def say(line: str) -> None:
        print(f"\n{line}", file=sys.stderr, flush=True)

    try:
        # Libraries print to standard output too.
        with redirect_stdout(sys.stderr):
            run(options, write, say)
        print(file=out, flush=True)
    except BrokenPipeError:
        # Whoever read the text has enough. Python would complain of the rest when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (OSError, ValueError) as error:
        end("generate.py", error, BAD_INPUT)


if __name__ == "__main__":
    main()
