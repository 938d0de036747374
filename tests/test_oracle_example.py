"""The example's held-out loss by transformers and by the artifacts, over the same text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_example import negative_log_likelihood, windows
from test_model_harness import FORMATS, TOLERANCE, Models, within

from dsv4c.runtime.text import tokenizer_of

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("form", FORMATS)
def test_losses_and_logits(models: Models, form: str) -> None:
    from oracle_support import Oracle

    oracle = Oracle.open(Path(models.checkpoint("kjv")))
    session = models.session("kjv", form, batch=4, context=1024)
    for given, targets in windows(tokenizer_of(session.artifact))[:3]:
        session.reset()
        found = session.step(given)
        want = np.stack([oracle.logits(row) for row in given])
        within(found, want, TOLERANCE)
        assert (found.argmax(-1) == want.argmax(-1)).mean() > 0.999
        losses = [negative_log_likelihood(x, targets).mean() for x in (found, want)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
