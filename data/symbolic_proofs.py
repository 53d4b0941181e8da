"""
A symbolic language of problems and their proofs: words, syntax, renderings in other words, and a checker that executes every step.

    program := stmt* '{' stmt* '}' 'qed' '.'
    stmt    := 'hyp' id ':' (type | prop) '.' | 'assume' id ':' prop '.' | 'let' id ':=' term '.' | 'show' prop '.'
             | 'step' (prop | term) '~>' (prop | term) ['for' id 'in' term] '.' 'by' ('deduce' | 'contra' | 'calc' | 'subst') '.'
    type    := 'Nat' | 'Prop' | type '->' type
    prop    := 'forall' id ':' type ',' prop | 'exists' id ':' type ',' prop | prop '/\\' prop | prop '=>' prop | 'not' prop | term rel term | id [term] | '(' prop ')'
    rel     := '>' | '=' | '<>' | 'divides' | 'in' | 'notin'
    term    := id | digit+ | '{' id ':' type 'st' prop '}' | '{' term (',' term)* '}' | 'card' term | 'prod' id ':' term ',' term | term ('+' | '*' | 'mod') term

The problem stands before the block; the block holds the trace and ends in `show`. Binding from loose to tight: => (to the right), /\\, not, rel, mod, +, *.
Identifiers: h0..h63 name facts, p0..p63 are propositions (or, with a term, predicates), a..z are numbers and individuals, S0..S7 sets. A number is its digits,
the most significant first unless digit_order says least. Tokens are separated by blanks. Negation in the notation this is modelled on is a combining tilde
(U+0303) on a blank; it is read as `not` under every Unicode normalisation, also where that has put it on a letter. Only one example of that notation is
public: grammar, rules and corpus are a reconstruction.
A step by calc must be true in integer arithmetic, one by deduce, contra or subst must follow from what is known.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

# ---------------------------------------------------------------------------------------------------------------------------------------------------
# Words

LABELS, PROPOSITIONS, SETS = (tuple(f"{pool}{i}" for i in range(count)) for pool, count in (("h", 64), ("p", 64), ("S", 8)))
VARIABLES, DIGITS = tuple("abcdefghijklmnopqrstuvwxyz"), tuple("0123456789")
NAMES, PREDICATES = frozenset(LABELS + PROPOSITIONS + SETS + VARIABLES), frozenset(PROPOSITIONS)
POWER = {"=>": 1, "/\\": 2, ">": 4, "=": 4, "<>": 4, "divides": 4, "in": 4, "notin": 4, "mod": 6, "+": 7, "*": 8}  # how tightly operators bind
PREFIX = dict(forall=1, exists=1, prod=5, card=9, apply=10) | {"not": 3}
BINDERS = ("forall", "exists", "prod", "st")
RULES = ("deduce", "contra", "calc", "subst")
KEYWORDS = (*"qed . { } hyp : assume let := step ~> for by show Nat Prop -> forall exists , ( ) not st card prod".split(), *RULES, *POWER)

SYMBOLIC = dict(hyp="hyp # : # .", assume="assume # : # .", let="let # := # .", step="step # ~> # . by # .", show="show # .", open="{", close="} qed .")
TEMPLATES = dict(  # of statements; # stands for a part
    symbolic=SYMBOLIC, answer_only=SYMBOLIC, shuffled_trace=SYMBOLIC,
    english=dict(hyp="we know by # that # .", assume="suppose by # that # .", let="let # be # .", step="from # we get # by # .", show="therefore # .",
                 open="proof :", close="this completes the proof ."),
    lean_like=dict(hyp="axiom # : # ;", assume="intro ( # : # ) ;", let="def # := # ;", step="calc # _ = # := by # ;", show="show # ;",
                   open="theorem := by", close="done ;"))
PHRASES = dict(  # inside statements, where they differ from the symbols
    english={"=>": "implies", "/\\": "and", "not": "not", ">": "is greater than", "=": "equals", "<>": "differs from", "in": "is in", "notin": "is not in", "+": "plus",
             "*": "times", "mod": "modulo", "{": "the set of", "}": "in all", "deduce": "deduction", "contra": "contradiction", "calc": "calculation", "subst": "substitution"},
    lean_like={"=>": "→", "/\\": "∧", "not": "¬", "<>": "≠", "in": "∈", "notin": "∉", "divides": "∣", "mod": "%", "forall": "∀", "exists": "∃", "st": "|",
               "deduce": "apply", "contra": "absurd", "calc": "norm_num", "subst": "unfold"})
PAD = "<pad>"
VOCABULARY = tuple(dict.fromkeys([PAD, *DIGITS, *KEYWORDS, *LABELS, *PROPOSITIONS, *VARIABLES, *SETS, *(
    word for table in (*TEMPLATES.values(), *PHRASES.values()) for text in table.values() for word in text.split() if word != "#")]))
VOCAB_SIZE = -(-(len(VOCABULARY) + 1) // 64) * 64  # the last id is the end of text
IDS = {word: number for number, word in enumerate(VOCABULARY)}


def split_words(text: str) -> list[str]:
    """The tokens of a text. ValueError for one outside the vocabulary."""
    words = unicodedata.normalize("NFC", re.sub("[\u0303\u02dc]", " not ", unicodedata.normalize("NFD", text))).split()
    if unknown := next((word for word in words if word not in IDS), None):
        raise ValueError(f"{unknown!r} is no word of the language")
    return words

# ---------------------------------------------------------------------------------------------------------------------------------------------------
# Syntax: numbers are int, names str, everything else (operator, part, ...); a statement (keyword, ...); a program (problem, block)


def is_prop(node) -> bool:
    return node in PREDICATES if isinstance(node, str) else not isinstance(node, int) and (POWER.get(node[0], 9) <= 4 or node[0] in ("not", "forall", "exists", "apply"))


class Parser:
    """Reads a symbolic program. ValueError where it is none."""

    def __init__(self, words: list[str], digit_order: str = "most"):
        self.words, self.place, self.digit_order = words, 0, digit_order

    @property
    def next(self) -> str:
        return self.words[self.place] if self.place < len(self.words) else "the end"

    def take(self, *expected: str) -> str:
        word = self.next
        if expected and word not in expected:
            raise ValueError(f"word {self.place + 1} is {word}, expected {' or '.join(expected)}")
        self.place += 1
        return word

    def program(self) -> tuple:
        problem, block = self.statements("{"), self.statements("}")
        self.take("qed"), self.take(".")
        if self.place < len(self.words):
            raise ValueError(f"{self.next} follows qed .")
        return problem, block

    def statements(self, end: str) -> tuple:
        found = []
        while self.next != end:
            found.append(self.statement())
        self.take(end)
        return tuple(found)

    def statement(self) -> tuple:
        keyword = self.take("hyp", "assume", "let", "step", "show")
        if keyword == "step":
            parts = [self.expression(0), self.take("~>") and self.expression(0), None]
            if self.next == "for":
                parts[2] = self.take() and self.name(), self.take("in") and self.term(4)
            self.take("."), self.take("by")
            parts.append(self.take(*RULES))
        elif keyword == "show":
            parts = [self.prop(0)]
        else:
            parts = [self.name(NAMES if keyword != "let" else NAMES - PREDICATES)]
            self.take(":=" if keyword == "let" else ":")
            parts.append(self.term(4) if keyword == "let" else self.type() if keyword == "hyp" and self.next in ("Nat", "Prop") else self.prop(0))
        self.take(".")
        return keyword, *parts

    def name(self, names: frozenset = NAMES - PREDICATES) -> str:
        if self.next not in names:
            raise ValueError(f"word {self.place + 1} is {self.next}, expected a name")
        return self.take()

    def type(self):
        kind = self.take("Nat", "Prop")
        return ("->", kind, self.take() and self.type()) if self.next == "->" else kind

    def prop(self, power: int):
        return self.of_sort(self.expression(power), True)

    def term(self, power: int):
        return self.of_sort(self.expression(power), False)

    def of_sort(self, node, prop: bool):
        if is_prop(node) != prop:
            raise ValueError(f"a {'term' if prop else 'proposition'} ends at word {self.place}, expected a {'proposition' if prop else 'term'}")
        return node

    def expression(self, power: int):
        """Everything that operators tighter than `power` bind."""
        left = self.prefix()
        while POWER.get(operator := self.next, 0) > power:
            self.of_sort(left, POWER[operator] < 4)
            right = self.take() and self.expression(POWER[operator] - (operator == "=>"))
            left = operator, left, self.of_sort(right, POWER[operator] < 4)
        return left

    def prefix(self):
        if self.next in DIGITS:
            digits = []
            while self.next in DIGITS:
                digits.append(self.take())
            return int("".join(digits if self.digit_order == "most" else reversed(digits)))
        if self.next in NAMES:
            name = self.take()
            return ("apply", name, self.of_sort(self.prefix(), False)) if name in PREDICATES and (self.next in DIGITS or self.next in NAMES or self.next == "{") else name
        word = self.take("(", "{", "not", "card", "forall", "exists", "prod")
        if word == "(":
            inner = self.prop(0)
            self.take(")")
            return inner
        if word in ("not", "card"):
            return word, self.prop(2) if word == "not" else self.term(8)
        if word == "{":
            if self.next in NAMES and self.words[self.place + 1:self.place + 2] == [":"]:
                node = "st", self.name(), self.take(":") and self.type(), self.take("st") and self.prop(0)
            else:
                node = "set", self.term(4)
                while self.next == ",":
                    node = *node, self.take() and self.term(4)
            self.take("}")
            return node
        if word == "prod":
            return word, self.name(), self.take(":") and self.term(4), self.take(",") and self.term(4)
        return word, self.name(), self.take(":") and self.type(), self.take(",") and self.prop(0)


def written(node, digit_order: str = "most", power: int = 0) -> list[str]:
    """The words of an expression where operators up to `power` would tear it apart. ValueError for a term that would need parentheses: it has none."""
    def part(inner, power=0):
        return written(inner, digit_order, power)
    if isinstance(node, int):
        return list(str(node) if digit_order == "most" else reversed(str(node)))
    if isinstance(node, str):
        return [node]
    operator, *parts = node
    own = POWER.get(operator) or PREFIX.get(operator, 11)
    if operator == "->":
        return [parts[0], "->", *part(parts[1])]
    if operator in POWER:
        words = [*part(parts[0], own - (own not in (1, 4))), operator, *part(parts[1], own - (own == 1))]
    elif operator == "set":
        words = ["{", *(word for number, element in enumerate(parts) for word in [","] * (number > 0) + part(element, 4)), "}"]
    elif operator == "st":
        words = ["{", parts[0], ":", *part(parts[1]), "st", *part(parts[2]), "}"]
    elif operator == "apply":
        words = [parts[0], *part(parts[1], 10)]
    elif operator in ("not", "card"):
        words = [operator, *part(parts[0], own - 1)]
    else:
        words = [operator, parts[0], ":", *part(parts[1], 4 * (operator == "prod")), ",", *part(parts[2], 4 * (operator == "prod"))]
    if own > power:
        return words
    if not is_prop(node):
        raise ValueError(f"{' '.join(words)} would need parentheses, and terms have none")
    return ["(", *words, ")"]


def rendered(program: tuple, rendering: str, digit_order: str = "most") -> tuple[list[str], list[str]]:
    """The words of a program: (the problem and the opening of its block, the rest)."""
    templates, phrases = TEMPLATES[rendering], PHRASES.get(rendering, {})

    def said(keyword: str, *parts) -> Iterator[str]:
        if keyword == "step":
            before, after, binding, rule = parts
            parts = before, [*written(after, digit_order), *(["for", binding[0], "in", *written(binding[1], digit_order)] if binding else [])], rule
        slots = iter(part if isinstance(part, list) else written(part, digit_order) for part in parts)
        for word in templates[keyword].split():
            yield from (phrases.get(inner, inner) for inner in next(slots)) if word == "#" else [word]
    prompt, solution = ([word for statement in statements for text in said(*statement) for word in text.split()] for statements in program)
    return prompt + templates["open"].split(), solution + templates["close"].split()


def symbolic_words(words: list[str], rendering: str) -> list[str]:
    """A program in any rendering as symbolic words. ValueError where a statement fits no template."""
    templates, symbols = TEMPLATES[rendering], {phrase: symbol for symbol, phrase in PHRASES.get(rendering, {}).items()}
    if templates is SYMBOLIC:
        return words
    phrase = re.compile(r"(?<!\S)(?:" + "|".join(map(re.escape, sorted(symbols, key=len, reverse=True))) + r")(?!\S)")
    statements = {keyword: re.compile(re.escape(template).replace(r"\#", "([^.;]+?)") + "(?: |$)") for keyword, template in templates.items()}
    text, place, found = " ".join(words), 0, []
    while place < len(text):
        keyword, match = next(((keyword, match) for keyword, statement in statements.items() if (match := statement.match(text, place))), (None, None))
        if not match:
            raise ValueError(f"no statement begins with {' '.join(text[place:].split()[:4])}")
        slots = iter(match.groups())
        found += [phrase.sub(lambda m: symbols[m[0]], next(slots)) if word == "#" else word for word in SYMBOLIC[keyword].split()]
        place = match.end()
    return " ".join(found).split()

# ---------------------------------------------------------------------------------------------------------------------------------------------------
# The checker


def binds(node) -> bool:
    """Whether an expression has a variable of its own somewhere."""
    return isinstance(node, tuple) and (node[0] in BINDERS or any(map(binds, node[1:])))


def replaced(node, names: dict):
    """An expression with names replaced by expressions, but for parts that have variables of their own."""
    if isinstance(node, str):
        return names.get(node, node)
    return node if isinstance(node, int) or node[0] in BINDERS else (node[0], *(replaced(part, names) for part in node[1:]))


class Proof:
    """What is known at a point of a program. A fault is a ValueError."""

    def __init__(self):
        self.known, self.lets, self.values, self.assumed = set(), {}, {}, []  # assumed: (proposition, what was known before it)

    def value(self, term) -> int | frozenset:
        if isinstance(term, int):
            return term
        if isinstance(term, str):
            if term not in self.lets:
                raise ValueError(f"{term} has no value")
            if term not in self.values:
                self.values[term] = self.value(self.lets[term])
            return self.values[term]
        operator, *parts = term
        if operator == "set":
            return frozenset(self.number(part) for part in parts)
        if operator in ("card", "prod"):
            values = self.value(parts[-1] if operator == "card" else parts[1])
            if isinstance(values, int) or binds(parts[-1]):
                raise ValueError(f"{text_of(term)} cannot be calculated")
            return len(values) if operator == "card" else reduce(self.product, (self.number(replaced(parts[2], {parts[0]: value})) for value in values), 1)
        if operator not in ("+", "*", "mod"):
            raise ValueError(f"{text_of(term)} cannot be calculated")
        a, b = map(self.number, parts)
        if operator == "mod" and not b:
            raise ValueError("modulo 0")
        return a + b if operator == "+" else self.product(a, b) if operator == "*" else a % b

    def product(self, a: int, b: int) -> int:
        if a.bit_length() + b.bit_length() > 10_000:  # programs may come from anywhere
            raise ValueError("a product is too long")
        return a * b

    def number(self, term) -> int:
        if not isinstance(value := self.value(term), int):
            raise ValueError(f"{text_of(term)} is not a number")
        return value

    def true(self, prop) -> bool:
        """By calculation. ValueError for what that cannot decide."""
        operator, *parts = prop if isinstance(prop, tuple) else (None,)
        if operator in ("not", "/\\", "=>"):
            values = [self.true(part) for part in parts]
            return not values[0] if operator == "not" else all(values) if operator == "/\\" else values[1] or not values[0]
        if operator in ("=", "<>"):
            return (self.value(parts[0]) == self.value(parts[1])) == (operator == "=")
        if operator in ("in", "notin"):
            if isinstance(values := self.value(parts[1]), int):
                raise ValueError(f"{text_of(parts[1])} is not a set")
            return (self.number(parts[0]) in values) == (operator == "in")
        if operator in (">", "divides"):
            a, b = map(self.number, parts)
            return a > b if operator == ">" else b % a == 0 if a else b == 0
        raise ValueError(f"{text_of(prop)} cannot be calculated")

    def holds(self, prop) -> bool:
        try:
            return prop in self.known or self.true(prop)
        except ValueError:
            return False

    def state(self, keyword: str, name: str, meaning):
        """hyp, assume or let."""
        if keyword == "let":
            if name in self.lets or repr(name) in repr(self.known):  # what stands for anything in a fact must not be given a value
                raise ValueError(f"{name} already means something")
            self.lets[name] = meaning
            return
        if keyword == "assume":
            self.assumed.append((meaning, set(self.known)))
        if is_prop(meaning):
            self.known.add(meaning)

    def step(self, before, after, binding, rule: str):
        if is_prop(before) != is_prop(after):
            raise ValueError("a step leads from a term to a term or from a proposition to a proposition")
        if rule == "calc" and not is_prop(before):
            if (got := self.value(before)) != self.value(after):
                raise ValueError(f"{text_of(before)} is {got if isinstance(got, int) else sorted(got)}, not {text_of(after)}")
        elif rule == "calc":
            for prop in (before, after):
                if not self.true(prop):
                    raise ValueError(f"{text_of(prop)} is false")
        elif rule == "subst":
            if binding and self.lets.get(binding[0]) != binding[1]:
                raise ValueError(f"{binding[0]} is not defined as {text_of(binding[1])}")
            names = dict([binding]) if binding else self.lets
            if replaced(before, names) != replaced(after, names):
                raise ValueError(f"{text_of(after)} is not {text_of(before)} with names replaced")
        if rule in ("deduce", "contra") or is_prop(before):
            if not self.holds(before):
                raise ValueError(f"{text_of(before)} is not known")
            if rule == "deduce" and not self.follows(before, after, binding):
                raise ValueError(f"no fact leads from {text_of(before)} to {text_of(after)}")
            if rule == "contra":
                if not self.assumed:
                    raise ValueError("nothing was assumed")
                if ("not", before) != after or not self.holds(after):
                    raise ValueError(f"{text_of(before)} and {text_of(after)} do not clash")
                after, self.known = self.assumed.pop()
                after = "not", after
            self.known.add(after)

    def follows(self, before, after, binding) -> bool:
        if binding:
            facts = (fact[3] for fact in self.known if fact[0] == "forall" and fact[1] == binding[0] and not binds(fact[3]))
            return ("=>", before, after) in (replaced(fact, dict([binding])) for fact in facts)
        transitive = before[0] == after[0] == ">" and before[1] == after[1] and (">", before[2], after[2]) in self.known
        return transitive or ("=>", before, after) in self.known or before[0] == "/\\" and after in before[1:]


def text_of(node) -> str:
    return " ".join(written(node))


@dataclass(frozen=True)
class Verdict:
    valid: bool  # the trace has a step and all its steps hold
    shown: bool  # what is shown holds
    fault: str = ""


def run_block(proof: Proof, lines: list[tuple[int, tuple]], ordered: bool):
    """The (number, statement) of a block's lines before the last. ValueError for the first that does not hold."""
    if not ordered:  # until nothing more follows
        lines = sorted(lines, key=lambda line: (line[1][0] == "step") + (line[1][-1] == "contra"))
    while lines:
        waiting = []
        for number, (keyword, *parts) in lines:
            try:
                if keyword in ("hyp", "show"):
                    raise ValueError(f"{keyword} stands in the trace")
                proof.step(*parts) if keyword == "step" else proof.state(keyword, *parts)
            except ValueError as error:
                waiting.append((number, (keyword, *parts)))
                if ordered or len(waiting) == len(lines):
                    raise ValueError(f"line {number} of the block: {error}") from None
        lines = waiting


