"""
A symbolic language of problems and their proofs: words, syntax, renderings in other words, and a checker that executes
every step.

    program := stmt* '{' stmt* '}' 'qed' '.'
    stmt    := 'hyp' id ':' (type | prop) '.' | 'assume' id ':' prop '.' | 'let' id ':=' term '.' | 'show' prop '.'
             | 'step' (prop | term) '~>' (prop | term) ['for' id 'in' term] '.'
               'by' ('deduce' | 'contra' | 'calc' | 'subst') '.'
    type    := 'Nat' | 'Prop' | type '->' type
    prop    := 'forall' id ':' type ',' prop | 'exists' id ':' type ',' prop | prop '/\\' prop | prop '=>' prop
             | 'not' prop | term rel term | id [term] | '(' prop ')'
    rel     := '>' | '=' | '<>' | 'divides' | 'in' | 'notin'
    term    := id | digit+ | '{' id ':' type 'st' prop '}' | '{' term (',' term)* '}' | 'card' term
             | 'prod' id ':' term ',' term | term ('+' | '*' | 'mod') term

The problem stands before the block; the block holds the trace and ends in `show`. Binding from loose to tight: => (to
the right), /\\, not, rel, mod, +, *. Identifiers: h0..h63 name facts, p0..p63 are propositions (or, with a term,
predicates), a..z are numbers and individuals, S0..S7 sets. A number is its digits, the most significant first unless
digit_order says least. Tokens are separated by blanks. Negation in the notation this is modelled on is a combining
tilde (U+0303) on a blank; it is read as `not` under every Unicode normalisation, also where that has put it on a
letter. Only one example of that notation is public: grammar, rules and corpus are a reconstruction.
A step by calc must be true in integer arithmetic, one by deduce, contra or subst must follow from what is known.
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce

# ---- Words ------------------------------------------------------------------

LABELS = tuple(f"h{i}" for i in range(64))
PROPOSITIONS = tuple(f"p{i}" for i in range(64))
SETS = tuple(f"S{i}" for i in range(8))
VARIABLES = tuple("abcdefghijklmnopqrstuvwxyz")
DIGITS = tuple("0123456789")
NAMES = frozenset(LABELS + PROPOSITIONS + SETS + VARIABLES)
PREDICATES = frozenset(PROPOSITIONS)
POWER = {  # how tightly operators bind
    "=>": 1, "/\\": 2, ">": 4, "=": 4, "<>": 4, "divides": 4, "in": 4, "notin": 4, "mod": 6, "+": 7, "*": 8}
PREFIX = dict(forall=1, exists=1, prod=5, card=9, apply=10) | {"not": 3}  # and what stands before its operands
BINDERS = ("forall", "exists", "prod", "st")
RULES = ("deduce", "contra", "calc", "subst")
SYNTAX = "qed . { } hyp : assume let := step ~> for by show Nat Prop -> forall exists , ( ) not st card prod"
KEYWORDS = (*SYNTAX.split(), *RULES, *POWER)

SYMBOLIC = dict(hyp="hyp # : # .", assume="assume # : # .", let="let # := # .", step="step # ~> # . by # .",
                show="show # .", open="{", close="} qed .")
TEMPLATES = dict(  # of statements; # stands for an operand
    symbolic=SYMBOLIC, answer_only=SYMBOLIC, shuffled_trace=SYMBOLIC,
    english=dict(hyp="we know by # that # .", assume="suppose by # that # .", let="let # be # .",
                 step="from # we get # by # .", show="therefore # .", open="proof :",
                 close="this completes the proof ."),
    lean_like=dict(hyp="axiom # : # ;", assume="intro ( # : # ) ;", let="def # := # ;", step="calc # _ = # := by # ;",
                   show="show # ;", open="theorem := by", close="done ;"))
PHRASES = dict(  # inside statements, where they differ from the symbols
    english={"=>": "implies", "/\\": "and", "not": "not", ">": "is greater than", "=": "equals", "<>": "differs from",
             "in": "is in", "notin": "is not in", "+": "plus", "*": "times", "mod": "modulo", "{": "the set of",
             "}": "in all", "deduce": "deduction", "contra": "contradiction", "calc": "calculation",
             "subst": "substitution"},
    lean_like={"=>": "→", "/\\": "∧", "not": "¬", "<>": "≠", "in": "∈", "notin": "∉", "divides": "∣", "mod": "%",
               "forall": "∀", "exists": "∃", "st": "|", "deduce": "apply", "contra": "absurd", "calc": "norm_num",
               "subst": "unfold"})
PAD = "<pad>"
RENDERED = [word for table in (*TEMPLATES.values(), *PHRASES.values()) for text in table.values()
            for word in text.split() if word != "#"]
VOCABULARY = tuple(dict.fromkeys(
    [PAD, *DIGITS, *KEYWORDS, *LABELS, *PROPOSITIONS, *VARIABLES, *SETS, *RENDERED]))
VOCAB_SIZE = -(-(len(VOCABULARY) + 1) // 64) * 64  # the last id is the end of text
IDS = {word: number for number, word in enumerate(VOCABULARY)}


def split_words(text: str) -> list[str]:
    """The tokens of a text. ValueError for one outside the vocabulary."""
    plain = re.sub("[\u0303\u02dc]", " not ", unicodedata.normalize("NFD", text))
    words = unicodedata.normalize("NFC", plain).split()
    for word in words:
        if word not in IDS:
            raise ValueError(f"{word!r} is no word of the language")
    return words


# ---- Syntax: a program and its words ----------------------------------------

# A number is an int, a name a str, everything else a tuple (operator, operand, ...); a statement is (keyword, ...), and
# a program (problem, block), two tuples of statements.


def is_prop(node) -> bool:
    """Whether an expression is a proposition, and no term."""
    if isinstance(node, tuple):
        return POWER.get(node[0], 9) <= 4 or node[0] in ("not", "forall", "exists", "apply")
    return node in PREDICATES


class Parser:
    """Reads a symbolic program. ValueError where it is none."""

    def __init__(self, words: list[str], digit_order: str = "most"):
        self.words = words
        self.index = 0                  # of the word that comes next
        self.digit_order = digit_order  # most: the most significant digit comes first; least: last

    @property
    def next(self) -> str:
        return self.words[self.index] if self.index < len(self.words) else "the end"

    def take(self, *expected: str) -> str:
        """The next word, which must be one of those expected, where there are some."""
        word = self.next
        if expected and word not in expected:
            raise ValueError(f"word {self.index + 1} is {word}, expected {' or '.join(expected)}")
        self.index += 1
        return word

    def after(self, word: str, read: Callable, *arguments):
        """What read(*arguments) finds behind the next word, which must be this one."""
        self.take(word)
        return read(*arguments)

    def program(self) -> tuple:
        problem, block = self.statements("{"), self.statements("}")
        self.take("qed")
        self.take(".")
        if self.index < len(self.words):
            raise ValueError(f"{self.next} follows qed .")
        return problem, block

    def statements(self, end: str) -> tuple:
        """All statements before the word `end`."""
        statements = []
        while self.next != end:
            statements.append(self.statement())
        self.take(end)
        return tuple(statements)

    def statement(self) -> tuple:
        keyword = self.take("hyp", "assume", "let", "step", "show")
        if keyword == "step":
            operands = self.step()
        elif keyword == "show":
            operands = (self.prop(0),)
        elif keyword == "let":
            operands = self.name(), self.after(":=", self.term, 4)
        else:
            name = self.name(NAMES)
            self.take(":")
            is_type = keyword == "hyp" and self.next in ("Nat", "Prop")
            operands = name, self.type() if is_type else self.prop(0)
        self.take(".")
        return keyword, *operands

    def step(self) -> tuple:
        """(before, after, None or (name, term) of `for`, rule)"""
        before, after = self.expression(0), self.after("~>", self.expression, 0)
        binding = None
        if self.next == "for":
            binding = self.after("for", self.name), self.after("in", self.term, 4)
        self.take(".")
        self.take("by")
        return before, after, binding, self.take(*RULES)

    def name(self, names: frozenset = NAMES - PREDICATES) -> str:
        if self.next not in names:
            raise ValueError(f"word {self.index + 1} is {self.next}, expected a name")
        return self.take()

    def type(self):
        kind = self.take("Nat", "Prop")
        return ("->", kind, self.after("->", self.type)) if self.next == "->" else kind

    def prop(self, power: int):
        return self.of_sort(self.expression(power), True)

    def term(self, power: int):
        return self.of_sort(self.expression(power), False)

    def of_sort(self, node, prop: bool):
        """The node, which must be a proposition or, with prop=False, a term."""
        if is_prop(node) != prop:
            got, wanted = ("term", "proposition") if prop else ("proposition", "term")
            raise ValueError(f"a {got} ends at word {self.index}, expected a {wanted}")
        return node

    def expression(self, power: int):
        """Everything that operators tighter than `power` bind."""
        left = self.prefix()
        while POWER.get(self.next, 0) > power:
            operator = self.next
            self.of_sort(left, POWER[operator] < 4)
            right = self.after(operator, self.expression, POWER[operator] - (operator == "=>"))
            left = operator, left, self.of_sort(right, POWER[operator] < 4)
        return left

    def prefix(self):
        """An expression that begins with no other: a number, a name, or what a word before it makes."""
        # a number, a name
        if self.next in DIGITS:
            digits = []
            while self.next in DIGITS:
                digits.append(self.take())
            return int("".join(digits if self.digit_order == "most" else reversed(digits)))
        if self.next in NAMES:
            name = self.take()
            is_applied = name in PREDICATES and (self.next in DIGITS or self.next in NAMES or self.next == "{")
            return ("apply", name, self.of_sort(self.prefix(), False)) if is_applied else name

        # what the first word makes of the rest
        word = self.take("(", "{", "not", "card", "forall", "exists", "prod")
        if word == "(":
            inner = self.prop(0)
            self.take(")")
            return inner
        if word == "{":
            return self.set()
        if word == "not":
            return word, self.prop(2)
        if word == "card":
            return word, self.term(8)
        if word == "prod":
            return word, self.name(), self.after(":", self.term, 4), self.after(",", self.term, 4)
        return word, self.name(), self.after(":", self.type), self.after(",", self.prop, 0)

    def set(self) -> tuple:
        """The rest of a set whose { is taken, given by a property or by its elements."""
        if self.next in NAMES and self.words[self.index + 1:self.index + 2] == [":"]:
            node = "st", self.name(), self.after(":", self.type), self.after("st", self.prop, 0)
        else:
            node = "set", self.term(4)
            while self.next == ",":
                node = *node, self.after(",", self.term, 4)
        self.take("}")
        return node


def to_words(node, digit_order: str = "most", power: int = 0) -> list[str]:
    """
    The words of an expression where operators up to `power` would tear it apart. ValueError for a term that would need
    parentheses: it has none.
    """
    def write(inner, power=0):
        return to_words(inner, digit_order, power)

    # numbers, names and types
    if isinstance(node, int):
        return list(str(node) if digit_order == "most" else reversed(str(node)))
    if isinstance(node, str):
        return [node]
    operator, *operands = node
    if operator == "->":
        return [operands[0], "->", *write(operands[1])]

    # an operator with its operands
    binding = POWER.get(operator) or PREFIX.get(operator, 11)
    if operator in POWER:
        left, right = operands
        words = [*write(left, binding - (binding not in (1, 4))), operator, *write(right, binding - (binding == 1))]
    elif operator == "set":
        words = ["{", *write(operands[0], 4)]
        for element in operands[1:]:
            words += [",", *write(element, 4)]
        words.append("}")
    elif operator == "st":
        words = ["{", operands[0], ":", *write(operands[1]), "st", *write(operands[2]), "}"]
    elif operator == "apply":
        words = [operands[0], *write(operands[1], 10)]
    elif operator in ("not", "card"):
        words = [operator, *write(operands[0], binding - 1)]
    else:
        inner = 4 if operator == "prod" else 0
        words = [operator, operands[0], ":", *write(operands[1], inner), ",", *write(operands[2], inner)]

    # parentheses, where it would be torn apart
    if binding > power:
        return words
    if not is_prop(node):
        raise ValueError(f"{' '.join(words)} would need parentheses, and terms have none")
    return ["(", *words, ")"]


def render_program(program: tuple, rendering: str, digit_order: str = "most") -> tuple[list[str], list[str]]:
    """The words of a program: (the problem and the opening of its block, the rest)."""
    # words in the phrases of the rendering, statement by statement
    templates, phrases = TEMPLATES[rendering], PHRASES.get(rendering, {})

    def render(keyword: str, *operands) -> Iterator[str]:
        """The words of a statement; some phrases are several in one text."""
        if keyword == "step":
            before, after, binding, rule = operands
            slots = [to_words(before, digit_order), to_words(after, digit_order), [rule]]
            if binding:
                slots[1] += ["for", binding[0], "in", *to_words(binding[1], digit_order)]
        else:
            slots = [to_words(operand, digit_order) for operand in operands]
        waiting = iter(slots)
        for word in templates[keyword].split():
            if word == "#":
                yield from (phrases.get(inner, inner) for inner in next(waiting))
            else:
                yield word

    problem, block = ([word for statement in statements for text in render(*statement) for word in text.split()]
                      for statements in program)
    return problem + templates["open"].split(), block + templates["close"].split()


def to_symbolic(words: list[str], rendering: str) -> list[str]:
    """A program in any rendering as symbolic words. ValueError where a statement fits no template."""
    templates = TEMPLATES[rendering]
    if templates is SYMBOLIC:
        return words

    # the phrases, longest first, and the statements, as patterns
    symbols = {phrase: symbol for symbol, phrase in PHRASES.get(rendering, {}).items()}
    longest_first = sorted(symbols, key=len, reverse=True)
    phrase = re.compile(r"(?<!\S)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\S)")
    patterns = {keyword: re.compile(re.escape(template).replace(r"\#", "([^.;]+?)") + "(?: |$)")
                for keyword, template in templates.items()}

    # one statement after another, each by the first template that fits
    text, start = " ".join(words), 0
    symbolic = []
    while start < len(text):
        matches = ((keyword, pattern.match(text, start)) for keyword, pattern in patterns.items())
        keyword, match = next(((keyword, match) for keyword, match in matches if match), (None, None))
        if not match:
            raise ValueError(f"no statement begins with {' '.join(text[start:].split()[:4])}")
        slots = iter(match.groups())
        for word in SYMBOLIC[keyword].split():
            symbolic.append(phrase.sub(lambda m: symbols[m[0]], next(slots)) if word == "#" else word)
        start = match.end()
    return " ".join(symbolic).split()


# ---- The checker ------------------------------------------------------------


def binds(node) -> bool:
    """Whether an expression binds a variable somewhere."""
    return isinstance(node, tuple) and (node[0] in BINDERS or any(map(binds, node[1:])))


def replace_names(node, names: dict):
    """An expression with names replaced by expressions, but for those that bind a variable."""
    if isinstance(node, str):
        return names.get(node, node)
    if isinstance(node, int) or node[0] in BINDERS:
        return node
    return node[0], *(replace_names(operand, names) for operand in node[1:])


class Proof:
    """What is known at a point of a program. A fault is a ValueError."""

    def __init__(self):
        self.known = set()   # propositions that hold here
        self.lets = {}       # name -> the term that it stands for
        self.values = {}     # name -> its value, of those that were calculated
        self.assumed = []    # (proposition, what was known before it), the innermost last

    def value(self, term) -> int | frozenset:
        """What a term is, a number or a set, by calculation."""
        # a number, a name, a set
        if isinstance(term, int):
            return term
        if isinstance(term, str):
            if term not in self.lets:
                raise ValueError(f"{term} has no value")
            if term not in self.values:
                self.values[term] = self.value(self.lets[term])
            return self.values[term]
        operator, *operands = term
        if operator == "set":
            return frozenset(self.number(element) for element in operands)

        # over the elements of a set
        if operator in ("card", "prod"):
            values = self.value(operands[-1] if operator == "card" else operands[1])
            if isinstance(values, int) or binds(operands[-1]):
                raise ValueError(f"{text_of(term)} cannot be calculated")
            if operator == "card":
                return len(values)
            name, _, factor = operands
            return reduce(self.product, (self.number(replace_names(factor, {name: value})) for value in values), 1)

        # of two numbers
        if operator not in ("+", "*", "mod"):
            raise ValueError(f"{text_of(term)} cannot be calculated")
        a, b = map(self.number, operands)
        if operator == "+":
            return a + b
        if operator == "*":
            return self.product(a, b)
        if not b:
            raise ValueError("modulo 0")
        return a % b

    def product(self, a: int, b: int) -> int:
        if a.bit_length() + b.bit_length() > 10_000:  # programs may come from anywhere
            raise ValueError("a product is too long")
        return a * b

    def number(self, term) -> int:
        value = self.value(term)
        if not isinstance(value, int):
            raise ValueError(f"{text_of(term)} is not a number")
        return value

    def true(self, prop) -> bool:
        """Whether a proposition is true, by calculation. ValueError for what that cannot decide."""
        # of propositions
        operator, *operands = prop if isinstance(prop, tuple) else (None,)
        if operator in ("not", "/\\", "=>"):
            values = [self.true(operand) for operand in operands]
            if operator == "/\\":
                return all(values)
            return not values[0] or operator == "=>" and values[1]

        # of terms
        if operator in ("=", "<>"):
            return (self.value(operands[0]) == self.value(operands[1])) == (operator == "=")
        if operator in ("in", "notin"):
            values = self.value(operands[1])
            if isinstance(values, int):
                raise ValueError(f"{text_of(operands[1])} is not a set")
            return (self.number(operands[0]) in values) == (operator == "in")
        if operator == ">":
            a, b = map(self.number, operands)
            return a > b
        if operator == "divides":
            a, b = map(self.number, operands)
            return b % a == 0 if a else b == 0
        raise ValueError(f"{text_of(prop)} cannot be calculated")

    def holds(self, prop) -> bool:
        """Whether a proposition is known, or true by calculation."""
        try:
            return prop in self.known or self.true(prop)
        except ValueError:
            return False

    def state(self, keyword: str, name: str, meaning):
        """Take in a statement by hyp, assume or let."""
        if keyword == "let":
            # what stands for anything in a fact must not be given a value
            if name in self.lets or repr(name) in repr(self.known):
                raise ValueError(f"{name} already means something")
            self.lets[name] = meaning
            return
        if keyword == "assume":
            self.assumed.append((meaning, set(self.known)))
        if is_prop(meaning):
            self.known.add(meaning)

    def step(self, before, after, binding, rule: str):
        """Execute a step: what it leads to is known afterwards, if it is a proposition."""
        if is_prop(before) != is_prop(after):
            raise ValueError("a step leads from a term to a term or from a proposition to a proposition")
        if rule == "calc":
            self.calculate(before, after)
        elif rule == "subst":
            self.substitute(before, after, binding)
        if rule not in ("deduce", "contra") and not is_prop(before):
            return

        # from one proposition to another
        if not self.holds(before):
            raise ValueError(f"{text_of(before)} is not known")
        if rule == "deduce" and not self.follows(before, after, binding):
            raise ValueError(f"no fact leads from {text_of(before)} to {text_of(after)}")
        if rule == "contra":
            after = self.refute(before, after)
        self.known.add(after)

    def calculate(self, before, after):
        """ValueError unless two terms have one value, or two propositions are true."""
        if is_prop(before):
            for prop in (before, after):
                if not self.true(prop):
                    raise ValueError(f"{text_of(prop)} is false")
            return
        value = self.value(before)
        if value != self.value(after):
            shown = value if isinstance(value, int) else sorted(value)
            raise ValueError(f"{text_of(before)} is {shown}, not {text_of(after)}")

    def substitute(self, before, after, binding):
        """ValueError unless two expressions are the same once names are replaced, one by `for` or all by `let`."""
        if binding and self.lets.get(binding[0]) != binding[1]:
            raise ValueError(f"{binding[0]} is not defined as {text_of(binding[1])}")
        names = dict([binding]) if binding else self.lets
        if replace_names(before, names) != replace_names(after, names):
            raise ValueError(f"{text_of(after)} is not {text_of(before)} with names replaced")

    def refute(self, before, after) -> tuple:
        """The negation of the last assumption, which is over, as a proposition and its negation hold."""
        if not self.assumed:
            raise ValueError("nothing was assumed")
        if ("not", before) != after or not self.holds(after):
            raise ValueError(f"{text_of(before)} and {text_of(after)} do not clash")
        assumption, self.known = self.assumed.pop()
        return "not", assumption

    def follows(self, before, after, binding) -> bool:
        """Whether a known fact leads from one proposition to another: by =>, by > twice, or out of /\\."""
        if binding:
            facts = (fact[3] for fact in self.known
                     if fact[0] == "forall" and fact[1] == binding[0] and not binds(fact[3]))
            return ("=>", before, after) in (replace_names(fact, dict([binding])) for fact in facts)
        transitive = before[0] == after[0] == ">" and before[1] == after[1] and (">", before[2], after[2]) in self.known
        return transitive or ("=>", before, after) in self.known or before[0] == "/\\" and after in before[1:]


def text_of(node) -> str:
    return " ".join(to_words(node))


@dataclass(frozen=True)
class Verdict:
    valid: bool  # the trace has a step and all its steps hold
    shown: bool  # what is shown holds
    fault: str = ""


def run_block(proof: Proof, lines: list[tuple[int, tuple]], ordered: bool):
    """
    Execute a block's lines before the last, (number, statement). ValueError for the first that does not hold; unordered
    lines are tried again as long as one more does.
    """
    if not ordered:
        lines = sorted(lines, key=lambda line: (line[1][0] == "step") + (line[1][-1] == "contra"))

    # all that hold; those that do not wait for the next turn
    while lines:
        waiting = []
        for number, (keyword, *operands) in lines:
            try:
                if keyword in ("hyp", "show"):
                    raise ValueError(f"{keyword} stands in the trace")
                if keyword == "step":
                    proof.step(*operands)
                else:
                    proof.state(keyword, *operands)
            except ValueError as error:
                waiting.append((number, (keyword, *operands)))
                if ordered or len(waiting) == len(lines):
                    raise ValueError(f"line {number} of the block: {error}") from None
        lines = waiting


def check(program: tuple, ordered: bool = True) -> Verdict:
    """Execute a program. ordered: a step may use what stands before it only."""
    problem, block = program
    proof = Proof()
    try:
        # the problem
        for keyword, *operands in problem:
            if keyword in ("step", "show"):
                raise ValueError(f"{keyword} stands before the block")
            proof.state(keyword, *operands)

        # the trace, and what it is to show
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


def normalise(problem: tuple) -> str:
    """
    A problem in which neither the names and the order of facts nor the order of summands, factors and elements count.
    """
    def plain(node):
        if not isinstance(node, tuple):
            return node
        operator, *operands = node
        if operator not in ("+", "*", "set"):
            return operator, *map(plain, operands)
        while operator != "set" and isinstance(operands[0], tuple) and operands[0][0] == operator:
            operands[:1] = operands[0][1:]
        return operator, *sorted(map(plain, operands), key=repr)

    statements = [(keyword, plain(meaning), name if keyword == "let" else "") for keyword, name, meaning in problem]
    return "\n".join(sorted(map(repr, statements)))


def split_of(problem: tuple) -> str:
    """train, val or test, by the hash of the normalised problem."""
    share = hashlib.sha256(normalise(problem).encode()).digest()[0]
    if share < 32:
        return "test"
    return "val" if share < 48 else "train"
