"""The tables of the report."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..checkpoints import Checkpoint, kind
from ..scaling import PASSES, crossover, exponent
from .findings import (
    MALFORMED,
    Findings,
    Group,
    Member,
    Row,
    Study,
    cost,
    difference,
    finite,
    front,
    natural,
    nearest,
    pool,
    pooled,
    samples,
    slices,
)
from .table import (
    Cell,
    Column,
    Measured,
    Table,
)

LONG = 2048  # tokens from which on exponents are fitted, where there are lengths enough
SUBQUADRATIC = 1.1  # the largest exponent that is called so
AGREES = 1e-6  # nats a token by which an evaluation may differ from the run's own validation

# The tables. A column is a `Column` and what reads its cell from an item.

Columns = Sequence[tuple[Column, Callable[[Any], Cell]]]
ARCHITECTURE = Column("architecture")

#: What costs are shown: the key in the values, its name, its unit.
COSTS = (
    ("forward", "forward pass", "ms"),
    ("training", "training pass", "ms"),
    ("decode", "decoded token", "ms"),
    ("training_bytes", "training memory", "MB"),
    ("forward_bytes", "forward memory", "MB"),
    ("forward_flops", "forward FLOPs", "GFLOP"),
    ("state_bytes", "decode state", "MB"),
)


def tabulate(
    name: str, title: str, caption: str, items: Sequence[Any], columns: Columns, ranked: int | None = None
) -> Table | None:
    """A row for each item; rows with nothing but a name are left out, and so are columns without any value."""
    rows = [[read(item) for _, read in columns] for item in items]
    full = [any(cell is not None for cell in row[1:]) for row in rows]
    ranked = None if ranked is None else sum(full[:ranked])
    rows = [row for row, keep in zip(rows, full, strict=True) if keep]
    kept = [i for i in range(len(columns)) if any(row[i] not in (None, "") for row in rows)]
    shown = [columns[i][0] for i in kept]
    return Table(name, title, caption, shown, [[row[i] for i in kept] for row in rows], ranked) if rows else None


def verdict(study: Study, findings: Findings) -> Table | None:
    """One row for each group, the best first, the disqualified at the end."""
    groups, ranked = study.ordered()
    among, on_front = groups[:ranked], quality_front(study)
    longest = max((length for group in groups for length in group.costs), default=0)
    at, last = f" at {longest:,}" if longest else "", study.lengths[-1:]
    names = list(dict.fromkeys(name for group in groups for name in slices(group.own, "slices", "accuracy")))
    shortest = fitted_from([group.costs for group in groups])
    columns: Columns = [
        (ARCHITECTURE, lambda group: group.label),
        (Column("seeds"), _seeds),
        (Column("certificate"), _outcome),
        (Column("parameters"), lambda group: parameters(group.members[0].checkpoint)),
        (Column("training length", "tokens"), trained_length),
        (Column("bits per byte", best="low"), lambda group: pooled(group.own, "bits_per_byte")),
        (Column("bits per byte above the best", signed=True), lambda group: _above(group, among)),
        (Column("accuracy" if study.recall else "top-1 accuracy", "%", "high"), lambda g: pooled(g.own, "accuracy")),
        *((Column(f"accuracy, {n}", "%", "high"), _slice_of("slices", n, "accuracy")) for n in names if len(names) > 1),
        (Column("loss on recall hits", best="low"), _slice_of("recall", "hits", "loss")),
        (Column("loss on the rest", best="low"), _slice_of("recall", "rest", "loss")),
        *((Column(f"bits per byte at {n:,} tokens", best="low"), _bits_at(n)) for n in last if len(study.lengths) > 1),
        (Column(f"training pass{at}", "s", "low"), lambda group: group.cost(longest, "training")),
        (Column(f"forward pass{at}", "s", "low"), lambda group: group.cost(longest, "forward")),
        (Column(f"decoded token{at}", "ms", "low"), lambda group: group.cost(longest, "decode")),
        (Column(f"decode state{at}", "MB", "low"), lambda group: group.cost(longest, "state_bytes")),
        (Column(f"training memory{at}", "MB", "low"), lambda group: group.cost(longest, "training_bytes")),
        (
            Column("exponent of training time", best="low", decimals=2),
            lambda group: power(group.costs, "training", shortest),
        ),
        (Column("Pareto front"), lambda group: "front" if group in among and group.label in on_front else ""),
    ]
    seeds = any(len(group.members) > 1 for group in groups)
    caption = (
        f"Sorted by {'accuracy' if study.recall else 'bits per byte'}; marked is the best among the certified. In "
        f"brackets: {'the least and the largest of several seeds, else ' if seeds else ''}95 % bootstrap intervals, "
        f"of accuracies over {study.units}, of times over rounds. "
    )
    if len(among) > 1 and not study.recall:
        caption += (
            f"The distance to the best is paired by document{', seeds averaged' if seeds else ''}: where its interval "
            f"holds 0{', or seeds of the two overlap' if seeds else ''}, the two are tied. Recall hits are tokens "
            "whose bigram occurred before in the context. "
        )
    if on_front:
        caption += "Pareto front: no other is better and as quick to train, or as good and quicker. "
    used = [*study.rows, *(row for group in groups for row in group.costs.values())]
    name, title = f"verdict_{study.name}", "Architectures, best first"
    return tabulate(name, title, caption + findings.source(used), groups, columns, ranked)


def _slice_of(part: str, which: str, name: str) -> Callable[[Group], Cell]:
    return lambda group: slices(group.own, part, name).get(which)


def _bits_at(length: int) -> Callable[[Group], Cell]:
    return lambda group: pooled(group.at(length), "bits_per_byte")


def _above(group: Group, ranked: Sequence[Group]) -> Measured | None:
    """Bits per byte above the best of the ranked."""
    if group not in ranked or len(ranked) < 2 or pooled(group.own, "bits_per_byte") is None:
        return None
    return Measured(0.0, note="best") if group is ranked[0] else difference(group.own, ranked[0].own)


def _seeds(group: Group) -> Cell:
    """How many; and of how many runs, where one came twice."""
    seeds, runs = [member.checkpoint.seed for member in group.members], len(group.members)
    if None in seeds:
        return f"unknown, {runs} run{'s' * (runs > 1)}"
    return Measured(len(set(seeds)), note=f"{runs} runs" if len(set(seeds)) < runs else "")


def _outcome(group: Group) -> str:
    if group.status != "disqualified":
        return group.status
    return f"disqualified: {' / '.join(dict.fromkeys(failed(m.certificate) for m in group.members if m.certificate))}"


def failed(certificate: Row) -> str:
    """The first check that failed, with what was measured and its limit, and how many more did."""
    first, *others = [check for check in certificate["values"]["checks"] if not check["passed"]]
    measured, number = finite(first["measured"]), Column("").number
    text = f"{first['name']} {'not finite' if measured is None else number(measured)} above {number(first['limit'])}"
    return text + (f", and {len(others)} more check{'s' * (len(others) > 1)}" if others else "")


def parameters(checkpoint: Checkpoint) -> int:
    assert checkpoint.module is not None
    return sum(p.numel() for p in checkpoint.module.parameters())


def trained_length(group: Group) -> int | None:
    """Tokens of the contexts that a group was trained on, or of the longest of them."""
    arguments = group.members[0].checkpoint.data_arguments
    try:
        return int(arguments.get("context_length") or max(length for length, *_ in arguments["train_segments"]))
    except MALFORMED:
        return None


def training_seconds(group: Group) -> Measured | None:
    """Of a training pass at the length of training, or the nearest measured."""
    return group.cost(nearest(group.costs, trained_length(group)), "training")


def quality_front(study: Study) -> list[str]:
    """The ranked groups that no other is both better and quicker to train than."""
    points = {}
    for group in study.ranked():
        quality, seconds = pooled(group.own, "accuracy" if study.recall else "bits_per_byte"), training_seconds(group)
        if quality and seconds:
            points[group.label] = (seconds.value, -quality.value if study.recall else quality.value)
    return front(points)


def summary(study: Study) -> str:
    """The verdict in words."""
    ranked = study.ranked()
    out = sorted({group.label for group in study.groups if group.status == "disqualified"})
    last = f"Disqualified: {', '.join(out)}." if out else ""
    if not ranked:
        return f"Nothing is ranked: no certified checkpoint has an accuracy. {last}".strip()
    best, what, unit = ranked[0], "bits_per_byte", "bits per byte"
    if study.recall:
        what, unit = "accuracy", "% right"
    quality = pooled(best.own, what)
    assert quality is not None
    words = [f"Best: {best.label}, {Column('', '%' if study.recall else '').number(quality.value)} {unit}"]
    if not study.recall and len(ranked) > 1:
        apart = {group.label: difference(group.own, best.own) for group in ranked[1:]}
        tied = [label for label, more in apart.items() if more and more.note]
        words[0] += f"; tied with: {', '.join(tied)}" if tied else "; none is tied with it" * all(apart.values())
    words[0] += "."
    longest = max((length for group in ranked for length in group.costs), default=0)
    for name, superlative, number in (
        ("decode", "Cheapest decoded token", Column("", "ms")),
        ("training", "Quickest training pass", Column("", "s")),
        ("state_bytes", "Smallest decode state", Column("", "MB")),
    ):
        found = {group.label: value.value for group in ranked if (value := group.cost(longest, name))}
        if len(set(found.values())) > 1:
            least = min(found.values())
            names = ", ".join(label for label, value in found.items() if value == least)
            words.append(f"{superlative} at {longest:,} tokens: {names}, {number.number(least)}\u00a0{number.unit}.")
    if len(ranked) > 1 and (on_front := quality_front(study)):
        words.append(f"On the Pareto front with training time: {', '.join(on_front)}.")
    return " ".join([*words, last]).strip()


def problems(findings: Findings) -> Table | None:
    """What went wrong, with which checkpoint."""
    columns: Columns = [(Column("checkpoint"), lambda one: one[0]), (Column("what went wrong"), lambda one: one[1])]
    caption = "What could not be read or measured; the rest went on without it."
    return tabulate("problems", "Problems", caption, list(findings.problems.items()), columns)


def certificates(findings: Findings, place: str) -> Table | None:
    """What each checkpoint was certified by in one environment; of the suffix checks, the largest."""
    found = {
        row["identity"]["checkpoint"]: row
        for row in findings.rows
        if row["identity"]["kind"] == "certificate" and findings.environment(row) == place
    }
    certified = [checkpoint for checkpoint in findings.checkpoints if checkpoint.digest in found]

    def checks(one: Checkpoint, of: str) -> list[dict[str, Any]]:
        every = found[one.digest]["values"]["checks"]
        return [check for check in every if check["name"] == of or check["name"].startswith(f"{of}_")]

    def worst(of: str) -> Callable[[Checkpoint], Cell]:
        def cell(one: Checkpoint) -> Cell:
            numbers = [finite(check["measured"]) for check in checks(one, of)]
            known = [number for number in numbers if number is not None]
            return max(known, default=None) if len(known) == len(numbers) else "not finite"

        return cell

    kinds = ("suffix", "future_gradient", "random_tokens", "decode_step", "decode_prefill")
    limits = {of: check["limit"] for one in certified for of in kinds for check in checks(one, of)}
    columns: Columns = [
        (ARCHITECTURE, lambda one: findings.labels[one.digest]),
        (Column("checkpoint"), lambda one: one.name),
        (
            Column("outcome"),
            lambda one: "passed" if found[one.digest]["values"]["passed"] else f"failed: {failed(found[one.digest])}",
        ),
        *((Column(f"{of} (at most {limit:g})"), worst(of)) for of, limit in limits.items()),
    ]
    caption = (
        "suffix: the largest change of logits up to a token when all later tokens are others, for tokens around the "
        "edges of chunks and windows. future_gradient: gradient to later tokens. random_tokens: standard errors by "
        "which the loss on random tokens lies below chance. decode_step, decode_prefill: decoded logits against those "
        "of all tokens at once. Each check by itself is in results.jsonl. "
    )
    caption += findings.source(list(found.values()))
    return tabulate(f"certificates_{place}", f"Certificates in {place}", caption, certified, columns)


def accuracy(study: Study, findings: Findings) -> Table | None:
    """Every checkpoint by itself, beside what its own run measured."""
    members = [(group.label, m, m.own) for group in study.groups for m in group.members if m.own]

    def figure(name: str) -> Callable[[Any], Cell]:
        return lambda one: pooled([one[2]], name)

    def count(name: str) -> Callable[[Any], Cell]:
        return lambda one: one[2]["values"].get(name)

    columns: Columns = [
        (Column("checkpoint"), lambda one: one[1].checkpoint.name),
        (ARCHITECTURE, lambda one: one[0]),
        (Column("seed"), lambda one: one[1].checkpoint.seed),
        (Column("step"), lambda one: one[1].checkpoint.step),
        (Column("context", "tokens"), lambda one: one[2]["identity"].get("length")),
        (Column("loss", "nats"), figure("loss")),
        (Column("perplexity"), figure("perplexity")),
        (Column("bits per byte"), figure("bits_per_byte")),
        (Column("accuracy" if study.recall else "top-1 accuracy", "%"), figure("accuracy")),
        *((Column(name), count(name)) for name in ("tokens", "documents", "samples")),
        (Column("run's own val/loss", "nats"), lambda one: own_loss(one[1].checkpoint, study.split)),
        (Column("difference to it", "nats", signed=True), lambda one: to_own(one[1], one[2], study.split)),
    ]
    caption = (
        f"At the length that the run validated at; 95 % bootstrap intervals over {study.units}. The run's own loss "
        "is of its validation at the checkpoint's step; the difference is given where kind of device, precision, split "
        f"and length are the same, and named where it is above {AGREES:g}. "
    )
    used = [row for _, _, row in members]
    title = f"Accuracy of each checkpoint: {study.title}"
    return tabulate(f"accuracy_{study.name}", title, caption + findings.source(used), members, columns)


def own_loss(checkpoint: Checkpoint, split: str = "val") -> float | None:
    """The validation loss that a run recorded at its checkpoint's step; None on another split."""
    try:
        column = checkpoint.record["metrics"]["val/loss"]
        at_checkpoint = 0 <= checkpoint.step - column["step"][-1] <= 1  # a logger counts from 0
        return finite(column["value"][-1]) if split == "val" and at_checkpoint else None
    except MALFORMED:
        return None


