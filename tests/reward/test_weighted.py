"""A weighted statistic is the plain one of rows that are repeated."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import f1_score, roc_auc_score, root_mean_squared_error

from pipeline.reward import weighted

ROWS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(-2, 2), st.integers(-2, 2), st.booleans(), st.booleans()),
    min_size=1,
    max_size=12,
)


@given(ROWS)
def test_a_weight_is_how_often_the_row_is_there(rows):
    weights, x, y, truths, calls = map(np.array, zip(*rows, strict=True))

    def check(statistic, *columns, plain):
        columns = [column.astype(float) for column in columns]
        found = statistic(np.array([weights, 2 * weights], float), *columns)
        assert found.shape == (2,)
        expected = plain(*(np.repeat(column, weights) for column in columns))
        assert found == pytest.approx([expected, expected], abs=1e-9, nan_ok=True)

    def defined(plain, *columns, when=lambda *_: True):
        return plain(*columns) if len(columns[0]) and when(*columns) else np.nan

    check(weighted.mean, x, plain=partial(defined, np.mean))
    check(weighted.rmse, x - y, plain=partial(defined, lambda e: root_mean_squared_error(0 * e, e)))
    check(weighted.f1, truths, calls, plain=partial(defined, f1_score, when=lambda t, c: (t + c).any()))
    check(weighted.auroc, truths, x, plain=partial(defined, roc_auc_score, when=lambda t, _: np.ptp(t) > 0))
    varied = partial(
        defined, lambda x, y: spearmanr(x, y).statistic, when=lambda *xy: min(map(np.ptp, xy)) > 0
    )
    check(weighted.spearman, x, y, plain=varied)
