"""Random edits of a file's bytes, for tests with Hypothesis."""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
EDGES = b"\x00\x01\x02\x7f\x80\xfe\xff().}]KMJXcqrhRbQtuaes\x81\x85\x86\x87\x88\x89\x8a"
many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
edits = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "repeat", "cut"]),
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.sampled_from(list(EDGES)), st.integers(0, 255)),
        st.integers(1, 12),
    ),
    min_size=1,
    max_size=4,
)


def apply_edits(data: bytes, changes: list[tuple[str, float, int, int]]) -> bytes:
    for kind, position, value, count in changes:
        at = int(position * len(data))
        if kind == "set":
            data = data[:at] + bytes([value]) + data[at + 1 :]
        elif kind == "insert":
            data = data[:at] + bytes([value]) * count + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + count :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + count] * 3 + data[at + count :]
        else:
            data = data[:at]
    return data
