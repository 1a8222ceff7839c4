"""Numbers as text for people. Standard library only."""

import re


def in_percent(name: str | None) -> bool:
    """Whether a metric is an accuracy: a fraction in files and logs, percent for people."""
    return name is not None and re.fullmatch(r"acc\d*|accuracy", name.split("/")[-1]) is not None


def format_value(name: str, value: float) -> str:
    """`83.20 %` of an accuracy, `17.356` of another metric."""
    return f"{100 * value:.2f} %" if in_percent(name) else f"{value:.5g}"


def format_metric(name: str, value: float) -> str:
    """`val/acc1 83.20 %`, `val/rmse 17.356`."""
    return f"{name} {format_value(name, value)}"


def format_duration(seconds: float | None) -> str:
    """`3:05`, `1:02:03`; `?` for None."""
    if seconds is None:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_rate(images_per_sec: float) -> str:
    """`1234 images/s`, `4.5 images/s`."""
    return f"{images_per_sec:.{0 if images_per_sec >= 100 else 1}f} images/s"
