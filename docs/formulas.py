"""Set the formulas of a docstring as MathML, which browsers draw without scripts or fonts of their own.

The notation is that of bsbr_pl/attention: `k_j`, `S_{t-1}`, `A_ts` (two indices), `K^T`, `k^` (a hat), `sum_{j < c}`,
`sqrt(K)`, `q . k` (a dot product), `a * b` (by element), `<q, k>`, `S <- S + U`. Any other sign raises a ValueError.
"""

import re
from collections.abc import Collection
from html import escape

GREEK = {"alpha": "α", "beta": "β", "gamma": "γ", "kappa": "κ", "lambda": "λ", "mu": "μ"}  # noqa: RUF001
GREEK |= {"phi": "φ", "rho": "ρ", "xi": "ξ", "zeta": "ζ"}  # noqa: RUF001
SIGNS = {"<-": "←", "<=": "≤", ">=": "≥", "...": "⋯", "-": "−", ".": "⋅", "*": "⊙"}  # noqa: RUF001
SIGNS |= {sign: escape(sign) for sign in "+/=<>,×"}  # noqa: RUF001
CLOSING = {"(": ")", "{": "}", "⟨": "⟩"}
FUNCTION = re.compile("exp|log|sqrt|sigmoid|softplus|softmax|SiLU|relu|elu|RMSNorm|LayerNorm|tanh|tril|diag|mean|mod")
TOKEN = r" +|\d+(?:e-\d+|\.\d+)?|[A-Za-z]+|<-|<=|>=|\.\.\.|."
TIMES = re.compile(r"(?<=\b[A-Z]) x (?=[A-Z]\b)")  # the shape C x V, not the product x W_u
ANGLES = re.compile(r"<(\w[^<>]*)>")
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
SPACE = '<mspace width=".2em"/>'


def tokens(text: str, names: Collection[str]) -> list[str]:
    """The tokens of a formula, and "" at the end. Each of `names` is one token."""
    text = ANGLES.sub(r"⟨\1⟩", TIMES.sub(" × ", text))  # noqa: RUF001
    options = [rf"\b{name}\b" for name in sorted(names, key=len, reverse=True)]
    return [*re.findall("|".join([*options, TOKEN]), text), ""]


class Formula:
    """A formula, parsed by recursive descent. `names` are options with an underscore, set as code."""

    def __init__(self, text: str, names: Collection[str] = ()) -> None:
        self.text = text
        self.tokens = tokens(text, names)

    def math(self, display: bool = False) -> str:
        inside = self.row("", display)
        return f'<math displaystyle="{str(display).lower()}">{inside}</math>'

    def take(self, expected: str | None = None) -> str:
        token = self.tokens.pop(0)
        if expected is not None and token != expected:
            raise ValueError(f"formula {self.text!r}: {expected or 'the end'!r} is missing before {token!r}")
        return token

    def row(self, end: str, display: bool = False) -> str:
        """Everything up to the token `end`."""
        parts, after_value, spaced = [], False, False
        while self.tokens[0] != end:
            token = self.tokens[0]
            if token.isspace():
                spaced = True
                self.take()
                continue
            if token in SIGNS or (token == "in" and end == "}"):
                prefix = "" if after_value or token != "-" else ' form="prefix"'
                parts.append(f"<mo{prefix}>{SIGNS.get(self.take(), '∈')}</mo>")
                after_value = False
            else:
                parts += [SPACE] * (spaced and after_value)
                parts.append(self.value(display))
                after_value = True
            spaced = False
        self.take(end)
        return "".join(parts)

    def value(self, display: bool) -> str:
        """A name, number or bracket with what is below and above it."""
        first = self.tokens[0]
        base = self.base(display)
        below, above, hat = "", "", False
        while (token := self.tokens[0]) in ("_", "^", "'"):
            self.take()
            if token == "'":
                above += "<mo>′</mo>"  # noqa: RUF001
            elif token == "_":
                below = self.script()
            elif re.match(r"[A-Za-z0-9{(-]", self.tokens[0]):
                above += self.script()
            else:
                hat = True
        base = f'<mover accent="true">{base}<mo>^</mo></mover>' if hat else base
        below, above = (f"<mrow>{part}</mrow>" if part else "" for part in (below, above))
        if first in ("sum", "mean") and below and display:
            return f"<munder>{base}{below}</munder>"
        if below and above:
            return f"<msubsup>{base}{below}{above}</msubsup>"
        return f"<msub>{base}{below}</msub>" if below else f"<msup>{base}{above}</msup>" if above else base

    def base(self, display: bool) -> str:
        token = self.take()
        if token == "sqrt" and self.tokens[0] == "(":
            self.take()
            return f"<msqrt>{self.row(')', display)}</msqrt>"
        if token in CLOSING:
            end = CLOSING[token]
            inside = self.row(end, display)
            return f'<mrow><mo stretchy="false">{token}</mo>{inside}<mo stretchy="false">{end}</mo></mrow>'
        if token[:1].isdigit():
            digits, _, power = token.partition("e-")
            return f"<msup><mn>10</mn><mn>-{power}</mn></msup>" if power else f"<mn>{digits}</mn>"
        if token == "sum":
            return "<mo>∑</mo>"
        if re.fullmatch("[A-Za-z]+", token):
            return f"<mi>{GREEK.get(token, token)}</mi>"
        if re.fullmatch(r"\w+", token):
            return f"<mtext><code>{token}</code></mtext>"
        raise ValueError(f"formula {self.text!r}: {token or 'the end'!r} is not part of the notation")

    def script(self) -> str:
        """What follows _ or ^: an expression in brackets, a number or a name. Two letters are two indices."""
        token = self.take()
        if token in ("{", "("):
            return self.row(CLOSING[token])
        if token == "-":
            return f'<mo form="prefix">{SIGNS["-"]}</mo>{self.base(display=False)}'
        if re.fullmatch("[a-z]{2}", token) and token != "dt":
            return "".join(f"<mi>{letter}</mi>" for letter in token)
        self.tokens.insert(0, token)
        return self.base(display=False)