def to_own(member: Member, row: Row, split: str) -> Measured | None:
    """The loss less the run's own, where both are the same measurement: device, float32, split and length."""
    recorded, loss = own_loss(member.checkpoint, split), finite(row["values"].get("loss"))
    try:
        trained_on, precision = (member.checkpoint.record[part] for part in ("environment", "training"))
        devices = {str(of["device"]).split(":")[0] for of in (trained_on, row["identity"]["environment"])}
        precisions = row["identity"]["environment"]["dtype"], str(precision["precision"])[:2]
    except MALFORMED:
        return None
    same = len(devices) == 1 and precisions == ("float32", "32")
    if recorded is None or loss is None or not same or row["identity"].get("length") not in (None, member.length):
        return None
    return Measured(loss - recorded, note="" if abs(loss - recorded) <= AGREES else "does not agree")


def by_length(study: Study, findings: Findings) -> Table | None:
    """Bits per byte at each context length."""
    groups, ranked = study.ordered()
    trained = {trained_length(group) for group in groups}

    def header(length: int) -> str:
        (own,) = trained if len(trained) == 1 else (None,)
        return f"{length:,} tokens" + (f" ({length // own}x)" if own and length % own == 0 else "")

    columns: Columns = [
        (ARCHITECTURE, lambda group: group.label),
        *((Column(header(length), best="low"), _bits_at(length)) for length in study.lengths),
    ]
    caption = "Bits per byte when the same text is read in contexts of one, two, ... times the length of training. "
    title = f"Bits per byte by length of context: {study.title}"
    return tabulate(f"by_length_{study.name}", title, caption + findings.source(study.rows), groups, columns, ranked)


