"""Time transformers' ``generate`` of a converted model, by CUDA graphs and without, beside dense.

    python launch/bench/generation.py --lengths 8192 65536 --batches 1 4 --csv generation.csv

Weights are random: the converted model is the dense one of the same seed. Timed are whole calls of
``generate``, greedy, behind prompts of the given lengths: the dense model with its own cache
(``dense``) and with a static one (``dense_compiled``, which transformers compiles and replays from
CUDA graphs; ``--no-compiled`` leaves it out), the converted model with its own cache (``eager``)
and with a static one, its steps replayed from a CUDA graph (``graphed``), which each call captures
anew. Tokens a second are those of steps: what a call with ``new_tokens`` takes longer than one with
a single token. The time of the latter is given as that of the prompt.

Before it is timed, ``graphed`` must give the tokens of ``eager``, and with the Triton backend its
logits bit for bit; else the program ends with status 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Import from the checkout, not from this file's folder.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import tyro
from torch import Tensor

from launch.bench.meter import Meter
from launch.bench.operators import triton_version
from launch.bench.options import DTYPES, Sizes, check_docs
from launch.bench.table import number, table, write_fields, write_numbers
from nsa_dist.checks import check
from nsa_kernels import get_backend

VOCABULARY = 32768
DENSE = ("dense", "dense_compiled")
NAMES = {
    "dense": "dense",
    "dense_compiled": "dense, compiled",
    "eager": "without graphs",
    "graphed": "by a CUDA graph",
}


@dataclass(frozen=True)
class GenerationOptions(Sizes):
    """Time ``generate`` of a converted model, with and without CUDA graphs, beside dense.

    Args:
        lengths: tokens of each row's prompt.
        batches: rows of the batch, a run for each.
        layers: of a Llama model whose hidden size is heads * head_dim.
        new_tokens: that a call generates for each row.
        compiled: time the dense model as transformers compiles it, too.
        docs: document that gets the table, between its marks for the file of ``csv``.

    Raises:
        ValueError: naming the option, what it must be and its value.
    """

    lengths: tuple[int, ...] = (8192, 32768, 131072)
    heads: int = 32
    kv_heads: int = 2
    independent_kv: bool = False
    backend: str = "auto"
    batches: tuple[int, ...] = (1, 4)
    layers: int = 4
    new_tokens: int = 128
    compiled: bool = True
    docs: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.batches), "batches", self.batches, "one batch size or more")
        for batch in self.batches:
            check(batch > 0, "batches", batch, "at least 1")
        check(self.layers > 0, "layers", self.layers, "at least 1")
        must = "at least 4, of which the third and later ones are replayed"
        check(self.new_tokens >= 4, "new_tokens", self.new_tokens, must)
        check(self.documents == 1, "documents", self.documents, "1: a document for each row")
        must = f"head_dim = {self.head_dim}, as in dense models"
        check(self.v_head_dim == self.head_dim, "v_head_dim", self.v_head_dim, must)
        check(self.data == "random", "data", self.data, "random")
        check_docs(self.docs, self.csv)


@dataclass(frozen=True)
class Row:
    """One measurement.

    prompt_ms: a call that generates one token. tokens_per_s: of all rows, in steps after it.
    """

    method: str
    length: int
    batch: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    independent_kv: bool
    dtype: str
    new_tokens: int
    prompt_ms: float
    tokens_per_s: float
    gpu: str


def dense_model(options: GenerationOptions, device: torch.device) -> Any:
    """A Llama model with random weights, the same for the same options."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = options.heads * options.head_dim
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.head_dim,
        max_position_embeddings=max(options.lengths) + options.new_tokens,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config)
    return model.to(DTYPES[options.dtype]).eval()


def sparse_model(options: GenerationOptions, device: torch.device) -> Any:
    """The same model converted, all branches of its attention in use."""
    from nsa_dist.adapters.huggingface import convert_to_nsa

    dense = dense_model(options, device)
    return convert_to_nsa(dense, options.config, backend=options.backend, gate_init=(0.0, 0.0, 0.0))


def generate(model: Any, prompt: Tensor, new_tokens: int, **options: Any) -> Any:
    """``generate``, greedily."""
    with torch.no_grad():
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            **options,
        )


