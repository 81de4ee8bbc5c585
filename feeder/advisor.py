"""Asks the strategy, checks all that it answers, and says when it has to be replaced. Knows no slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from common.errors import InternalError
from common.plan import Capacity, Plan
from feeder.strategies.base import Strategy
from feeder.strategies.cyclic import Cyclic
from feeder.strategies.on_demand import OnDemand
from feeder.strategies.registry import reason

#: What a strategy is told of, if it has a method for it.
_EVENTS = ("needed", "released", "filled", "freed")


class Advisor:
    """``kept``: what the strategy keeps, checked. ``cyclic``, ``recent``: its wishes need not be asked
    for; ``recent`` are those of ``on-demand``.

    ``failed`` is called, with one line, when a strategy raised or answered nonsense. It puts
    another in its place.
    """

    def __init__(self, strategy: Strategy, failed: Callable[[str], None]) -> None:
        self.strategy, self._failed = strategy, failed
        self.kept: frozenset[int] = frozenset()
        self.cyclic = False
        self.recent: dict[int, None] | None = None
        self._total = 0
        self._listens: set[str] = set()

    def begin(
        self,
        strategy: Strategy,
        plan: Plan,
        sizes: Sequence[int],
        capacity: Capacity,
        copies: frozenset[int],
    ) -> None:
        """From now on this one is asked."""
        strategy.copied = copies
        self.strategy, self._total = strategy, len(sizes)
        kind, own = type(strategy), "wanted" in vars(strategy)
        self.cyclic = kind.wanted is Cyclic.wanted and not own
        self.recent = strategy.recent if type(strategy) is OnDemand and not own else None
        self._listens = {n for n in _EVENTS if getattr(kind, n) is not getattr(Strategy, n)}
        self._guard(lambda: strategy.begin(plan, sizes, capacity))

    def tell(self, event: str, weight: int) -> bool:
        """Whether the strategy listens, and may want something else from now on."""
        if event not in self._listens:
            return False
        self._guard(lambda: getattr(self.strategy, event)(weight))
        return True

    def wishes(self, position: int) -> Iterator[int]:
        """What it wants; ends where the answer makes no sense."""
        total = self._total
        try:
            for answers, weight in enumerate(self.strategy.wanted(position)):
                if type(weight) is not int or not 0 <= weight < total:
                    raise ValueError(f"wanted {weight!r}, which is not a weight (0 to {total - 1})")
                if answers > 2 * total:
                    raise ValueError("wanted goes on without end")
                yield weight
        except (Exception, SystemExit) as error:
            self._fail(error)

    def look_again(self) -> None:
        """It may have changed its mind on what stays."""
        self._guard(lambda: None)

    def _guard(self, call: Callable[[], None]) -> None:
        try:
            call()
            keep = self.strategy.keep
            if keep is not self.kept:
                self._check_keep(keep)
                self.kept = keep
        except (Exception, SystemExit) as error:
            self._fail(error)

    def _check_keep(self, keep: object) -> None:
        if not isinstance(keep, frozenset):
            raise TypeError(f"keep must be a frozenset of weights, not {type(keep).__name__}")
        for weight in keep:
            if type(weight) is not int or not 0 <= weight < self._total:
                raise ValueError(f"keep holds {weight!r}, which is not a weight")

    def _fail(self, error: BaseException) -> None:
        if type(self.strategy) is OnDemand:
            raise InternalError(f"on-demand failed: {error!r}") from error
        said = f"strategy {self.strategy.name} failed ({reason(error)})"
        self._failed(f"{said}; going on with on-demand")
