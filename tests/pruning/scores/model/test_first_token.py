"""The id that a text begins after: one in training, scores, tasks and the harness."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from evaluation import inference
from evaluation.inference import InferenceConfig, Pair
from evaluation.tasks import judged
from models import weights
from models.config import DecoderConfig
from models.model import Model
from pruning.corpus.tokenizers import load_tokenizer
from pruning.data.objectives import CausalLM
from pruning.scores.model.likelihood import Likelihood
from pruning.scores.model.scorer import Documents

STARTS = {  # style: (the start, whether the model's configuration names it)
    "llama3": ("<|begin_of_text|>", True),
    "gemma": ("<bos>", False),
    "qwen": ("<|im_end|>", False),  # neither names a BOS: the end of the text before
    "gpt2": ("<|endoftext|>", True),
    "t5": (0, False),  # padding, as models trained here on T5's vocabularies begin
}


@pytest.mark.parametrize("style", STARTS)
def test_the_first_token_follows_the_same_id_everywhere(
    style, tokenizer_of, small_vocabulary_file, tmp_path
):
    path = small_vocabulary_file if style == "t5" else tokenizer_of(style)
    tokenizer = load_tokenizer(str(path))
    start, named = STARTS[style]
    start = start if isinstance(start, int) else tokenizer._id(start)
    config = DecoderConfig(
        vocab_size=tokenizer.size, d_model=8, d_ff=8, num_layers=1, num_heads=1, num_kv_heads=1,
        head_dim=8, bos_id=start if named else None, eos_id=tokenizer.eos_id,
        initializer_range=1.0,
    )  # fmt: skip
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    weights.save(tmp_path / "model", model, params)
    for name, content in tokenizer.files().items():
        (tmp_path / "model" / name).write_bytes(content)
    asked = inference.load(
        InferenceConfig(str(tmp_path / "model"), None, 128, 8, compilation_cache=None)
    )
    ids = tokenizer.encode("the river and the garden")

    windows = Likelihood("causal", 64, 16).prepare(model, tokenizer).windows(Documents.of([ids]))
    scored = windows.sides[-1].features
    assert scored["decoder_input_tokens"].tolist() == [start, *ids[:-1]]
    assert scored["decoder_target_tokens"].tolist() == ids and (windows.source >= 0).all()
    chunk = CausalLM().batch([{"targets": np.asarray(ids)}], 1, len(ids), tokenizer)
    assert chunk["decoder_input_tokens"][0].tolist() == [start, *ids[:-1]]
    assert judged._given(asked, {"inputs": "", "targets": ""}) == [start]
    harness = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from evaluation.harness_model import WinnowLM

    assert harness and WinnowLM(asked).prefix_token_id == start
    table = jax.nn.log_softmax(model.bind(params)({"decoder_input_tokens": np.array([[start]])}))
    found, _ = asked.log_likelihoods([Pair([start], ids[:1])])
    assert found[0] == pytest.approx(float(table[0, 0, ids[0]]), rel=1e-5)