def check(program: tuple, ordered: bool = True) -> Verdict:
    """Executes a program. ordered: a step may use what stands before it only."""
    (problem, block), proof = program, Proof()
    try:
        for keyword, *parts in problem:
            if keyword in ("step", "show"):
                raise ValueError(f"{keyword} stands before the block")
            proof.state(keyword, *parts)
        if not block or block[-1][0] != "show":
            raise ValueError("the block does not end in show")
        run_block(proof, list(enumerate(block[:-1], 1)), ordered)
        if proof.assumed:
            raise ValueError(f"{text_of(proof.assumed[-1][0])} is still assumed")
        if all(statement[0] != "step" for statement in block):
            raise ValueError("there is no step")
        shown = proof.holds(block[-1][1])
    except (ValueError, RecursionError) as error:
        return Verdict(False, False, str(error))
    return Verdict(True, shown, "" if shown else f"{text_of(block[-1][1])} does not follow")


def normalised(problem: tuple) -> str:
    """A problem in which neither the names and the order of facts nor the order of summands, factors and elements count."""
    def plain(node):
        if not isinstance(node, tuple) or node[0] not in ("+", "*", "set"):
            return node if not isinstance(node, tuple) else (node[0], *map(plain, node[1:]))
        parts = list(node[1:])
        while node[0] != "set" and isinstance(parts[0], tuple) and parts[0][0] == node[0]:
            parts[:1] = parts[0][1:]
        return (node[0], *sorted(map(plain, parts), key=repr))
    return "\n".join(sorted(repr((keyword, plain(meaning), name * (keyword == "let"))) for keyword, name, meaning in problem))


def split_of(problem: tuple) -> str:
    """train, val or test, by the hash of the normalised problem."""
    share = hashlib.sha256(normalised(problem).encode()).digest()[0]
    return "test" if share < 32 else "val" if share < 48 else "train"
