"""Libraries that are given the folder of a converted model, each where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from nsa_dist.adapters.huggingface import NSAQwen3ForCausalLM
from tests.adapters.huggingface.small_models import VOCABULARY, some_tokens, sparse_model
from tests.adapters.huggingface.test_peft import NEW_MODULES, PROJECTIONS, lora, train

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model and its tokenizer, of words w00, w01, ..."""
    where = tmp_path / "model"
    sparse_model("qwen3", trained=False).save_pretrained(where)
    words = Tokenizer(WordLevel({f"w{i:02}": i for i in range(VOCABULARY)}, unk_token="w00"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="w01", pad_token="w00"
    ).save_pretrained(where)
    return where


def _text(tokens: Any) -> str:
    return " ".join(f"w{int(token):02}" for token in tokens)


def test_lm_evaluation_harness(folder: Path) -> None:
    """Log-likelihoods of rows in one padded batch are those of the model, row by row."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), device="cpu", batch_size=3, dtype="float32")
    assert type(model.model) is NSAQwen3ForCausalLM
    rows = [some_tokens(1, n, seed=n)[0] for n in (50, 31, 12)]
    requests = [
        Instance("loglikelihood", {}, (_text(row[:-4]), " " + _text(row[-4:])), i)
        for i, row in enumerate(rows)
    ]
    found = model.loglikelihood(requests, disable_tqdm=True)
    plain = NSAQwen3ForCausalLM.from_pretrained(folder)
    for row, (value, greedy) in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = plain(row[None]).logits[0, -5:-1].double()
        expected = float(logits.log_softmax(-1).gather(1, row[-4:, None]).sum())
        assert abs(value - expected) <= 1e-4 * abs(expected)
        assert greedy == bool((logits.argmax(-1) == row[-4:]).all())
    generated = model.generate_until(
        [Instance("generate_until", {}, (_text(rows[1]), {"until": [], "max_gen_toks": 6}), 0)],
        disable_tqdm=True,
    )
    with torch.no_grad():
        tokens = plain.generate(rows[1][None], max_new_tokens=6, do_sample=False)[0, len(rows[1]) :]
    assert generated[0].split() == _text(tokens).split()


def test_sft_by_folder_and_auto_peft(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    from datasets import Dataset
    from peft import AutoPeftModelForCausalLM, LoraConfig
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=str(folder),
        args=SFTConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            max_length=64,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list([{"text": _text(some_tokens(1, 50)[0])} for _ in range(8)]),
        peft_config=LoraConfig(
            r=4, target_modules=PROJECTIONS, modules_to_save=NEW_MODULES, task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(loaded.get_base_model()) is NSAQwen3ForCausalLM
    tokens = some_tokens(1, 40)
    model = trainer.model.eval()
    with torch.no_grad():
        found, expected = (x(input_ids=tokens).logits for x in (loaded, model))
        plain = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)


def test_qlora(folder: Path) -> None:
    """Projections of 4 bits, LoRA beside them, and the new weights whole."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, llm_int8_skip_modules=["lm_head", r".*self_attn\.gate"]
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}
    )
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.k_proj, bitsandbytes.nn.Linear4bit)
    model = lora(prepare_model_for_kbit_training(model)).train()
    trained = {name: x.detach().clone() for name, x in model.named_parameters() if x.requires_grad}
    assert any("gate" in name for name in trained)
    losses = train(model)
    assert losses[-1] < losses[0]
    found = dict(model.named_parameters())
    assert [name for name, x in trained.items() if torch.equal(found[name], x)] == []


def test_torchao_weights_are_refused_before_anything_changes() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    from nsa_dist.adapters.huggingface import convert_to_nsa
    from tests.adapters.huggingface.small_models import INDEPENDENT, dense_model

    model = dense_model("qwen3")
    quantize_(model, Int8WeightOnlyConfig())
    tokens = some_tokens(1, 20)
    with torch.no_grad():
        expected = model(tokens).logits
        with pytest.raises(ValueError, match=r"q_proj\.weight must be a whole .*quantises it.*"):
            convert_to_nsa(model, INDEPENDENT)
        assert torch.equal(model(tokens).logits, expected)
    assert type(model).__name__ == "Qwen3ForCausalLM"
