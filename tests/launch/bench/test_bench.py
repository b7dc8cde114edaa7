"""The benchmark but for its clock: what it runs on, what it refuses, its judges."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.bench import operators
from launch.bench.judges import scores
from launch.bench.options import (
    OPERATORS,
    Options,
    first_bad_choice,
    random_choices,
    recorded_choices,
)
from launch.bench.problems import Problem, problems
from launch.bench.stream import Stream
from launch.bench.table import read_csv
from launch.bench.work import Peaks, operator_flops
from nsa_kernels import pytorch
from nsa_kernels.reference import ReferenceOptions, block_scores

numpy = pytest.importorskip("numpy")

SMALL = Options(
    lengths=(90,),
    heads=4,
    kv_heads=2,
    head_dim=16,
    v_head_dim=32,
    compress_block=8,
    compress_stride=4,
    select_block=16,
    num_selected=4,
    window=20,
    dtype="float32",
    backend="pytorch",
    dense=False,
)
PACKED = replace(SMALL, documents=3)


def stream_of(options: Options) -> tuple[Stream, Tensor]:
    (length,) = options.lengths
    choices = random_choices(length, options.config, "cpu", options.documents)
    return Stream(options, length, "cpu"), choices


def problem_of(options: Options, name: str) -> Problem:
    stream, choices = stream_of(options)
    (problem,) = problems(stream, choices, {}, only=(name,))
    return problem


def chosen_file(tmp_path: Path, options: Options, layers: int = 2, **arrays: Any) -> Path:
    """A file of random choices, as record_choices.py writes them."""
    (length,) = options.lengths
    drawn = [random_choices(length, options.config, "cpu").transpose(0, 1) for _ in range(layers)]
    values = {"selected": torch.stack(drawn).short().numpy(), **arrays}
    path = tmp_path / "trained.npz"
    numpy.savez(path, **{name: x for name, x in values.items() if x is not None})
    return path


# What it runs on.


@pytest.mark.parametrize("options", [SMALL, PACKED], ids=["one document", "packed"])
def test_random_choices_are_choices_that_a_selection_makes(options: Options) -> None:
    choices = random_choices(90, options.config, "cpu", options.documents)
    for document in choices.split(90 // options.documents):
        assert first_bad_choice(document, options.config) is None
        # The first and the two newest blocks are forced.
        assert (document[:, :, 0] == 0).all()
        newest = torch.arange(len(document))[:, None] // 16
        assert ((document == (newest - 1).clamp(min=0)[..., None]).any(-1)).all()
    if options is SMALL:
        assert not torch.equal(choices[80], choices[85])


def test_a_choice_that_no_selection_makes_is_seen() -> None:
    """Of four blocks of 16 tokens."""
    good = random_choices(90, SMALL.config, "cpu")
    for token, choice in (
        (3, [0, 1, -1, -1]),
        (3, [-1, -1, -1, -1]),
        (20, [1, 0, -1, -1]),
        (20, [0, 2, -1, -1]),
        (20, [1, -1, -1, -1]),
        (40, [0, 0, 2, -1]),
        (40, [0, 1, 2, 2]),
        (40, [-1, 0, 1, 2]),
        (89, [0, 1, 2, 3]),
        (89, [0, 4, 5, -1]),
        (89, [0, 4, 5, 6]),
    ):
        bad = good.clone()
        bad[token, 1] = torch.tensor(choice)
        assert first_bad_choice(bad, SMALL.config) == (token, 1), choice
    assert first_bad_choice(good, SMALL.config) is None


def test_recorded_choices_are_read_by_layer(tmp_path: Path) -> None:
    path = chosen_file(tmp_path, SMALL, select_block=numpy.int64(16))
    options = replace(SMALL, choices=path)
    with numpy.load(path) as file:
        stored = torch.from_numpy(file["selected"]).int()
    found = recorded_choices(options, 90)
    assert list(found) == [0, 1]
    assert all(torch.equal(found[i], stored[i].transpose(0, 1)) for i in (0, 1))
    assert list(recorded_choices(replace(options, layers=(1,)), 90)) == [1]


def test_choices_that_do_not_match_the_run_are_refused_by_name(tmp_path: Path) -> None:
    good = random_choices(90, SMALL.config, "cpu").transpose(0, 1)[None].short().numpy()
    late = good.copy()
    late[0, 1, 40, 2] = 5
    cases: tuple[tuple[dict[str, Any], dict[str, Any], str], ...] = (
        (
            {},
            {"lengths": (96,)},
            r"\[2, 96, 4\] \(--kv-heads, --lengths and .*, got \[2, 90, 4\] in",
        ),
        ({}, {"kv_heads": 4}, r"\[4, 90, 4\] .*, got \[2, 90, 4\] in "),
        ({}, {"num_selected": 5}, r"\[2, 90, 5\] .*, got \[2, 90, 4\] in "),
        ({}, {"layers": (1,)}, r"layers must be 0 to 0 .*, got 1"),
        ({"select_block": 32}, {}, r"choices must be made with --select-block 16 .*, got 32"),
        (
            {"selected": good[0]},
            {},
            r"choices must be integers selected .*, got 'int16 \[2, 90, 4\]'",
        ),
        (
            {"selected": good.astype("float32")},
            {},
            r"choices must be integers selected .*, got 'float32",
        ),
        (
            {"selected": None, "other": good},
            {},
            r"choices must be integers selected .*, got \['other'\]",
        ),
        (
            {"selected": late},
            {},
            r"choices must be ascending .*, got \[.*5.*\] for token 40 of layer 0, group 1",
        ),
        ({}, {"select_block": 32}, r"--select-block 32\), got .* for token 16 of layer 0, group 0"),
    )
    for arrays, change, message in cases:
        path = chosen_file(tmp_path, SMALL, **{"selected": good, **arrays})
        options = replace(SMALL, choices=path, **change)
        with pytest.raises(ValueError, match=message):
            recorded_choices(options, options.lengths[0])
    path.write_text("no npz")
    with pytest.raises(ValueError, match=r"choices must be an npz file, got .*trained\.npz"):
        recorded_choices(replace(SMALL, choices=path), 90)


# What it counts.


@pytest.mark.parametrize("options", [SMALL, PACKED], ids=["one document", "packed"])
@pytest.mark.parametrize("name", OPERATORS)
def test_right_results_pass(options: Options, name: str) -> None:
    verdict = problem_of(options, name).verdict()
    assert verdict.right, verdict
    # Near enough for a mistake to pass it.
    assert verdict.limit < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("options", [SMALL, PACKED], ids=["one document", "packed"])
def test_the_kernels_pass_in_the_interpreter(options: Options) -> None:
    pytest.importorskip("triton")
    stream, choices = stream_of(replace(options, lengths=(60,), backend="triton"))
    recorded = {"trained": random_choices(60, options.config, "cpu", options.documents)}
    names = []
    for problem in problems(stream, choices, recorded):
        assert problem.verdict().right, problem.name
        names.append((problem.name, problem.choices))
    twice = [(name, label) for name in ("selected_attention", "whole") for label in recorded]
    assert set(names) == {
        (n, "random" if (n, "trained") in twice else "") for n in OPERATORS
    } | set(twice)


class Scaled(torch.autograd.Function):
    """x, with one row's gradient scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row: int, factor: float) -> Tensor:
        ctx.row, ctx.factor = row, factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.clone()
        grad[ctx.row] *= ctx.factor
        return grad, None, None


