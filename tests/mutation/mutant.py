"""A bug: a text that replaces another."""

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    old: str  # exactly once in the file
    new: str
    tests: str = ""  # the files that should catch it: "groups full_step"
    same: str = ""  # why it changes nothing that anybody can see, if that is so
