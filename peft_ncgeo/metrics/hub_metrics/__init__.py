"""Metrics for the `evaluate` library, one folder each, with the script and the card of the metric's Space."""

from pathlib import Path


def metric_path(name: str) -> str:
    """Return the folder of a metric's script and card; `evaluate.load` loads it without a network.

    Args:
        name: "neural_collapse" or "group_accuracy".

    Raises:
        ValueError: the name is unknown.

    Example:

    ```python
    metric = evaluate.load(metric_path("neural_collapse"))
    ```
    """
    folder = Path(__file__).parent
    names = sorted(script.stem for script in folder.glob("*/*.py"))
    if name not in names:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(names)}.")
    return str(folder / name)