# -- text with formulas ------------------------------------------------------------------------------------------------


def set_text(body: str, names: Collection[str] = ()) -> str:
    """The paragraphs of a docstring as HTML: an indented paragraph is formulas, the others are text with formulas."""
    paragraphs = [paragraph for paragraph in re.split(r"\n\s*\n", body) if paragraph.strip()]
    formulas = [paragraph for paragraph in paragraphs if paragraph.startswith("    ")]
    letters = set(re.findall(r"(?<![A-Za-z_^{])[AI](?![A-Za-z])", "\n".join(formulas)))
    parts = []
    for paragraph in paragraphs:
        if paragraph in formulas:
            lines = (f"<div>{set_line(line, names, letters)}</div>" for line in paragraph.splitlines())
            parts.append(f'<div class="formulas">{"".join(lines)}</div>')
        else:
            parts.append(f"<p>{set_prose(' '.join(paragraph.split()), names, letters)}</p>")
    return "\n".join(parts)


def set_line(line: str, names: Collection[str] = (), letters: Collection[str] = ()) -> str:
    """A line of formulas and remarks, two spaces or a semicolon apart. A remark begins in brackets or has no sign =."""
    cells = re.split(r" {2,}(?![= ])| ; +", line.strip())
    return "".join(
        f"<span>{Formula(cell, names).math(display=True)}</span>"
        if re.search(" (=|<-) ", cell) and not re.match(r"\(|for ", cell)
        else f'<span class="remark">{set_prose(cell, names, letters)}</span>'
        for cell in cells
    )


def set_prose(text: str, names: Collection[str] = (), letters: Collection[str] = ()) -> str:
    """Text as HTML: `code` and options as code, arXiv numbers as links, formulas as MathML.

    A formula is the longest sequence of words that `is_formula`. The word a is not a variable; A and I are only if in
    `letters`, and A not as the first word of a sentence that another word follows.
    """
    parts: list[str] = []
    words = re.findall(r"`[^`]+`\S*|\S+", text)
    while words:
        if starts_sentence(parts) and re.match("A [a-z]{2}", " ".join(words[:2])):
            parts.append(words.pop(0))
        for count in range(len(words), 0, -1):
            before, inside, after = without_punctuation(" ".join(words[:count]))
            if is_formula(inside, names, letters):
                parts.append(before + Formula(inside, names).math() + after)
                break
        else:
            parts.append(plain(words[0], names))
        del words[:count]
    return ARXIV.sub(r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>', " ".join(parts))


def starts_sentence(parts: list[str]) -> bool:
    """Whether the next word after these is the first of a sentence."""
    return not parts or parts[-1].endswith(".")


def without_punctuation(text: str) -> tuple[str, str, str]:
    """Split off the punctuation and the brackets around a formula whose other half is outside the text."""
    inside = text.rstrip(",;.:")
    while inside.count(")") > inside.count("(") and inside.endswith(")"):
        inside = inside[:-1].rstrip(",;.:")
    while inside.count("(") > inside.count(")") and inside.startswith("("):
        inside = inside[1:]
    before, _, after = text.partition(inside)
    return before, inside, after


def is_formula(text: str, names: Collection[str], letters: Collection[str]) -> bool:
    """Whether the text has the notation of a formula and at least one variable."""
    words = tokens(text, names)[:-1]
    if not words or text.endswith(("-", " =")) or re.search(r"\S\.|\.\S|^[-+=>./*]|^< |[^\w\s^'(){}=<>+/*.,-]", text):
        return False
    depth, variables = 0, 0
    for index, token in enumerate(words):
        depth += (token in CLOSING) - (token in CLOSING.values())
        scripted = words[index - 1 : index] in (["_"], ["^"]) or words[index + 1 : index + 2] == ["_"]
        letter = len(token) == 1 and token.isalpha() and (token not in "aAI" or token in letters or scripted)
        known = letter or token in GREEK or token in names
        variables += known
        if depth < 0 or (token == "," and depth == 0):
            return False
        if token.isalpha() and not (known or scripted or FUNCTION.fullmatch(token) or "{" in words[:index]):
            return False
    return depth == 0 and variables > 0 and text not in names


def plain(word: str, names: Collection[str]) -> str:
    """A word that is no formula; `code`, options and name=value are set as code."""
    code = re.fullmatch(rf"(\(?)(`[^`]+`|[a-z_]+=\w[\w.]*\w|{'|'.join([*names, '`'])})(\S*)", word)
    if code:
        return f"{code[1]}<code>{escape(code[2].strip('`'))}</code>{escape(code[3])}"
    return escape(word, quote=False)
