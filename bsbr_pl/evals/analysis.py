"""Analysis of a comparison: growth exponents, crossover lengths and rankings, with intervals, and as a table."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bsbr_pl.values import crossover, exponent, number, ranks


@dataclass(frozen=True)
class Analysis:
    """The analysis of results; `print` shows it as a table, `analysis["rankings"]` is `analysis.rankings`.

    exponents: cost -> model -> {"exponent", "interval", "lengths"} of cost ~ length^exponent, see `values.exponent`.
    crossovers: cost -> model -> other model -> {"length", "interval", "longest"}: from which length on the model costs
        less than the other, see `values.crossover`.
    rankings: metric -> models from best to worst at the longest length that all have a figure for, without those that
        have none at any length: {"model", "length", "value", "interval", "rank": [best, worst]}; a rank counts another
        model as better or worse where the 95 % intervals do not overlap.
    """

    results: Mapping[str, Any]
    exponents: dict[str, dict[str, Any]]
    crossovers: dict[str, dict[str, dict[str, Any]]]
    rankings: dict[str, list[dict[str, Any]]]

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __str__(self) -> str:
        return "\n\n".join([*map(self._table, self.results["metrics"]), *self._notes()])

    def _table(self, metric: str) -> str:
        """One line a model: the figure at every length, and what follows from them."""
        results, ranking, is_cost = self.results, self.rankings[metric], metric in self.exponents
        models = results["models"]
        other = "Standard" if "Standard" in models else models[0]
        head = [f"{metric} ({results['units'][metric]})", *map(str, results["seq_lengths"])]
        if is_cost:
            head += ["exponent", f"below {other} from"]
        head.append(f"rank at {ranking[0]['length'] if ranking else ''}")
        ranks = {}
        for one in ranking:
            best, worst = one["rank"]
            ranks[one["model"]] = str(best) if best == worst else f"{best}-{worst}"
        rows = [head]
        for model in models:
            row = [model, *map(number, results[model][metric])]
            if is_cost:
                slope, passed = self.exponents[metric][model], self.crossovers[metric][model].get(other)
                row.append(f"{slope['exponent']:.2f}{_span(slope['interval'], '.2f')}" if slope else "-")
                row.append(_passed(passed) if passed and passed["longest"] else "-")
            rows.append([*row, ranks.get(model, "-")])
        return aligned(rows)

    def _notes(self) -> Iterator[str]:
        task = self.results.get("accuracy_task")
        if task:
            chance = "" if task["chance"] is None else f"; guessing gives {task['chance']:.3f}"
            yield f"accuracy: trained for {task['steps']} steps on {task['task']}{chance}"
        own = {model: self.results[model].get("accuracy_as_trained") for model in self.results["models"]}
        if any(value is not None for value in own.values()):
            yield "accuracy as trained: " + ", ".join(f"{model} {number(value)}" for model, value in own.items())
        if parameters := self.results.get("parameters"):
            yield "parameters: " + ", ".join(f"{model} {number:,}" for model, number in parameters.items())
        yield from self.results.get("differences", [])
        for model, failed in self.results["disqualified"].items():
            yield f"{model} is disqualified: it fails {', '.join(failed)}"


def analyze_results(results: Mapping[str, Any], shortest: int = 0) -> Analysis:
    """Exponents, crossovers and rankings, with 95 % intervals over the rounds that `results` keeps.

    Args:
        results: of `compare_models` or `scaling_analysis`; also after a way through JSON.
        shortest: exponents leave shorter lengths out.
    """
    models, lengths = results["models"], results["seq_lengths"]
    exponents, crossovers, rankings = {}, dict[str, dict[str, Any]](), {}
    for metric in results["metrics"]:
        rankings[metric] = _ranking(results, metric)
        if metric == "accuracy":
            continue
        samples = {}
        for model in models:
            by_length = zip(lengths, results[model]["samples"][metric], strict=True)
            samples[model] = {length: values for length, values in by_length if values}
        exponents[metric] = {model: exponent(samples[model], shortest) for model in models}
        crossovers[metric] = {}
        for model in models:
            others = [other for other in models if other != model]
            crossovers[metric][model] = {other: crossover(samples[model], samples[other]) for other in others}
    return Analysis(results, exponents, crossovers, rankings)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines of text, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line) for line in lines)


def _ranking(results: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
    sign, lengths = -1 if metric == "accuracy" else 1, results["seq_lengths"]
    values: dict[str, Sequence[float | None]] = {}
    for model in results["models"]:
        if any(value is not None for value in results[model][metric]):
            values[model] = results[model][metric]
    common = [i for i in range(len(lengths)) if all(of_model[i] is not None for of_model in values.values())]
    if not values or not common:
        return []
    i = max(common, key=lambda i: lengths[i])
    rows, bounds = [], {}
    for model, of_model in values.items():
        interval = results[model]["intervals"][metric][i]
        rows.append({"model": model, "length": lengths[i], "value": of_model[i], "interval": interval})
        low, high = sorted(sign * end for end in interval)
        bounds[model] = (low, high)
    rank_of = ranks(bounds)
    for row in rows:
        row["rank"] = list(rank_of[row["model"]])
    return sorted(rows, key=lambda row: sign * row["value"])


def _span(interval: Sequence[float | None] | None, form: str) -> str:
    """An interval in brackets; empty if it has no width."""
    if interval is None or interval[0] == interval[1]:
        return ""
    return f" [{', '.join('never' if end is None else format(end, form) for end in interval)}]"


def _passed(found: Mapping[str, Any]) -> str:
    if found["length"] is None:
        return f"not by {found['longest']}" + _span(found["interval"], "d")
    return f"{found['length']}{_span(found['interval'], 'd')}"
