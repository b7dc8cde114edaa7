"""From a dense model to a sparse one: ``run.start_from`` with dense layers, in stages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from launch.convert import for_megatron
from launch.data.corpus import load_corpus
from launch.loading import Trained, alone, load
from launch.settings import Settings, to_toml
from launch.storage.checkpoint import checkpoints
from launch.train import held_out_streams
from tests.distributed.ranks import RankError, Ranks
from tests.launch.common import initial_weights, replaced, run_training, tiny
from tests.launch.deepspeed import needs_deepspeed, run_deepspeed
from tests.launch.megatron import needs_megatron, run_megatron
from tests.launch.trained import settings_of, write_run

RanksOf = Callable[[int], Ranks]
SHUT = {"gate_init": [-30.0, 0.0, 0.0]}
NEW = (".gate.", ".k_compressor.", ".v_compressor.")
COVERED = {"window": 160, "num_selected": 20}
"""Window and selected blocks that cover streams of 150 tokens."""


def load_alone(path: Path) -> Trained:
    with alone():
        return load(path)


def sparse(root: Path, source: Path, name: str, **overrides: Mapping[str, Any]) -> Settings:
    """A run of sparse layers that begins with the weights of ``source``."""
    run = {"steps": 3, "log_every": 1, "validate_every": 10, "seed": 7}
    run |= {"folder": str(root / name), "start_from": str(source)}
    options: dict[str, dict[str, Any]] = {"attention": dict(SHUT), "run": run}
    for section, values in overrides.items():
        options.setdefault(section, {}).update(values)
    return tiny(root, **options)


def of_dense(root: Path, ranks_of: RanksOf, name: str, **model: Any) -> Path:
    run = {"steps": 6, "folder": str(root / name)}
    options = {"attention": "dense", **model}
    ranks_of(1).run(run_training, tiny(root, model=options, run=run))
    return root / name


@pytest.fixture(scope="module")
def dense(ranks_of: RanksOf, root: Path) -> Path:
    return of_dense(root, ranks_of, "sparse-from-dense", qk_norm=True, bias=True)


LIKE_DENSE = {"qk_norm": True, "bias": True}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "model, attention",
    [
        pytest.param({}, {}, id="own_keys_and_values"),
        pytest.param({}, {"independent_kv": False, "gate": "mlp"}, id="shared"),
        pytest.param({}, {"branches": ["selected", "window"], "gate": "static"}, id="two_branches"),
        pytest.param({"dense_every": 2}, {"compress": "attention_pool"}, id="hybrid"),
    ],
)
def test_first_weights_are_copies_of_the_dense_ones(
    ranks_of: RanksOf,
    root: Path,
    dense: Path,
    model: dict[str, Any],
    attention: dict[str, Any],
    size: int,
) -> None:
    path = checkpoints(dense)[-1]
    old = load_alone(path).weights
    parallel = {"cp": size, "layout": "contiguous"}
    options = {"model": {**LIKE_DENSE, **model}, "attention": attention, "parallel": parallel}
    settings = sparse(root, path, "sparse-unused", **options)
    for found in ranks_of(size).run(initial_weights, settings):
        assert old.keys() <= found.keys()
        for name, value in found.items():
            if name in old:
                copies = value.view(-1, *old[name].shape)
                assert all(torch.equal(each, old[name].to(value)) for each in copies), name
                several = ".k_" in name or ".v_" in name
                assert several or len(copies) == 1
            else:
                assert any(part in name for part in NEW), name
        gates = "blocks.{}.attention.gate"
        is_sparse = [any(name.startswith(gates.format(i)) for name in found) for i in (0, 1)]
        assert is_sparse == [True, not model]


@pytest.mark.parametrize("attention", [{}, {"independent_kv": False}], ids=["own", "shared"])
def test_a_covered_document_begins_with_the_dense_loss(
    ranks_of: RanksOf, root: Path, dense: Path, attention: dict[str, Any]
) -> None:
    """Validated before the first step; what is not covered begins elsewhere."""
    last = json.loads((dense / "metrics.jsonl").read_text().splitlines()[-1])
    begins = []
    for extent in (COVERED, {}):
        name = f"sparse-covered-{len(attention)}-{len(extent)}"
        options = {"model": LIKE_DENSE, "attention": {**extent, **attention}}
        settings = sparse(root, dense, name, **options)
        ranks_of(1).run(run_training, settings)
        lines = (root / name / "metrics.jsonl").read_text().splitlines()
        first = json.loads(lines[0])
        assert first["step"] == 0
        begins.append(first["validation_loss"] - last["validation_loss"])
    # The compressed gate of 1e-13 is the only difference.
    assert abs(begins[0]) < 1e-9 < abs(begins[1])


def test_it_begins_as_the_adapter_for_transformers_does(
    ranks_of: RanksOf, root: Path, dense: Path
) -> None:
    pytest.importorskip("transformers")
    from launch.hugging_face import to_transformers
    from nsa_dist.adapters.huggingface import convert_to_nsa

    options = {"model": LIKE_DENSE, "attention": {"gate_init": [-10.0, 0.0, 0.0]}}
    settings = sparse(root, dense, "sparse-unused", run={"dtype": "float32"}, **options)
    (path,) = (settings.run.start_from,)
    found = load_alone(Path(path)).transformers("cpu", "float32")
    expected = convert_to_nsa(
        found, replaced(settings, "attention", gate_init=(0.0,) * 3).attention
    )
    start = replaced(settings, "run", start_from=str(checkpoints(dense)[-1]))
    (weights,) = ranks_of(1).run(initial_weights, start)
    ours = to_transformers(weights, settings)
    theirs = expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name].view_as(value), value), name


@pytest.mark.parametrize(
    "only, size",
    [
        pytest.param(["gates"], 1, id="gates", marks=pytest.mark.slow),
        pytest.param(["gates", "compressors"], 2, id="both_cp2"),
    ],
)
def test_a_stage_leaves_all_other_weights_bit_for_bit(
    ranks_of: RanksOf, root: Path, dense: Path, only: list[str], size: int
) -> None:
    """Weight decay too; and all weights move in the stage after it, which begins where it ended."""
    name = f"sparse-stage-{size}"
    options = {
        "model": LIKE_DENSE,
        "attention": {"gate_init": [-4.0, 0.0, 0.0]},
        "parallel": {"cp": size},
    }
    path = checkpoints(dense)[-1]
    stage = sparse(root, path, name, optimizer={"train_only": only, "weight_decay": 0.5}, **options)
    begun = ranks_of(size).run(initial_weights, stage)[0]
    ranks_of(size).run(run_training, stage)
    ended = load_alone(root / name).weights
    trained = {"gates": NEW[:1], "compressors": NEW[1:]}
    moves = tuple(part for each in only for part in trained[each])
    for key, value in begun.items():
        assert torch.equal(ended[key].to(value), value) == (not any(p in key for p in moves)), key

    then = sparse(root, root / name, f"{name}-all", **options)
    results = ranks_of(size).run(run_training, then)
    after = load_alone(root / f"{name}-all").weights
    assert not any(torch.equal(after[key], ended[key]) for key in ended)
    assert len(results[0].losses) == 3


def test_a_stage_resumes_as_itself_alone(ranks_of: RanksOf, root: Path, dense: Path) -> None:
    options = {"model": LIKE_DENSE, "optimizer": {"train_only": ["gates", "compressors"]}}
    whole = sparse(root, dense, "sparse-whole", **options)
    (expected,) = ranks_of(1).run(run_training, whole)
    part = replaced(whole, "run", folder=str(root / "sparse-parted"), steps=1)
    ranks_of(1).run(run_training, part)
    rest = replaced(whole, "run", folder=part.run.folder, start_from="", resume=True)
    (result,) = ranks_of(1).run(run_training, rest)
    assert result.losses == expected.losses[1:]
    more = replaced(replaced(rest, "optimizer", train_only=()), "run", steps=4)
    message = r"optimizer\.train_only must be \('gates', 'compressors'\), the checkpoint's value"
    with pytest.raises(RankError, match=message):
        ranks_of(1).run(run_training, more)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            {"attention": {"gate_init": [0.0, 0.0, 0.0]}},
            r"attention\.gate_init must be logits .* such as \[-4\.0, 0\.0, 0\.0\], where dense",
        ),
        (
            {"attention": {"gate_init": [-4.0, 2.0, 2.0]}},
            r"attention\.gate_init must be logits",
        ),
        (
            {"attention": {"branches": ["compressed", "window"]}},
            r"attention\.branches must be all with 'selected' and 'window'",
        ),
        (
            {"attention": {"compress_hidden": 15}},
            r"attention\.compress_hidden must be None or at least 2 \* attention\.head_dim = 16",
        ),
        ({"attention": {"num_kv_heads": 1}}, r"attention\.num_kv_heads must be 2, as in"),
        ({"attention": {"v_head_dim": 16}}, r"attention\.v_head_dim must be None, as in"),
        ({"model": {"qk_norm": False}}, r"model\.qk_norm must be True, as in"),
        ({"model": {"layers": 3}}, r"model\.layers must be 2, as in"),
    ],
    ids=["gates", "gates_of_two", "branches", "hidden", "heads", "width", "norms", "layers"],
)
def test_what_cannot_become_sparse_is_refused(
    ranks_of: RanksOf, root: Path, dense: Path, overrides: dict[str, Any], message: str
) -> None:
    options = {"model": LIKE_DENSE, **overrides}
    options["model"] = {**LIKE_DENSE, **overrides.get("model", {})}
    with pytest.raises(RankError, match=message):
        ranks_of(1).run(run_training, sparse(root, dense, "sparse-refused", **options))
    assert not checkpoints(root / "sparse-refused")


def test_a_sparse_layer_does_not_become_dense(ranks_of: RanksOf, root: Path) -> None:
    hybrid = {"layers": 4, "dense_every": 4}
    run = {"steps": 1, "folder": str(root / "sparse-hybrid")}
    ranks_of(1).run(run_training, tiny(root, model=hybrid, run=run))
    message = r"model\.dense_every must be 4, as in the checkpoint"
    settings = sparse(
        root, root / "sparse-hybrid", "sparse-refused", model={**hybrid, "dense_every": 2}
    )
    with pytest.raises(RankError, match=message):
        ranks_of(1).run(run_training, settings)
    # Its dense layers become sparse with the others' options.
    settings = sparse(root, root / "sparse-hybrid", "sparse-of-hybrid", model={"layers": 4})
    (result,) = ranks_of(1).run(run_training, settings)
    assert len(result.losses) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"model": {"attention": "dense"}},
            r"empty with model\.attention = 'dense' \(sparse layers have gates\)",
        ),
        (
            {"attention": {"compress": "mean"}},
            r"empty, or of \('gates',\) without repeats, with attention\.compress = 'mean'",
        ),
        ({"optimizer": {"train_only": ["gates", "gates", "compressors"]}}, "empty, or of"),
        (
            {"parallel": {"engine": "deepspeed"}},
            r"\(\) with parallel\.engine = 'deepspeed' \(only 'fsdp2' has other values\)",
        ),
    ],
    ids=["dense", "no_weights", "twice", "engine"],
)
def test_a_stage_of_what_is_not_there_is_refused(
    root: Path, options: dict[str, Any], message: str
) -> None:
    options = {"optimizer": {"train_only": ["gates", "compressors"]}, **options}
    with pytest.raises(ValueError, match=rf"^optimizer\.train_only must be {message}"):
        tiny(root, **options)


@pytest.mark.parametrize("option", ["dry_run", "self_check"])
def test_no_estimate_or_check_of_a_stage(root: Path, option: str) -> None:
    with pytest.raises(
        ValueError, match=rf"run\.{option} must be False with optimizer\.train_only"
    ):
        tiny(root, optimizer={"train_only": ["gates"]}, run={option: True})


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("deepspeed", marks=needs_deepspeed),
        pytest.param("megatron", marks=needs_megatron),
    ],
)
def test_every_engine_begins_with_the_same_sparse_layers(
    deepspeed_ranks: RanksOf, megatron_ranks: RanksOf, ranks_of: RanksOf, root: Path, engine: str
) -> None:
    source = of_dense(root, ranks_of, f"sparse-{engine}-dense")
    parallel = {"layout": "zigzag_per_document", "cp": 2}
    run = {"dtype": "float32"}
    settings = sparse(root, source, f"sparse-{engine}-fsdp2", parallel=parallel, run=run)
    expected, _ = ranks_of(2).run(run_training, settings)
    settings = replaced(settings, "run", folder=str(root / f"sparse-{engine}"))
    settings = replaced(settings, "parallel", engine=engine)
    ranks, train = {
        "deepspeed": (deepspeed_ranks, run_deepspeed),
        "megatron": (megatron_ranks, run_megatron),
    }[engine]
    found, _ = ranks(2).run(train, settings)
    for a, b in zip(found.losses, expected.losses, strict=True):
        assert math.isclose(a, b, rel_tol=1e-5)


@pytest.mark.slow
def test_a_dense_model_of_transformers_comes_in_and_a_sparse_one_goes_out(
    ranks_of: RanksOf, root: Path, tmp_path: Path
) -> None:
    """The recipe of docs/adapters/huggingface.md, over documents that are covered."""
    transformers = pytest.importorskip("transformers")
    from launch.export import ExportOptions
    from launch.export import run as export
    from nsa_dist.adapters.huggingface import from_pretrained

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=256, rms_norm_eps=1e-6, **sizes, **heads)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "dense_model")
    base = tiny(root, model={"attention": "dense"}, run={"dtype": "float32"})
    (tmp_path / "dense.toml").write_text(to_toml(base))
    export(
        ExportOptions(tmp_path / "dense_model", tmp_path / "dense", config=tmp_path / "dense.toml")
    )

    options = {"attention": {**COVERED, "gate_init": [-20.0, 0.0, 0.0], "independent_kv": False}}
    only = {"train_only": ["gates", "compressors"]}
    run = {"dtype": "float32"}
    stage = sparse(root, tmp_path / "dense", "sparse-in", optimizer=only, run=run, **options)
    ranks_of(1).run(run_training, stage)
    lines = (root / "sparse-in" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    (expected,) = ranks_of(1).run(loss_of_transformers, str(tmp_path / "dense_model"), stage)
    assert math.isclose(first["validation_loss"], expected, rel_tol=1e-5)

    then = sparse(root, root / "sparse-in", "sparse-out", run=run, **options)
    ranks_of(1).run(run_training, then)
    export(ExportOptions(root / "sparse-out", tmp_path / "sparse_model"))
    made = from_pretrained(tmp_path / "sparse_model")
    assert type(made).__name__ == "NSALlamaForCausalLM"
    assert made(torch.arange(40)[None]).logits.isfinite().all()


@pytest.mark.slow
def test_a_stage_begins_from_a_folder_too(ranks_of: RanksOf, root: Path, tmp_path: Path) -> None:
    """Its moments are those of what it trains alone."""
    pytest.importorskip("transformers")
    from launch.export import ExportOptions
    from launch.export import run as export

    folder = write_run(tmp_path / "run", settings_of(root, "nsa")).parents[1]
    export(ExportOptions(folder, tmp_path / "model"))
    run = {"dtype": "float32", "steps": 2, "folder": str(tmp_path / "back"), "resume": True}
    stage = tiny(root, optimizer={"train_only": ["gates"]}, run=run)
    (tmp_path / "stage.toml").write_text(to_toml(stage))
    export(ExportOptions(tmp_path / "model", tmp_path / "back", config=tmp_path / "stage.toml"))
    before = load_alone(tmp_path / "back").weights
    (result,) = ranks_of(1).run(run_training, stage)
    assert len(result.losses) == 2
    after = load_alone(tmp_path / "back").weights
    for name, value in before.items():
        assert torch.equal(after[name], value) == (".gate." not in name), name


def loss_of_transformers(folder: str, settings: Settings) -> float:
    """Mean loss of a model of transformers over the streams that a run is validated by."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for stream in held_out_streams(load_corpus(settings.data), settings):
            for piece in stream.tokens[0].split(stream.cu_seqlens.diff().tolist()):
                if piece.numel() > 1:
                    logits = model(piece[None]).logits[0, :-1]
                    total += float(F.cross_entropy(logits, piece[1:], reduction="sum"))
                    count += piece.numel() - 1
    return total / count


def test_a_stage_does_not_go_on_by_an_engine_that_has_none(root: Path, tmp_path: Path) -> None:
    settings = sparse(root, tmp_path, "stage", optimizer={"train_only": ["gates"]})
    must = r"optimizer.train_only must be \(\) for engine megatron to go on, got \('gates',\)"
    with pytest.raises(ValueError, match=must):
        for_megatron(settings)