def by_distance(study: Study, findings: Findings) -> Table | None:
    """Loss by the distance at which a token's bigram was last seen."""
    groups, ranked = study.ordered()
    names = list(dict.fromkeys(name for group in groups for name in slices(group.own, "recall", "loss")))
    columns: Columns = [
        (ARCHITECTURE, lambda group: group.label),
        *((Column(name, "nats", "low"), _slice_of("recall", name, "loss")) for name in names),
    ]
    caption = (
        "Hits are tokens whose bigram with the token before occurred earlier in the context, by how many tokens ago; "
        "the rest could not be looked up. "
    )
    title = f"Loss on recall hits: {study.title}"
    return tabulate(f"hits_{study.name}", title, caption + findings.source(study.rows), groups, columns, ranked)


def recall(study: Study, findings: Findings) -> Table | None:
    """Accuracy of every checkpoint on every slice of a recall task."""
    members = [(group.label, member) for group in study.groups for member in group.members]
    entries = [(label, m, entry) for label, m in members if m.recall for entry in m.recall["values"]["slices"]]
    columns: Columns = [
        (ARCHITECTURE, lambda one: one[0]),
        (Column("seed"), lambda one: one[1].checkpoint.seed),
        (Column("slice"), lambda one: one[2]["slice"]),
        (Column("length", "tokens"), lambda one: one[2].get("length")),
        (Column("accuracy", "%"), lambda one: pool([one[2].get("accuracy")], [one[2].get("interval")])),
    ]
    caption = "Share of questions answered right, with 95 % bootstrap intervals over samples. "
    title = f"Recall by slice: {study.title}"
    return tabulate(f"recall_{study.name}", title, caption + findings.source(study.rows), entries, columns)


