"""The training example: its corpus, its tokenizer, its model and its loop, on a toy corpus."""

import pathlib
import sys

import jax
import numpy as np
import pytest
import sentencepiece
from flax import nnx, traverse_util

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))

from embedded_model import corpus, evaluation, export, training
from embedded_model.model import QUERY_BLOCK, LlamaConfig

VOCAB_SIZE = 350
TINY = LlamaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
AWKWARD = 'def f(a):\n     if a:\r\n\t\treturn "é 日本 🙂"   \n\n' + " " * 23 + "x\x00 <s> </s> <unk> <0x41>\n  "


@pytest.fixture(autouse=True)
def _jax_defaults():
    """The example is a user's program: it runs under jax's own promotion rules."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def documents() -> list[corpus.Document]:
    text = "class Thing{0}:\n    def method_{0}(self, value):\n        return self.other(value) + {0}\n"
    return [corpus.Document(f"thing/{i}.py", text.format(i) * 3) for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer(documents) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=corpus.train_tokenizer(documents, VOCAB_SIZE))


@pytest.fixture(scope="module")
def stream(documents, tokenizer) -> corpus.TokenStream:
    return corpus.TokenStream.pack(documents, tokenizer)


def test_collect_keeps_distinct_code(tmp_path):
    (tmp_path / "a.py").write_text("import os\n")
    (tmp_path / "b.py").write_text("import os\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "table.py").write_text("table = [" + ", ".join(map(hex, range(500))) + "]\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "c.py").write_text("import sys\n")
    assert corpus.collect(tmp_path) == [corpus.Document("a.py", "import os\n")]


def test_split_depends_on_the_path_alone(documents):
    train, held_out = corpus.split(documents)
    assert sorted(train + held_out, key=documents.index) == documents
    assert 0 < len(held_out) < 0.05 * len(documents)
    edited = [corpus.Document(document.path, "pass\n") for document in reversed(documents)]
    assert {document.path for document in corpus.split(edited)[1]} == {document.path for document in held_out}


def test_tokenizer_returns_the_text(tokenizer):
    assert tokenizer.decode(tokenizer.encode(AWKWARD)) == AWKWARD
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, -1)


@pytest.mark.parametrize("piece", ["\n", *(" " * width for width in corpus.INDENTS)])
def test_newlines_and_indents_are_one_token(tokenizer, piece):
    assert len(tokenizer.encode(piece + "return")) == 1 + len(tokenizer.encode("return"))


def test_tokenizer_is_deterministic(documents, tokenizer):
    assert corpus.train_tokenizer(documents, VOCAB_SIZE) == tokenizer.serialized_model_proto()


def test_training_window_opens_a_line_behind_a_bos(stream, tokenizer):
    windows = corpus.training_windows(stream, 16, seed=0)
    for inputs, targets in (next(windows) for _ in range(100)):
        assert inputs[0] == corpus.BOS
        assert targets[0] != corpus.BOS
        np.testing.assert_array_equal(inputs[1:], targets[:-1])
        assert tokenizer.decode(targets[targets > corpus.EOS].tolist()).startswith(("class", "    def", "        return"))


def test_evaluation_windows_score_every_token_once(stream):
    inputs, targets = corpus.evaluation_windows(stream, 100)
    np.testing.assert_array_equal(targets.reshape(-1)[: len(stream.tokens)], stream.tokens)
    assert (targets.reshape(-1)[len(stream.tokens) :] == corpus.BOS).all()
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])


def test_bigram_beats_unigram(stream):
    unigram = evaluation.unigram_losses(stream.tokens, np.arange(VOCAB_SIZE), VOCAB_SIZE)
    assert np.exp(-unigram).sum() == pytest.approx(1, abs=1e-3)  # all but bos, which has the 1 of add-one smoothing
    bigram = evaluation.bigram_losses(stream.tokens, stream.tokens, VOCAB_SIZE)
    assert bigram.mean() < 0.5 * evaluation.unigram_losses(stream.tokens, stream.tokens, VOCAB_SIZE).mean()


def test_attention_is_causal_across_query_blocks():
    graphdef, state = training.initial_state(TINY, training.TrainConfig(steps=10))
    tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, (1, QUERY_BLOCK + 40)).astype(np.int32)
    changed = tokens.copy()
    changed[0, QUERY_BLOCK + 20] = 3 + (tokens[0, QUERY_BLOCK + 20] - 2) % (VOCAB_SIZE - 3)

    @jax.jit
    def logits(tokens):
        return nnx.merge(graphdef, state.params)(tokens)

    before, after = logits(tokens)[0], logits(changed)[0]
    np.testing.assert_array_equal(before[: QUERY_BLOCK + 20], after[: QUERY_BLOCK + 20])
    assert np.abs(before[QUERY_BLOCK + 20 :] - after[QUERY_BLOCK + 20 :]).max(axis=1).min() > 0


def test_steps_reduce_the_loss_and_resume_where_they_stopped(stream, tmp_path):
    train = training.TrainConfig(steps=6, tokens_per_step=256, phases=((32, 1.0),), warmup_steps=1)
    graphdef, fresh = training.initial_state(TINY, train)
    names = traverse_util.flatten_dict(export.parameter_tree(fresh.params), sep="/")
    assert names["layers/0/self_attn/k_proj/kernel"].shape == (32, 16)
    assert names["embed_tokens/embedding"].shape == (VOCAB_SIZE, 32)
    assert len(names) == 2 + 9 * TINY.num_hidden_layers

    def run(state: training.TrainState, last: int) -> list[float]:
        losses = []
        for inputs, targets in training.batches(stream, train, state.step):
            if state.step == last:
                break
            state.params, state.opt_state, loss = training.train_step(
                state.params, state.opt_state, inputs, targets, graphdef=graphdef, train=train
            )
            state.step += 1
            losses.append(float(loss))
        return losses

    first = run(fresh, 3)
    training.save_state(tmp_path / "state.npz", fresh)
    rest = run(fresh, 6)
    assert rest[-1] < first[0] - 0.1
    resumed = training.restore_state(tmp_path / "state.npz", training.initial_state(TINY, train)[1])
    assert run(resumed, 6) == rest
