"""What is shown of a model's inside is what its layers did, and the page lights it up."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from launch.inspect_attention import InspectOptions, choice_map, gate_map, main, run
from launch.loading import alone, load
from launch.reporting.pictures import shade
from tests.launch.trained import settings_of, write_run

Image = pytest.importorskip("PIL.Image")
TEXT = b"red <b>green</script> \xc3\xa9 blue " * 9
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


def looked(root: Path, tmp_path: Path, kind: str, **options: Any) -> Any:
    write_run(tmp_path / "run", settings_of(root, kind))
    (tmp_path / "text").write_bytes(TEXT)
    arguments = {"dtype": "float64", "out": tmp_path / "out", **options}
    return run(InspectOptions(tmp_path / "run", tmp_path / "text", **arguments), lambda _: None)


def data_of(page: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    data: dict[str, Any] = json.loads(found)
    return data


@pytest.mark.parametrize("kind", ["nsa", "shared", "hybrid"])
def test_the_page_has_what_the_layers_did(root: Path, tmp_path: Path, kind: str) -> None:
    inside = looked(root, tmp_path, kind)
    settings = settings_of(root, kind)
    with alone():
        model = load(tmp_path / "run").decoder("cpu", "float64")
    x, choices, gates = model.embedding(torch.tensor([list(TEXT)])), [], []
    for layer, block in enumerate(model.blocks):
        if settings.model.is_dense(layer):
            x = block(x)
        else:
            x, details = block(x, return_details=True)
            choices.append(details.selected[0])
            heads = details.gates[0].unflatten(1, (settings.attention.num_kv_heads, -1))
            gates.append(heads.mean(2))
    assert inside.layers == {"hybrid": (0, 2)}.get(kind, (0, 1))
    assert torch.equal(inside.selected, torch.stack(choices).to(torch.int16))
    torch.testing.assert_close(inside.gates.double(), torch.stack(gates), rtol=1e-6, atol=1e-6)

    data = data_of((tmp_path / "out" / "attention.html").read_text("utf-8"))
    shape = inside.selected.shape
    written = numpy.frombuffer(base64.b64decode(data["chosen"]), dtype="<i2").reshape(shape)
    assert (written == inside.selected.numpy()).all()
    shown = numpy.frombuffer(base64.b64decode(data["gates"]), dtype="u1")
    assert abs(shown.reshape(inside.gates.shape) / 255 - inside.gates.numpy()).max() < 0.002
    assert data["tokens"][:8] == list("red <b>g")
    assert data["tokens"][22:24] == ["⟨c3⟩", "⟨a9⟩"]
    assert (data["n"], data["size"], data["layers"]) == (4, 8, list(inside.layers))


def test_the_map_shows_shares_of_queries() -> None:
    """1,024 queries and 16 blocks on 256 x 256 pixels: each pixel has four queries."""
    selected = torch.full((1024, 2), -1, dtype=torch.int16)
    selected[:, 0] = 0
    selected[512:, 1] = 3
    selected[1022:, 1] = 5
    found = choice_map(selected, 64)
    assert found.shape == (256, 256)
    assert (found[:, :16] == 1).all()  # A block is 16 pixels wide.
    assert (found[128:255, 48:64] == 1).all() and (found[:128, 48:64].nan_to_num() == 0).all()
    assert (found[255, 48:64] == 0.5).all() and (found[255, 80:96] == 0.5).all()
    assert found[0, 16:].isnan().all() and not found[255].isnan().any()
    assert choice_map(selected[:10, :1], 4).shape == (256, 256)


def test_pictures_have_a_map_for_each_group(root: Path, tmp_path: Path) -> None:
    inside = looked(root, tmp_path, "nsa", layers=(1,), length=100)
    assert inside.selected.shape[:2] == (1, 100)
    image = Image.open(tmp_path / "out" / "choices.png")
    assert image.width > 2 * 256 and image.height > 256
    colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert {shade(0.0), shade(1.0), shade(float("nan"))} <= colours
    gates = inside.gates.mean(2)[0]
    scaled = (gates - gates.min()) / (gates.max() - gates.min())
    image = Image.open(tmp_path / "out" / "gates.png")
    colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert {shade(round(255 * x) / 255) for x in scaled.flatten().tolist()} <= colours


def test_a_checkpoint_of_the_working_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_run(tmp_path / "run", settings_of(root, "nsa"))
    monkeypatch.chdir(path.parent)
    Path("text").write_bytes(TEXT)
    run(InspectOptions(Path(path.name), Path("text"), out=tmp_path), lambda _: None)
    data = data_of((tmp_path / "attention.html").read_text("utf-8"))
    assert data["title"] == "text: blocks that run step 3 chose"


def test_gates_are_means_over_positions() -> None:
    gates = torch.linspace(0, 1, 2048).repeat(3, 1)
    gates[1] = 0.5
    found = gate_map(gates)
    assert found.shape == (48, 512)
    assert (found[16:32] == 0.5).all()
    torch.testing.assert_close(found[0], gates[0].unflatten(0, (512, 4)).mean(1))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which is not here")
def test_a_token_lights_up_its_blocks_in_a_browser(root: Path, tmp_path: Path) -> None:
    inside = looked(root, tmp_path, "nsa")
    assert CHROMIUM is not None
    line = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    address = (tmp_path / "out" / "attention.html").as_uri()

    def lit(layer: int, group: int, token: int) -> dict[int, float]:
        where = f"{address}#token={token}&layer={layer}&group={group}"
        done = subprocess.run([*line, where], capture_output=True, text=True, timeout=120)
        assert f'class="token query" data-token="{token}"' in done.stdout, done.stderr
        blocks = re.findall(r'<span class="block" [^>]*>', done.stdout)
        shares = [re.search(r'data-share="([0-9.]+)"', block) for block in blocks]
        return {i: float(share[1]) for i, share in enumerate(shares) if share}

    token = len(TEXT) - 3
    expected = [b for b in inside.selected[1, token, 1].tolist() if b >= 0]
    assert lit(1, 1, token) == dict.fromkeys(expected, 1.0)
    both = inside.selected[:, token].flatten().tolist()
    assert lit(-1, -1, token) == {
        b: pytest.approx(both.count(b) / 4, abs=1e-3) for b in set(both) if b >= 0
    }


WRONG = {
    "dense": (("dense",), r"CHECKPOINT must be of a run with sparse layers, got \"?'?model.attent"),
    "layer": (("hybrid", "--layers", "1"), r"layers must be some of the sparse layers, \(0, 2\), "),
    "text": (("nsa", "elsewhere"), r"TEXT must be an existing file, got "),
    "length": (("nsa", "--length", "1"), r"length must be at least 2, got 1"),
    "empty": (("nsa", "empty"), r"TEXT must be a file of two tokens or more"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_ends_in_one_sentence(
    case: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (kind, *options), message = WRONG[case]
    write_run(tmp_path / "run", settings_of(root, kind))
    text = tmp_path / "text"
    text.write_bytes(b"" if options == ["empty"] else TEXT)
    if options == ["elsewhere"]:
        text = tmp_path / "elsewhere"
    given = options if options and options[0].startswith("--") else []
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "run"), str(text), *given, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()