def with_run(problem: Problem, change: Callable[[Tensor], Tensor]) -> Problem:
    return replace(problem, run=lambda *inputs: change(problem.run(*inputs)))


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "block_selection"])
def test_wrong_results_are_seen(name: str) -> None:
    problem = problem_of(SMALL, name)
    row = 20 if name == "compression" else 70
    wrong: dict[str, Callable[[Tensor], Tensor]] = {
        "a row": lambda out: out * (1 + 0.01 * (torch.arange(len(out)) == row)[:, None, None]),
        "a head": lambda out: out * (1 + 0.01 * (torch.arange(out.shape[1]) == 1)[:, None]),
        "NaN": lambda out: out.where(torch.arange(len(out))[:, None, None] != row, float("nan")),
        "a gradient": lambda out: Scaled.apply(out, row, 1.01),
        "no gradient": lambda out: Scaled.apply(out, row, 0.0),
    }
    for what, change in wrong.items():
        assert not with_run(problem, change).verdict().right, what
    assert problem.verdict().right


def test_a_gradient_of_a_row_that_was_not_sampled_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.bench.judges.SAMPLED", 10)
    problem = problem_of(SMALL, "window_attention")
    assert problem.verdict().right

    class Leaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor) -> Tensor:
            return q.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad + 1e-6

    leaking = replace(problem, run=lambda q, k, v: problem.run(Leaks.apply(q), k, v))
    assert not leaking.verdict().right


