"""What is found once for a set of tensors, and forgotten when others have come since."""

from __future__ import annotations

from typing import Any, TypeVar

Value = TypeVar("Value")


class Recent(dict[Any, Value]):
    """The last ``most`` values that were found or kept."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as nothing: it is found again."""
        return Recent, (self.most,)

    def find(self, key: Any) -> Value | None:
        value = self.pop(key, None)
        if value is not None:
            self[key] = value
        return value

    def keep(self, key: Any, value: Value) -> Value:
        self[key] = value
        if len(self) > self.most:
            del self[next(iter(self))]
        return value
