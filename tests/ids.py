"""Names of test cases that are the same in every process.

xdist splits the suite by them: a case whose name has the address of a function, as Python
prints one, exists in one process only. tests/test_suite.py looks at every name.
"""

import re


def spelled(value: object) -> str:
    """What Python prints of a value, functions by their names."""
    return re.sub(r"<function (?:\S+\.)?(\S+) at 0x[0-9a-f]+>", r"\1", repr(value))