def costs_by_length(findings: Findings, place: str, which: tuple[str, str, str]) -> Table | None:
    """One cost of every body in one environment, at each length."""
    value, title, unit = which
    bodies = findings.costs[place]

    def at(length: int) -> Callable[[Any], Cell]:
        return lambda one: cost(one[1].get(length), value)

    lengths = sorted({length for rows in bodies.values() for length in rows})
    columns: Columns = [
        (ARCHITECTURE, lambda one: one[0]),
        *((Column(f"{length:,} tokens", unit, "low"), at(length)) for length in lengths),
    ]
    caption = "One sequence, embedding to last norm, without the head. "
    caption += "Median of the rounds, with its 95 % bootstrap interval. " * (value in PASSES)
    caption += "Peak beyond the model and its input. " * (value in ("forward_bytes", "training_bytes"))
    caption += "2 a multiply-add, by the closed form. " * (value == "forward_flops")
    caption += findings.cost_source(place)
    return tabulate(
        f"cost_{value}_{place}", f"{title[0].upper()}{title[1:]}, {place}", caption, list(bodies.items()), columns
    )


def fitted_from(costs: Sequence[Mapping[int, Row]]) -> int:
    """The length from which on exponents are fitted: 2,048 where there are two such lengths, else the shortest."""
    return LONG if len({length for rows in costs for length in rows if length >= LONG}) > 1 else 0


