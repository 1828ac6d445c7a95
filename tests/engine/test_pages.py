"""A pool of pages."""

import pytest

from mor.engine.pages import PagePool


def test_page_pool_refuses_double_release():
    pool = PagePool(2)
    page = pool.allocate()
    pool.share(page)
    pool.release(page)
    assert pool.num_free == 1
    pool.release(page)
    assert pool.num_free == 2
    with pytest.raises(AssertionError, match="released before"):
        pool.release(page)
    with pytest.raises(AssertionError, match="no owner"):
        pool.share(page)
