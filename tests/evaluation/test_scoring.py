"""Scores of single tokens against transformers' Llama with the same weights."""

from pathlib import Path

import numpy as np
import pytest

from tests.evaluation.conftest import hugging_face, opened

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


def expected(model, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    given = torch.from_numpy(tokens)
    with torch.no_grad():
        logits = model(given).logits[:, :-1]
    targets = given[:, 1:]
    log_probs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return log_probs.numpy(), (logits.argmax(-1) == targets).numpy()


@pytest.mark.parametrize("length", [2, 64, 200], ids=["least", "trained", "beyond"])
def test_scores_are_those_of_transformers(trained: Path, length: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 512, (3, length))
    with opened(trained) as scorer:
        model = hugging_face(scorer, trained)
        # Let every second token be what the model would have said.
        with torch.no_grad():
            said = model(torch.from_numpy(tokens)).logits.argmax(-1).numpy()
        tokens[:, 1::2] = said[:, : length - 1 : 2]
        scores = scorer.score(tokens)
    log_probs, is_argmax = expected(model, tokens)
    np.testing.assert_allclose(scores.log_probs, log_probs, atol=2e-5)
    assert (scores.is_argmax == is_argmax).all()
    assert scores.is_argmax.any()


def test_stretches_of_the_output_layer_change_nothing(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_ext.evaluation import scoring

    tokens = np.random.default_rng(1).integers(0, 512, (2, 50))
    with opened(trained) as scorer:
        whole = scorer.score(tokens)
        monkeypatch.setattr(scoring, "_LOGITS_AT_ONCE", 7 * 2 * 512)  # 7 positions at a time
        parts = scorer.score(tokens)
    np.testing.assert_allclose(parts.log_probs, whole.log_probs, atol=1e-6)
    assert (parts.is_argmax == whole.is_argmax).all()
