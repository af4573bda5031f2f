"""Documents of one sample kept apart, against brute force and against each document alone."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data.positions import attention_mask, per_document
from tests.model.conftest import settings as model_settings
from tests.model.conftest import single_process

EOD = 0
samples = st.lists(st.lists(st.integers(0, 3), min_size=12, max_size=12), min_size=1, max_size=3)


@settings(max_examples=100, deadline=None)
@given(samples)
def test_documents_positions_and_mask_by_brute_force(rows: list[list[int]]) -> None:
    documents, positions = per_document(torch.tensor(rows), EOD)
    hidden = attention_mask(documents)
    for b, row in enumerate(rows):
        document = position = 0
        for i, token in enumerate(row):
            assert (documents[b, i], positions[b, i]) == (document, position)
            position += 1
            if token == EOD:
                document, position = document + 1, 0
        for query in range(12):
            for key in range(12):
                seen = key <= query and documents[b, key] == documents[b, query]
                assert hidden[b, 0, query, key].item() is not bool(seen)


def test_packed_documents_have_the_losses_of_each_alone() -> None:
    from megatron_ext.config import Config
    from megatron_ext.model.initialization import initialize_weights
    from megatron_ext.model.llama import build_gpt, transformer_config

    config = Config.model_validate(
        {**model_settings(init_std=0.2), "data": {"mask_documents": True}}
    )
    torch.manual_seed(0)
    lengths = [11, 20, 17]
    pieces = [torch.randint(1, 160, (1, n)) for n in lengths]
    for piece in pieces:
        piece[0, -1] = EOD
    packed = torch.cat(pieces, dim=1)
    with single_process(config), torch.no_grad():
        model = build_gpt(config, transformer_config(config))
        initialize_weights(model, config)
        documents, positions = per_document(packed, EOD)
        together = model(packed, positions, attention_mask(documents))
        alone = torch.cat([model(piece, None, None) for piece in pieces], dim=1)
        masked = model(packed, None, attention_mask(documents))
        unmasked = model(packed, None, None)
        restarted = model(packed, positions, None)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masked, alone, rtol=1e-4, atol=1e-5)  # RoPE goes by distance
    assert not torch.allclose(together, unmasked, atol=1e-2)  # the mask matters
    assert not torch.allclose(restarted, unmasked, atol=1e-2)  # positions do where it is missing
