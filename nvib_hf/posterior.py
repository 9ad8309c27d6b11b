"""The posterior that the NVIB layer makes of a batch of vector sets."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Posterior(NamedTuple):
    """Parameters of the posterior, batch-first, component 0 the prior's, which is never masked.

    ``mu``, ``logvar`` ``(B, Ns + 1, P)``; ``log_alpha`` ``(B, Ns + 1)`` in fp32 or better; ``mask``
    ``(B, Ns + 1)``, True = a component; ``keep``: as ``mask``, less what is dropped; ``keep_logit`` ``(B, Ns + 1)``:
    above 0 for what is kept, ``+inf`` for the prior's, ``None`` where nothing decides. Of hard draws in training also
    ``dropped`` ``(B, Nl)``, 1 or 0 with a gradient (:func:`~nvib_hf.dropping.hard_draw`), and ``full_log_pi``
    ``(B, Nl)``, the log weights of what is kept, and beside them those that what is dropped would have.
    """

    mu: Tensor
    logvar: Tensor
    log_alpha: Tensor
    mask: Tensor
    keep: Tensor
    keep_logit: Tensor | None = None
    dropped: Tensor | None = None
    full_log_pi: Tensor | None = None

    def repeated(self, kappa: int) -> Posterior:
        """Of each of ``kappa`` vectors a component, side by side, with ``alpha_i / kappa``."""
        if kappa == 1:
            return self
        repeated = Posterior(*(None if x is None else x.repeat_interleave(kappa, dim=1) for x in self))
        return repeated._replace(log_alpha=repeated.log_alpha - math.log(kappa))
