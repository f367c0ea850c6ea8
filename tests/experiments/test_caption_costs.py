import numpy as np
import pytest

from experiments.caption_costs import BATCH, Alignment, gains, padding, slopes
from tests.reference.language import caption_ids, tiny_llama


def test_padding_is_counted_by_hand():
    """Captions of 6, 2, 6 and 2 tokens, two queries each, four rows in a chunk: 32 tokens are needed."""
    found = padding(np.array([6, 2, 6, 2]), batch=4, queries=2, chunk_rows=4)
    assert found == {
        "longest of the chunk": 48 / 32, "sorted, longest of the chunk": 1.0, "longest of the batch": 48 / 32,
    }  # fmt: skip


@pytest.mark.slow
def test_tokens_go_further_where_costs_are_known():
    lengths = np.random.default_rng(0).integers(2, 40, 15 * BATCH)
    captions = caption_ids(*map(int, lengths))
    ids = [values[:n].tolist() for values, n in zip(captions.values, captions.lengths, strict=True)]
    found = gains(Alignment(tiny_llama().float(), ids, seed=0), truth=32)
    assert found["spread of the costs"] == pytest.approx(0.5, abs=0.15)
    assert found["with costs, from measured traces"] < found["Neyman, from measured traces"] < 1.0
    assert found["with costs, from measured traces"] < found["lengths alone"]


def test_estimates_have_slope_one():
    ids = [[4, 5, 6], [7], [8, 9, 10, 11, 12], [13, 14]]
    found = slopes(tiny_llama().float(), ids, draws=20, seed=0)
    assert abs(found["slope"] - 1) < 3 * found["standard error of the slope"] < 0.3
    assert found["cosine"] == pytest.approx((60 / (60 + 16)) ** 0.5, abs=0.05)