def power(rows: Mapping[int, Row], name: str, shortest: int) -> Measured | None:
    """The exponent that a cost grows with."""
    found = exponent(samples(rows, name), shortest)
    return None if found is None else Measured(found["exponent"], *found["interval"])


def exponents(findings: Findings, place: str) -> Table | None:
    """How every cost grows with the length, in one environment."""
    bodies = findings.costs[place]
    shortest = fitted_from(list(bodies.values()))

    def growth(name: str) -> Callable[[Any], Measured | None]:
        return lambda one: power(one[1], name, shortest)

    def words(one: Any) -> Cell:
        found = growth("training")(one)
        return found and f"{'sub-quadratic: ' * (found.value <= SUBQUADRATIC)}grows as T^{found.value:.2f}"

    columns: Columns = [
        (ARCHITECTURE, lambda one: one[0]),
        (Column("training pass in words"), words),
        *((Column(title, best="low", decimals=2), growth(name)) for name, title, _ in COSTS),
    ]
    caption = (
        f"Slope of ln(cost) over ln(length), {f'from {LONG:,} tokens on' if shortest else 'over all lengths'}"
        f"{'' if shortest else f', as fewer than two reach {LONG:,} tokens'}; 95 % bootstrap intervals over rounds. "
        f"Called sub-quadratic up to {SUBQUADRATIC}. {findings.cost_source(place)}"
    )
    return tabulate(f"exponents_{place}", f"Exponents, {place}", caption, list(bodies.items()), columns)


