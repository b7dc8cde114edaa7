"""The comparison with flash_nsa but for its clock and flash_nsa, in whose place stands ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("numpy")

from torch.nn.attention import SDPBackend

from launch.bench import compare, operators, peers
from launch.bench.problems import problems
from launch.bench.stream import Stream
from launch.bench.table import read_csv
from nsa_dist import native_sparse_attention
from tests.launch.bench.test_bench import SMALL, NoClock

SHARED = replace(SMALL, v_head_dim=16, compress="mean", independent_kv=False)
PACKAGE = """
class NSAConfig:
    def __init__(self, **options): self.options = options
class HFNSACore:
    def __init__(self, config):
        from tests.launch.bench.test_bench_peers import attend
        assert config.options["window_size"] == 19
        self.run = attend
    def __call__(self, q, k, v, logits, bounds):
        return FACTOR * self.run(q, k, v, logits, bounds)
"""


def attend(*inputs: torch.Tensor) -> torch.Tensor:
    """flash_nsa's attention by ours: q, k, v, logits of the gates, bounds."""
    q, k, v, logits, bounds = inputs
    config = SHARED.config
    compressors = Stream(SHARED, 90, "cpu").compressors
    return native_sparse_attention(
        *(q[None], k[None], v[None], logits.sigmoid()[None], *compressors),
        config=config,
        cu_seqlens=bounds,
        backend="pytorch",
    )[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package flash_nsa that is right."""
    # What a CPU has.
    monkeypatch.setitem(operators.BACKENDS, "cudnn", SDPBackend.MATH)
    package = tmp_path / "flash_nsa"
    (package / "modules").mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE.replace("FACTOR", "1"))
    (package / "modules" / "__init__.py").touch()
    (package / "modules" / "hf_level_nsa.py").touch()
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_nsa"]:
        del sys.modules[name]


def options_of(folder: Path, **options: object) -> peers.PeersOptions:
    names = ("lengths", "heads", "kv_heads", "head_dim", "v_head_dim", "compress_block")
    names += ("compress_stride", "select_block", "num_selected", "window", "dtype", "backend")
    values = {name: getattr(SHARED, name) for name in names}
    return peers.PeersOptions(folder=folder, **(values | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("documents", [1, 3])
def test_a_run_gives_three_rows_of_each_kind_of_data(folder: Path, documents: int) -> None:
    csv = folder / "out.csv"
    options = options_of(folder, documents=documents, csv=csv)
    rows, wrong = peers.compare(options, NoClock())  # type: ignore[arg-type]
    assert wrong == []
    names = ("dense_cudnn", "whole", "flash_nsa")
    assert [(row.shape.data, row.operator) for row in rows] == [
        (kind, name) for kind in ("random", "coherent") for name in names
    ]
    assert all(row.error is None or row.error < 1e-4 for row in rows)
    assert read_csv(csv)[-1].shape == rows[-1].shape
    text = peers.markdown(rows)
    assert text.count("### ") == 2 and "shared keys and values, coherent data" in text
    assert "| 90 | 2.00 / 2.00 | 1.00 | 2.00 / 2.00 | 1.00 / 1.00 | 1.00 |" in text


def test_a_wrong_peer_is_not_timed_and_ends_the_program_with_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "flash_nsa" / "__init__.py"
    path.write_text(PACKAGE.replace("FACTOR", "1.2"))
    monkeypatch.setattr(peers.tyro, "cli", lambda *_, **__: options_of(folder))
    monkeypatch.setattr(compare, "Meter", lambda _: NoClock())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match=r"flash_nsa, 90 tokens, random data: 2\.0e-01 from ours"):
        peers.main([])


def test_other_folders_and_settings_are_refused_by_name(folder: Path) -> None:
    with pytest.raises(ValueError, match="folder must be one that has the package flash_nsa, got"):
        options_of(folder / "flash_nsa")
    with pytest.raises(ValueError, match="compress must be mean, which flash_nsa has, got 'mlp'"):
        options_of(folder, compress="mlp")
    with pytest.raises(ValueError, match="independent_kv must be False, as in flash_nsa, got True"):
        options_of(folder, independent_kv=True)


@pytest.mark.parametrize("documents", [1, 3])
@pytest.mark.parametrize("data", ["random", "coherent"])
def test_a_mean_and_shared_keys_are_right(data: str, documents: int) -> None:
    options = replace(SHARED, data=data, documents=documents)
    stream = Stream(options, 90, "cpu")
    (problem,) = problems(stream, torch.empty(0), {}, ("whole",))
    assert len(problem.inputs) == 4  # q, gates, k and v.
    assert problem.verdict().right


def test_neighbours_choose_alike_on_coherent_data() -> None:
    options = replace(SHARED, head_dim=64, v_head_dim=64, num_selected=8, select_block=32)
    options = replace(options, compress_block=32, compress_stride=16, heads=8)
    unions = {}
    for data in ("random", "coherent"):
        stream = Stream(replace(options, data=data), 2048, "cpu")
        with torch.no_grad():
            details = native_sparse_attention(
                *(stream.q[None], stream.k[None], stream.v[None], stream.gates[None]),
                *stream.compressors,
                config=stream.config,
                backend="pytorch",
                return_details=True,
            )[1]
        chosen = details.selected[0, 1024:].long()  # type: ignore[index]
        hot = torch.zeros(*chosen.shape[:2], stream.select_blocks).scatter_(2, chosen, 1.0)
        of_four = hot.view(-1, 4, *hot.shape[1:]).amax(1)
        unions[data] = float(of_four.sum(-1).mean() / hot.sum(-1).mean())
    assert unions["coherent"] < 1.9 < 2.3 < unions["random"]