def test_scores_are_those_of_the_definition() -> None:
    for documents in (1, 3):
        stream = Stream(replace(SMALL, documents=documents), 90, "cpu")
        size = stream.size
        q = torch.randn(size, 4, 16, dtype=torch.float64)
        k = torch.randn(stream.blocks, 2, 16, dtype=torch.float64)
        found = scores(q, k, torch.arange(size), stream)
        logits = torch.einsum("sgrd,kgd->sgrk", q.unflatten(1, (2, 2)), k) * 0.25
        last = torch.arange(stream.blocks) * 4 + 7
        hidden = (last > torch.arange(size)[:, None])[:, None, None]
        probs = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()
        expected = block_scores(probs, ReferenceOptions.from_config(SMALL.config))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_wrong_choices_are_seen() -> None:
    problem = problem_of(SMALL, "block_selection")
    right = problem.run(*problem.inputs)
    token, group = 89, 1
    chosen = set(right[token, group].tolist())
    free = [block for block in range(6) if block not in chosen]
    # With 6 blocks of which the first and two are forced, one place is free.
    (won,) = chosen - {0, 4, 5}
    assert free

    def with_choice(blocks: list[int], at: int = token) -> bool:
        changed = right.clone()
        changed[at, group] = torch.tensor(blocks)
        return replace(problem, run=lambda *_: changed).verdict().right

    assert with_choice([0, won, 4, 5])
    for blocks in (
        *([0, other, 4, 5] for other in free),
        [won, 0, 4, 5],
        [0, won, 4, -1],
        [*sorted((won, free[0])), 4, 5],
        [0, won, 4, 6],
        [0, 4, 5, 5],
        [0, -1, 4, 5],
    ):
        assert not with_choice(blocks), blocks
    # A token of block 0 has that one.
    assert with_choice([0, -1, -1, -1], at=5)
    for blocks in ([0, 1, -1, -1], [1, -1, -1, -1], [-1, -1, -1, -1], [0, 7, -1, -1]):
        assert not with_choice(blocks, at=5), blocks


# The program but for its clock.


class NoClock:
    """A meter of a machine on which everything takes 2 ms."""

    device, gpu = torch.device("cpu"), "a clock that stands"

    def milliseconds(self, function: Callable[[], Any]) -> float:
        function()
        return 2.0

    def memory_gib(self, function: Callable[[], Any]) -> float:
        function()
        return 1.0

    def peaks(self, dtype: torch.dtype) -> Peaks:
        return Peaks(700.0, 4.0)


@pytest.mark.filterwarnings("ignore:Flash attention")
def test_a_run_gives_a_row_of_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention import SDPBackend

    # What a CPU has; the other is refused there as cuDNN is on some GPUs.
    monkeypatch.setitem(operators.BACKENDS, "cudnn", SDPBackend.MATH)
    path = chosen_file(tmp_path, SMALL)
    table = tmp_path / "out.csv"
    options = replace(SMALL, dense=True, choices=path, layers=(1,), csv=table)
    rows, wrong = operators.bench(options, NoClock())  # type: ignore[arg-type]
    assert wrong == []
    labels = ["random", "trained layer 1"]
    expected = [("dense_cudnn", ""), ("dense_flash", "")]
    for name in OPERATORS:
        chooses = name in ("selected_attention", "whole")
        expected += [(name, label) for label in (labels if chooses else [""])]
    printed = capsys.readouterr().out
    found = [(row.operator, row.choices) for row in rows]
    if "FlashAttention: not measured" in printed:
        expected.remove(("dense_flash", ""))
    assert found == expected
    assert len(printed.splitlines()) == 1 + len(rows) + (("dense_flash", "") not in found)

    flops = operator_flops(options, 90)
    for row in rows:
        name = row.operator if row.operator in OPERATORS else "dense"
        assert row.forward_ms == 2.0
        if flops[name].forward:
            assert row.forward_tflops == pytest.approx(flops[name].forward / 2e9)
        if name != "block_selection":
            assert row.backward_ms == 2.0
        if name != "dense":
            assert row.error is not None and row.limit is not None and row.error <= row.limit
            assert row.forward_over_cudnn == 1.0
            assert row.forward_share == (2.0 if name == "compression" else 1.0)
    assert [(row.operator, row.choices, row.error is None) for row in read_csv(table)] == [
        (row.operator, row.choices, row.error is None) for row in rows
    ]


def test_a_wrong_result_is_not_timed_and_ends_the_program_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def twisted(*args: Any) -> Any:
        for problem in problems(*args):
            yield with_run(problem, lambda out: -out) if problem.name == "combine" else problem

    monkeypatch.setattr(operators, "problems", twisted)
    monkeypatch.setattr(operators, "Meter", lambda _: NoClock())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arguments = command_line(SMALL, "--only", "combine", "window_attention")
    with pytest.raises(SystemExit) as error:
        operators.main(arguments)
    assert "combine at 90: error 2.0e+00, at most" in str(error.value.code)
    printed = capsys.readouterr().out
    assert "WRONG, not timed: combine at 90" in printed
    timed = [text.split()[1] for text in printed.splitlines() if " ms " in text and "|" not in text]
    assert timed == ["window_attention"]
    assert "| window attention |" in printed


