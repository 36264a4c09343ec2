"""A plugin of pytest: a test that a bug of the museum, or a trap, names runs with it and must fail.

Run it so: `python -m pytest -p tests.bugged tests/test_text.py::test_padding`.
"""

import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    import museum  # not before conftest.py: it imports minidiff
    import switches
    import traps

    node = item.nodeid.partition("[")[0]
    with ExitStack() as stack:
        for bug in (*museum.BUGS.values(), *traps.TRAPS.values()):
            if bug.test == node:
                stack.enter_context(switches.switched_on(bug))
        return (yield)
