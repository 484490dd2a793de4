"""Numbers as a person reads them; shared by the page, the figures and the model card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from search.budget import Currency
    from trainers.students.plan import Ffn


def count(number: float) -> str:
    """20430401088 -> "20.4B", 923648 -> "924k", 812 -> "812": three significant digits."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999 600 rounds to 1 000k: the next unit says it better.
        if abs(number) >= size * 0.9995:
            return significant(number / size) + unit
    return f"{number:.0f}"


def significant(number: float) -> str:
    """Three significant digits without an exponent: 20.4, 1.85, 924."""
    if abs(number) >= 99.95:
        return f"{number:.0f}"
    return f"{number:.1f}" if abs(number) >= 9.995 else f"{number:.2f}"


def percent(part: float) -> str:
    """0.4979 -> "49.8%", 1.0 -> "100%"."""
    return f"{100 * part:.1f}".removesuffix(".0") + "%"


def ffn(kept: Ffn, digits: int = 3) -> str:
    """How wide a block's FFN is: 0.5 -> "50%", "linear" -> "linear"."""
    return "linear" if kept == "linear" else percent(round(kept, digits))


def memory(size: float) -> str:
    """Bytes: 21148598272 -> "19.7 GiB", 4865024 -> "4.6 MiB"."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def cost(limit: int, currency: Currency) -> str:
    """What a student costs: "1,000,000 parameters", "19.7 GiB of peak memory", "8.4 ms a pass"."""
    if currency == "memory":
        return f"{memory(limit)} of peak memory"
    return f"{latency(limit)} a pass" if currency == "latency" else f"{limit:,} parameters"


def amount(number: float, currency: Currency) -> str:
    """The same where the currency is said beside it: "1.00M", "19.7 GiB", "8.4 ms"."""
    short = {"parameters": count, "memory": memory, "latency": latency}
    return short[currency](number)


def latency(microseconds: float) -> str:
    """8412 -> "8.41 ms", 1250000 -> "1250 ms"."""
    return f"{significant(microseconds / 1e3)} ms"


def duration(seconds: float) -> str:
    """0.42 -> "0.4 s", 75 -> "1 min 15 s", 7300 -> "2 h 02 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def loss(number: float | None) -> str:
    """0.03127 -> "0.0313", 0.00000123 -> "1.23e-06", None -> "–"."""
    return "–" if number is None else f"{number:.3g}"


def span(first: int, last: int) -> str:
    """(3, 4) -> "3–4", (7, 7) -> "7"."""
    return str(first) if first == last else f"{first}–{last}"


def tier(part: float) -> str:
    """When in a recovery a loss was measured, by the part of its schedule: 0.25 -> "at 25%"."""
    return {0.0: "as assembled", 1.0: "at the end"}.get(part, f"at {percent(part)}")


def listed(items: Sequence[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