def command_line(options: Options, *more: str) -> list[str]:
    sizes = ("heads", "kv_heads", "head_dim", "v_head_dim", "compress_block", "compress_stride")
    sizes += ("select_block", "num_selected", "window", "dtype", "backend")
    pairs = [(f"--{name.replace('_', '-')}", str(getattr(options, name))) for name in sizes]
    lengths = ["--lengths", *map(str, options.lengths)]
    return [*itertools.chain(*pairs), *lengths, "--no-dense", *more]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "softmax"], "only must be one of 'compression', 'compressed_attention'"),
        (["--lengths", "0"], "lengths must be positive multiples of documents = 1, got 0"),
        (["--documents", "7"], "lengths must be positive multiples of documents = 7, got 90"),
        (["--documents", "0"], "documents must be at least 1, got 0"),
        (["--dtype", "int8"], "dtype must be one of 'bfloat16', 'float16', 'float32', got 'int8'"),
        (["--backend", "cuda"], "backend must be one of 'auto', 'pytorch', 'triton', got 'cuda'"),
        (["--choices", "none.npz"], "choices must be an existing file, got 'none.npz'"),
        (["--layers", "1"], "layers must be empty without --choices, got (1,)"),
        (
            ["--csv", "none/here.csv"],
            "csv must be a file in an existing folder, got 'none/here.csv'",
        ),
        (["--kv-heads", "3"], "num_kv_heads must be a divisor of num_heads = 4"),
        (["--repeats-ms", "0"], "repeats_ms must be at least 1, got 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_refused_by_name(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as error:
        operators.main(command_line(SMALL, *arguments))
    assert error.value.code == 2
    output = capsys.readouterr()
    # The message is set in a box, whose lines may break anywhere.
    text = "".join((output.out + output.err).split()).replace("│", "")
    assert message.replace(" ", "") in text


def test_packed_documents_take_no_recorded_choices(tmp_path: Path) -> None:
    path = chosen_file(tmp_path, SMALL)
    with pytest.raises(ValueError, match=r"documents must be 1 with --choices.*, got 3"):
        replace(PACKED, choices=path)


def test_a_machine_without_a_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        operators.main(["--lengths", "64"])
    assert str(error.value.code).startswith("operators.py: the machine must have an NVIDIA GPU")


def test_a_file_that_does_not_match_ends_the_program_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = chosen_file(tmp_path, SMALL)
    monkeypatch.setattr(operators, "Meter", lambda _: NoClock())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arguments = command_line(replace(SMALL, lengths=(90, 96)), "--choices", str(path))
    with pytest.raises(SystemExit) as error:
        operators.main(arguments)
    assert "got [2, 90, 4] in" in str(error.value.code)
    assert "[2, 96, 4] (--kv-heads, --lengths and --num-selected" in str(error.value.code)
    assert capsys.readouterr().out == ""


@pytest.fixture
def _any_algorithm() -> Iterator[None]:
    """Dense attention of cuDNN is not deterministic."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.mark.gpu
@pytest.mark.usefixtures("_any_algorithm")
@pytest.mark.parametrize("documents", [1, 4])
def test_a_run_on_a_gpu_times_everything(tmp_path: Path, documents: int) -> None:
    table = tmp_path / "out.csv"
    sizes = ["--lengths", "1000", "2048", "--heads", "16", "--kv-heads", "1"]
    more = ["--documents", str(documents), "--repeats-ms", "5", "--csv", str(table)]
    operators.main([*sizes, *more])
    rows = read_csv(table)
    assert {row.operator for row in rows} >= {*OPERATORS, "dense_cudnn", "dense_flash"}
    for row in rows:
        assert row.forward_ms > 0 and (row.backward_ms or 1) > 0
        assert row.peak_gib is not None and row.peak_gib > 0
        assert row.forward_of_floor is not None and row.forward_of_floor > 0
        if "attention" in row.operator:
            # Nothing is faster than the GPU: what such a rate would count is wrong.
            assert row.forward_of_floor < 1.1


def test_every_operator_of_a_backend_has_its_row() -> None:
    files = (Path(pytorch.__file__).parent).glob("[!_]*.py")
    # decoding.py times few queries.
    assert {path.stem for path in files} | {"whole"} == {*OPERATORS, "few_queries"}