def crossovers(findings: Findings, place: str) -> Table | None:
    """From which length on one costs less than another: than `standard`, or every pair where there is none."""
    bodies = findings.costs[place]
    standard = [name for name in bodies if kind(name) == "standard"]
    pairs = [(a, b) for b in standard or bodies for a in bodies if a not in standard and a != b]
    found = []
    for value, title, _ in COSTS:
        for a, b in pairs if value in (*PASSES, "training_bytes") else []:
            ours, theirs = samples(bodies[a], value), samples(bodies[b], value)
            if common := ours.keys() & theirs.keys():
                found.append((a, b, title, crossover(ours, theirs), min(common)))
    columns: Columns = [
        (ARCHITECTURE, lambda one: one[0]),
        (Column("against"), lambda one: one[1]),
        (Column("cost"), lambda one: one[2]),
        (Column("from", "tokens"), lambda one: one[3]["length"]),
        (Column("low", "tokens"), lambda one: one[3]["interval"][0]),
        (Column("high", "tokens"), lambda one: one[3]["interval"][1]),
        (Column("in words"), lambda one: passes(*one)),
    ]
    caption = (
        "The length from which on the first costs less than the other, on straight lines in logarithms between the "
        "lengths measured, and its 95 % bootstrap interval over rounds; a blank was not reached. "
    )
    caption += findings.cost_source(place)
    return tabulate(f"crossovers_{place}", f"Crossovers, {place}", caption, found, columns)


def passes(ours: str, theirs: str, what: str, found: Mapping[str, Any], shortest: int) -> str:
    """A crossover in words."""
    length, longest = found["length"], found["longest"]
    if length is None:
        return f"{ours} does not pass {theirs} in its {what}: not reached by {longest:,}"
    low, high = (f"beyond {longest:,}" if bound is None else f"{bound:,}" for bound in found["interval"])
    if length <= shortest:
        return f"{ours} is below {theirs} in its {what} from the shortest length ({shortest:,}) on"
    return f"{ours} passes {theirs} in its {what} at T = {length:,} [{low}, {high}]"


def environments(findings: Findings) -> Table | None:
    """What E1, E2, ... stand for."""
    facts = [(place, json.loads(text)) for text, place in findings.environments.items()]
    names = list(dict.fromkeys(name for _, of in facts for name in of))
    columns: Columns = [
        (Column("id"), lambda one: one[0]),
        *((Column(name), lambda one, name=name: _plain(one[1].get(name))) for name in names),
    ]
    caption = "Numbers from different environments are neither averaged nor ranked against each other."
    return tabulate("environments", "Environments", caption, facts, columns)


def _plain(value: Any) -> Cell:
    if isinstance(value, Mapping) and "commit" in value:
        return f"{str(value['commit'])[:10]}{' with changes' * bool(value.get('changed'))}"
    return None if value is None else str(value)


def data_sets(findings: Findings) -> Table | None:
    """What D1, D2, ... stand for."""
    hidden = ("batch_size", "eval_batch_size", "num_workers", "cache_dir", "seed", "context_length")

    def arguments(one: Any) -> str:
        chosen = {k: v for k, v in one[2].data_arguments.items() if k not in hidden and v is not None} if one[2] else {}
        return ", ".join(f"{name}={value}" for name, value in chosen.items())

    seen = {c.data_fingerprint or "": c for c in reversed(findings.checkpoints)}
    columns: Columns = [
        (Column("id"), lambda one: one[0]),
        (Column("class"), lambda one: one[2] and one[2].data_class),
        (Column("arguments"), arguments),
        (Column("fingerprint"), lambda one: one[1] or "unknown"),
    ]
    items = [(number, fingerprint, seen.get(fingerprint)) for fingerprint, number in findings.data.items()]
    return tabulate("data", "Data", "What checkpoints were trained and evaluated on.", items, columns)


def commands(findings: Findings) -> Table | None:
    """What C1, C2, ... stand for, and how much each measured."""
    by_command: dict[str, list[Row]] = defaultdict(list)
    for row in findings.rows:
        by_command[findings.command(row)].append(row)
    columns: Columns = [
        (Column("id"), lambda one: findings.commands[one[0]]),
        (Column("command"), lambda one: one[0]),
        (Column("environment"), lambda one: ", ".join(sorted({findings.environment(r) for r in one[1]}, key=natural))),
        (Column("rows"), lambda one: len(one[1])),
    ]
    caption = "What was run for the numbers in this report, and how many rows of results.jsonl it made of them."
    return tabulate("commands", "Commands", caption, sorted(by_command.items()), columns)
