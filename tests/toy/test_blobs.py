"""Connected parts of a mask, against a plain flood fill."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hforce.toy.blobs import LEAST_AREA, areas, largest

MASKS = arrays(bool, (12, 15), elements=st.booleans())


def flooded(mask):
    """The connected parts of a mask as sets of pixels, by flood fill over eight neighbours."""
    left, parts = set(map(tuple, np.argwhere(mask).tolist())), []
    while left:
        edge = [left.pop()]
        part = set(edge)
        while edge:
            row, column = edge.pop()
            near = {(row + down, column + across) for down in (-1, 0, 1) for across in (-1, 0, 1)} & left
            left -= near
            part |= near
            edge += near
        parts.append(part)
    return parts


@given(MASKS)
def test_parts_are_those_of_a_flood_fill(mask):
    sizes = sorted((len(part) for part in flooded(mask) if len(part) >= LEAST_AREA), reverse=True)
    assert areas(mask) == sizes
    main = set(map(tuple, np.argwhere(largest(mask)).tolist()))
    assert len(main) == (sizes[0] if sizes else 0)
    assert not main or main in flooded(mask)


def test_noise_is_no_part():
    mask = np.zeros((9, 9), bool)
    mask[2:5, 2:7] = True
    assert areas(mask) == []
    assert not largest(mask).any()
    mask[5, 7] = True
    assert areas(mask) == [16]
