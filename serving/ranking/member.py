"""One trained model of a bundle, ready for requests: its tables, its fields' embeddings, and its folded network.

Legend: N candidates or rows, C and R width of the context's and of a candidate's embeddings.
"""

from collections.abc import Callable, Sequence

import torch

from features.online import Encoded
from features.pipeline import FeaturePipeline
from masknet.folding import ServingNetwork, fold
from masknet.model import MaskNet
from serving.backends.base import Backend
from serving.ranking.fields import Fields
from serving.ranking.tables import Precision, Tables

MakeBackend = Callable[[ServingNetwork], Backend]


class Member:
    """Logits of encoded rows, with the context's part computed once or with whole rows.

    Args:
        pipeline: which encodes the rows.
        model: trained; its network is folded as it is now.
        context: the fields that a request of the usual kind sends once; empty where there are none.
        precision: of the tables.
        make: what computes a folded network.
    """

    def __init__(
        self,
        pipeline: FeaturePipeline,
        model: MaskNet,
        context: Sequence[str],
        precision: Precision,
        make: MakeBackend,
    ) -> None:
        names = pipeline.names
        self.tables = Tables(model, precision)

        def some(chosen: Sequence[str]) -> Fields:
            return Fields(chosen, pipeline, model, self.tables)

        self._all, self._context = some(names), some(context)
        self._candidates = some([name for name in names if name not in context])
        self.whole = make(fold(model.network))
        places = [names.index(name) for name in context]
        self.split = make(fold(model.network, places)) if places else self.whole
        self._no_context = torch.empty(1, 0)

    def context(self, encoded: Encoded) -> torch.Tensor:
        """The context's embeddings [1, C]."""
        return self._context.embed(encoded, 1)

    def candidates(self, encoded: Encoded, rows: int) -> torch.Tensor:
        """The candidates' embeddings [N, R]."""
        return self._candidates.embed(encoded, rows)

    def rows(self, encoded: Encoded, rows: int) -> torch.Tensor:
        """Embeddings [N, C + R] of whole rows, in the order of F."""
        return self._all.embed(encoded, rows)

    def logits(self, context_1C: torch.Tensor | None, emb_NR: torch.Tensor) -> torch.Tensor:
        """Logits [N], of whole rows where there is no context."""
        if context_1C is None:
            return self.whole.logits(self._no_context, emb_NR)
        return self.split.logits(context_1C, emb_NR)
