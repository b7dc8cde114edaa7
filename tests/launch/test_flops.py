"""Operations of a step, counted one by one, and what a run logs of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from launch.data.corpus import PackedStreams, load_corpus
from launch.model import Decoder
from launch.processes.ranks import Ranks as RunRanks
from launch.reporting.flops import Speed, StepFlops, peak_flops
from launch.reporting.report import Report
from launch.settings import OptimizerSettings, Settings, from_table
from nsa_dist import NSAConfig
from tests.distributed.ranks import Ranks
from tests.launch.common import TINY, run_training, tiny
from tests.launch.test_report import VALUES, scalars

RanksOf = Callable[[int], Ranks]
PACKED = torch.tensor([0, 1, 38, 38, 50, 150], dtype=torch.int32)


def settings_of(**overrides: dict[str, Any]) -> Settings:
    table = {section: dict(TINY[section]) for section in ("attention", "model")}
    for section, options in overrides.items():
        table[section].update(options)
    return from_table(Settings, table)


def pairs_one_by_one(config: NSAConfig, lengths: list[int]) -> dict[str, int]:
    """(query, key) pairs of a head by the definition, each query on its own."""
    found = dict.fromkeys(("compressed", "selected", "window", "dense"), 0)
    for length in lengths:
        for t in range(length):
            ends = range(config.compress_block - 1, t + 1, config.compress_stride)
            found["compressed"] += len(ends)
            earlier = min(t // config.select_block, config.num_selected - 1)
            found["selected"] += earlier * config.select_block + t % config.select_block + 1
            found["window"] += min(t + 1, config.window)
            found["dense"] += t + 1
    return found


@pytest.mark.parametrize(
    "attention",
    [
        {},
        {"v_head_dim": 12, "compress": "mean"},
        {"branches": ["selected", "window"], "independent_kv": False},
        {"branches": ["window"]},
    ],
    ids=["all", "mean", "without_compressed", "window"],
)
def test_attention_is_that_of_each_query(attention: dict[str, Any]) -> None:
    settings = settings_of(attention=attention)
    config, count = settings.attention, StepFlops(settings, 256)
    pairs = pairs_one_by_one(config, PACKED.diff().tolist())
    widths = config.head_dim + config.value_dim
    expected = sum(6.0 * widths * config.num_heads * pairs[name] for name in config.branches)
    if "compressed" not in config.branches and "selected" in config.branches:
        expected += 2.0 * config.head_dim * config.num_heads * pairs["compressed"]
    if config.compress == "mlp" and config.uses_compression:
        # Two products of each compressed token of each KV head, of keys and of values.
        hidden, rows = 2 * config.head_dim, config.compress_block * config.head_dim
        made = 150 / config.compress_stride * config.num_kv_heads
        expected += 2 * 6 * made * hidden * (rows + config.head_dim)
    found = count.of([PACKED]) - 6.0 * count.weights * 150
    assert math.isclose(found, settings.model.layers * expected, rel_tol=1e-12)
    assert count.of([PACKED, PACKED]) == 2 * count.of([PACKED])


def test_dense_layers_count_every_pair_and_others_do_not() -> None:
    dense, hybrid = (
        settings_of(model={"layers": 4, **model})
        for model in ({"attention": "dense"}, {"dense_every": 2})
    )
    one = 6.0 * 16 * 4 * pairs_one_by_one(dense.attention, PACKED.diff().tolist())["dense"]
    count = StepFlops(dense, 256)
    assert math.isclose(count.of([PACKED]), 6.0 * count.weights * 150 + 4 * one, rel_tol=1e-12)
    nsa = StepFlops(settings_of(model={"layers": 2}), 256)
    sparse = nsa.of([PACKED]) - 6.0 * nsa.weights * 150
    count = StepFlops(hybrid, 256)
    found = count.of([PACKED]) - 6.0 * count.weights * 150
    assert math.isclose(found, sparse + 2 * one, rel_tol=1e-12)
    # At a length that matters: far fewer than dense attention would be.
    long = torch.tensor([0, 65536], dtype=torch.int32)
    all_dense = StepFlops(settings_of(model={"attention": "dense"}), 256).of([long])
    assert StepFlops(settings_of(), 256).of([long]) < all_dense / 2


def test_a_stage_leaves_out_the_gradients_of_what_it_does_not_train() -> None:
    settings = settings_of()
    stage = replace(settings, optimizer=OptimizerSettings(train_only=("gates", "compressors")))
    whole, part = StepFlops(settings, 256), StepFlops(stage, 256)
    gates = sum(
        p.numel()
        for name, p in Decoder(settings, 256).named_parameters()
        if name.endswith("gate.proj.weight")
    )
    assert part.weights == whole.weights == whole.trained
    assert part.trained == gates
    rest = 2.0 * (whole.weights - gates) * 150
    assert whole.of([PACKED]) - part.of([PACKED]) == rest


def test_a_stage_that_distils_has_neither_head_nor_whole_backward() -> None:
    """Matrices run forward, gates get gradients, and dense attention is added."""
    settings = settings_of()
    only = OptimizerSettings(train_only=("gates", "compressors"), distill_dense=True)
    stage = StepFlops(replace(settings, optimizer=only), 256)
    whole = StepFlops(settings, 256)
    head = 256 * settings.model.hidden_size
    config, layers = settings.attention, settings.model.layers
    dense = 2.0 * (config.head_dim + config.value_dim) * config.num_heads
    dense *= sum(n * (n + 1) / 2 for n in PACKED.diff().tolist())
    saved = 6.0 * whole.weights - 2.0 * (whole.weights - head) - 2.0 * stage.trained
    assert math.isclose(
        whole.of([PACKED]) - stage.of([PACKED]), saved * 150 - layers * dense, rel_tol=1e-12
    )


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_that_torch_multiplies_with(tied: bool) -> None:
    """Of a dense model, whose other products are those of its attention."""
    settings = settings_of(model={"attention": "dense", "tie_embeddings": tied})
    model, tokens = Decoder(settings, 256), torch.arange(64)[None]
    model.reset_parameters(0)
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).float().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    # Logits are computed again in backward, which does not count.
    again = 2 * 256 * settings.model.hidden_size * 64
    assert products - again == 6 * StepFlops(settings, 256).weights * 64


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_are_found_by_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def speed(dtype: str, device: str, size: int = 4) -> Speed:
    settings = replace(settings_of(), run=replace(settings_of().run, dtype=dtype))
    ranks = mock.Mock(spec=RunRanks, size=size, device=torch.device(device))
    with mock.patch("torch.cuda.get_device_name", return_value="NVIDIA H200"):
        return Speed(settings, ranks)


def test_metrics_have_torchtitans_names() -> None:
    found = speed("bfloat16", "cuda").metrics(tokens=8000, flops=989e12, seconds=2.0, steps=10)
    expected = {
        "throughput(tps)": 1000.0,
        "tflops": 989 / 8,
        "mfu(%)": 12.5,
        "time_metrics/end_to_end(s)": 0.2,
    }
    assert found == pytest.approx(expected)
    for other in (speed("float32", "cuda"), speed("auto", "cpu")):
        metrics = other.metrics(tokens=8000, flops=989e12, seconds=2.0, steps=10)
        assert metrics.keys() == expected.keys() - {"mfu(%)"}


def test_the_line_and_the_logs_have_them(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {**VALUES, "tokens_per_second": 4000.0, "throughput(tps)": 1000.0, "tflops": 123.6}
    with Report(
        tiny(root, run={"tensorboard": True}), tmp_path, active=True, first_step=0
    ) as report:
        report.step({"step": 1, **values, "mfu(%)": 12.54}, {})
        report.step({"step": 2, **values}, {})
    first, second = capsys.readouterr().out.splitlines()
    assert "4,000 tokens/s (1,000 a rank)  124 TFLOP/s  MFU 12.5%  0 B" in first
    assert "MFU" not in second
    assert scalars(tmp_path, "mfu(%)") == [(1, pytest.approx(12.54))]
    assert [step for step, _ in scalars(tmp_path, "throughput(tps)")] == [1, 2]


@pytest.mark.parametrize(
    "size, cp",
    [
        pytest.param(2, 2, id="cp2"),
        pytest.param(1, 1, id="one", marks=pytest.mark.slow),
        pytest.param(2, 1, id="dp2", marks=pytest.mark.slow),
    ],
)
def test_a_run_logs_the_operations_of_its_streams(
    ranks_of: RanksOf, root: Path, size: int, cp: int
) -> None:
    """All of them, whatever ranks share them."""
    run = {"steps": 3, "folder": str(root / f"flops-{size}-{cp}"), "log_every": 1}
    settings = tiny(root, data={"global_batch": 4}, parallel={"cp": cp}, run=run)
    ranks_of(size).run(run_training, settings)
    streams = PackedStreams(load_corpus(settings.data).training, settings.data.length, 0)
    count = StepFlops(settings, 256)
    lines = (root / f"flops-{size}-{cp}" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    for step, record in enumerate(records):
        documents: list[Tensor] = [streams[4 * step + i].cu_seqlens for i in range(4)]
        seconds = 600 / record["tokens_per_second"]
        done = record["tflops"] * 1e12 * seconds * size
        assert math.isclose(done, count.of(documents), rel_tol=1e-9)
        assert math.isclose(record["throughput(tps)"] * size, record["tokens_per_second"])
        assert math.isclose(record["time_metrics/end_to_end(s)"], seconds)
    assert len(records) == 3