def problem_of(options: GenerationOptions, sparse: Any, prompt: Tensor) -> str | None:
    """How steps of a graph differ from those without, or None."""
    details: Any = {"output_logits": True, "return_dict_in_generate": True}
    eager, graphed = (
        generate(sparse, prompt, options.new_tokens, **details, **more) for more in ({}, STATIC)
    )
    at = f"graphed, {prompt.shape[1]} tokens, batch {len(prompt)}"
    if not torch.equal(eager.sequences, graphed.sequences):
        return f"{at}: other tokens than without graphs"
    by_kernels = get_backend(options.backend, prompt.device).name == "triton"
    if by_kernels and not torch.equal(torch.stack(eager.logits), torch.stack(graphed.logits)):
        return f"{at}: other bits than without graphs"
    return None


STATIC = {"cache_implementation": "static"}


def compare(options: GenerationOptions, meter: Meter) -> tuple[list[Row], list[str]]:
    """All rows, and messages on wrong results. Prints and writes each row."""
    print(f"{meter.gpu}, torch {torch.__version__}, triton {triton_version()}", flush=True)
    dense, sparse = (make(options, meter.device) for make in (dense_model, sparse_model))
    rows: list[Row] = []
    wrong: list[str] = []
    for length in options.lengths:
        for batch in options.batches:
            generator = torch.Generator().manual_seed(length + batch)
            prompt = torch.randint(1, VOCABULARY, (batch, length), generator=generator)
            prompt = prompt.to(meter.device)
            problem = problem_of(options, sparse, prompt)
            methods: dict[str, tuple[Any, dict[str, Any]]] = {"dense": (dense, {})}
            if options.compiled:
                methods["dense_compiled"] = (dense, STATIC)
            methods["eager"] = (sparse, {})
            if problem is None:
                methods["graphed"] = (sparse, STATIC)
            else:
                wrong.append(problem)
            for name, (model, more) in methods.items():
                row = row_of(options, meter, name, model, prompt, more)
                rows.append(row)
                print(
                    f"{length} x {batch} {name}: prompt {row.prompt_ms:.1f} ms, "
                    f"{row.tokens_per_s:.1f} tokens/s",
                    flush=True,
                )
                if options.csv is not None:
                    write_fields(options.csv, rows)
    return rows, wrong


def row_of(
    options: GenerationOptions,
    meter: Meter,
    name: str,
    model: Any,
    prompt: Tensor,
    more: dict[str, Any],
) -> Row:
    """The measurement of a method."""
    first, whole = (
        meter.milliseconds(partial(generate, model, prompt, new, **more))
        for new in (1, options.new_tokens)
    )
    steps = len(prompt) * (options.new_tokens - 1)
    return Row(
        name,
        prompt.shape[1],
        len(prompt),
        options.layers,
        options.heads,
        options.kv_heads,
        options.head_dim,
        options.independent_kv,
        options.dtype,
        options.new_tokens,
        first,
        1000 * steps / (whole - first) if whole > first else float("nan"),
        meter.gpu,
    )


def markdown(rows: Sequence[Row]) -> str:
    """Tokens a second by prompt and batch; of ours also how many times the best dense one's."""
    methods = list(dict.fromkeys(row.method for row in rows))
    lines = []
    for length, batch in dict.fromkeys((row.length, row.batch) for row in rows):
        own = {row.method: row for row in rows if (row.length, row.batch) == (length, batch)}
        best = max(own[x].tokens_per_s for x in DENSE if x in own)
        cells = []
        for method in methods:
            speed = own[method].tokens_per_s if method in own else None
            cell = "" if speed is None else number(speed)
            if speed is not None and method not in DENSE:
                cell += f" ({number(speed / best)} x)"
            cells.append(cell)
        lines.append([f"{length:,}", str(batch), *cells])
    first = rows[0]
    text = (
        f"{first.gpu}: {first.layers} layers of {first.heads} heads in {first.kv_heads} groups, "
        f"{first.dtype}, {first.new_tokens} new tokens a row; tokens a second of all rows"
    )
    return f"{text}\n\n{table(['prompt', 'rows', *(NAMES[x] for x in methods)], lines)}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    options = tyro.cli(GenerationOptions, args=arguments)
    if find_spec("transformers") is None:
        sys.exit(
            "generation.py: transformers must be installed (pip install nsa-dist[huggingface])"
        )
    if not torch.cuda.is_available():
        sys.exit("generation.py: the machine must have an NVIDIA GPU, got no CUDA device")
    try:
        rows, wrong = compare(options, Meter(options.repeats_ms))
    except ValueError as error:
        sys.exit(f"generation.py: {error}")
    print(f"\n{markdown(rows)}")
    if options.docs is not None and options.csv is not None:
        write_numbers(options.docs, markdown(rows), options.csv.name)
    if wrong:
        sys.exit("generation.py: wrong results, not timed:\n  " + "\n  ".join(wrong))


if __name__ == "__main__":
    main()
