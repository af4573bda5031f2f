"""Which documents a sample of the training data holds, to look at or to train on alone.

    documents_of(train, config, range(8))[0]
    # {"sample": 0, "corpus": "books", "path": "data/books", "documents": [17, 18]}

`data-tools peek data/books 17 18` shows them.
"""

from collections.abc import Iterable
from typing import Any

from torch.utils.data import Dataset

from megatron_ext.config import Config


def documents_of(dataset: Dataset, config: Config, samples: Iterable[int]) -> list[dict[str, Any]]:
    """For each sample of a data set made by `blend.build_datasets`, its corpus and the numbers of
    its documents in that corpus, in order."""
    corpora = list(config.data.corpora.items())
    found = []
    for sample in samples:
        part, place, which = dataset, sample, 0
        if hasattr(dataset, "datasets"):
            which = int(dataset.dataset_index[sample])  # type: ignore[attr-defined]
            place = int(dataset.dataset_sample_index[sample])  # type: ignore[attr-defined]
            part = dataset.datasets[which]
        _, documents = part._query_document_sample_shuffle_indices(place)  # type: ignore[attr-defined]
        name, corpus = corpora[which]
        found.append(
            {
                "sample": sample,
                "corpus": name,
                "path": str(corpus.path),
                "documents": [int(document) for document in documents],
            }
        )
    return found
