"""Search instead of a grid: Optuna's TPE (Bergstra et al. 2011) proposes the next run's values from those before.

A list is a choice among its values, a range is drawn on a logarithmic scale. The study is a journal file in the sweep's folder; the
sampler is made anew for each proposal, seeded by its number, so that a search which was stopped goes on with what it would have
proposed anyway.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tunesmith.errors import MachineError
from tunesmith.workflows.sweep_points import Axis

SEED = 0
STUDY = "study.journal"


def refuse_without_optuna() -> None:
    """Raise MachineError where Optuna is not installed."""
    import importlib.util

    if importlib.util.find_spec("optuna") is None:
        raise MachineError("a search (--trials) needs Optuna; install it with: pip install 'tunesmith[search]'")


class Search:
    """The study of a sweep in `folder`."""

    def __init__(self, folder: Path, axes: Sequence[Axis], lower_is_better: bool):
        refuse_without_optuna()
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        # It writes a line for every proposal on stderr.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.axes = axes
        self.study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / STUDY))),
            study_name="sweep",
            direction="minimize" if lower_is_better else "maximize",
            load_if_exists=True,
        )

    def done(self) -> list[tuple[int, dict[str, Any]]]:
        """Number and values of the proposals whose metric is known, or that failed."""
        return [(trial.number, self._values(trial.params)) for trial in self.study.trials if trial.state.is_finished()]

    def next(self, without: Collection[int] = ()) -> tuple[int, dict[str, Any]]:
        """The number and the values of the next run: one that was begun and not finished, not among `without`; else a new proposal."""
        import optuna

        for trial in self.study.trials:
            if not trial.state.is_finished() and trial.number not in without:
                return trial.number, self._values(trial.params)
        self.study.sampler = optuna.samplers.TPESampler(seed=SEED + len(self.study.trials))
        asked = self.study.ask({axis.key: self._distribution(axis) for axis in self.axes})
        return asked.number, self._values(asked.params)

    def tell(self, number: int, value: float | None) -> None:
        """The metric of a run; None for one that failed."""
        import optuna

        if value is None:
            self.study.tell(number, state=optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(number, value)

    def _distribution(self, axis: Axis) -> Any:
        """Choices by their place: Optuna keeps no lists among them."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if not axis.is_range:
            return CategoricalDistribution(range(len(axis.values)))
        if isinstance(axis.low, int) and isinstance(axis.high, int):
            return IntDistribution(axis.low, axis.high, log=True)
        assert axis.low is not None
        assert axis.high is not None
        return FloatDistribution(axis.low, axis.high, log=True)

    def _values(self, params: dict[str, Any]) -> dict[str, Any]:
        return {axis.key: params[axis.key] if axis.is_range else axis.values[params[axis.key]] for axis in self.axes}
