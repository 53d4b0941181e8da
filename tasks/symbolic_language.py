"""
A symbolic chain-of-thought language for very small models: problems, traces that a checker can execute, and answers.

    python -m tasks.symbolic_language make -o DIR [--families add,mul,mod,chain,order,set,div,contra]
                                           [--rendering symbolic|english|lean_like|answer_only|shuffled_trace]
                                           [--count 100000] [--val_count 2000] [--test_count 1000]
                                           [--digits 8] [--depth 8] [--digit_order most|least]
                                           [--sequence_length 512] [--loss_on all] [--seed 1]
    python -m tasks.symbolic_language show [--count 1] [the task's options, as above]
                                           a few examples of every family as text
    python -m tasks.symbolic_language check FILE [--rendering symbolic] [--digit_order most]
                                           a program on every line; a verdict on every line
    python -m tasks.symbolic_language evaluate --checkpoint FILE... [--data DIR] [--count 1000] [--length_count 1000]
                                           [--seed 1] [--device auto]

Grammar, renderings and checker are tasks/symbolic_proofs.py's. Families, with the knob that sets the difficulty: add,
mul, mod, div (digits, for mul 5/12 of them), chain, contra (deductions, with up to as many distractors, 16 at most),
order (transitive steps), set (elements). Difficulties are drawn evenly from 1 to the knob; the length sets x1.5 and x2
lie beyond it.
A problem goes to test (1/8), validation (1/16) or training by the hash of its normalised form, in which neither the
names and the order of facts nor the order of summands, factors and elements count; so no problem is in two of them,
whatever the seed. The problems of a test set are all different. Problems depend on the families, digits, depth and seed
alone: all renderings hold the same ones, and share one vocabulary of 320 ids, so that models have equal sizes.

Shards: rows of --sequence_length tokens, filled with whole documents and then with pads; train with --align_documents.
The end of text, the last id, begins every document and ends the one before; there is no id for unknown words. The tests
are lines of JSON in symbolic_test.jsonl. --loss_on has one value: the trainer takes its loss over all tokens of a row,
and shards cannot say which ones count.

evaluate decodes greedily what follows a problem and the opening of its block. exact: what is shown is the answer, token
for token. valid: the program can be read and every step of its trace, at least one, is true (calc: by integer
arithmetic) or follows (deduce, contra, subst); a true step that leads nowhere is valid. joint: both. identical: the
solution is the corpus's own. With 95 % Wilson intervals, beside the levels of always giving the most frequent answer of
that family and set, and of choosing at random among the possible answers. The trace of shuffled_trace is checked in any
order; answer_only has none. tokens: prompt and completion together.
Losses of such runs compare with no other corpus's. Exit code 1 and one line for a fault, or for a program that check
rejects.
"""

import argparse
import hashlib
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path

import torch

import train_gpt
import variants
from data.command_line import check_option, run_script
from data.shards import SHARD_TOKENS, check_folder, check_space, write_folder
from generate import Decoder, decodes_from_cache, sample
from tasks.symbolic_proofs import (
    IDS,
    LABELS,
    PAD,
    PROPOSITIONS,
    SETS,
    TEMPLATES,
    VARIABLES,
    VOCAB_SIZE,
    VOCABULARY,
    Parser,
    Verdict,
    check,
    normalise,
    render_program,
    split_of,
    split_words,
    to_symbolic,
)
from train_gpt import (
    RANGES,
    Config,
    Ranks,
    RunError,
    check_value,
    find_checkpoint,
    find_shards,
    read_checkpoint,
    read_meta,
    require,
    write_atomically,
)

# ---- Families ---------------------------------------------------------------

# A function of random numbers and a difficulty d -> (problem, trace, what is shown, number of possible answers).


def step(before, after, rule: str = "calc") -> tuple:
    return "step", before, after, None, rule


def plus(*terms):
    return reduce(lambda a, b: ("+", a, b), terms)


def draw_number(rng: random.Random, digits: int) -> int:
    """A number of so many digits; 0 has one."""
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10 ** digits)


def draw_operands(rng: random.Random, digits: int, count: int = 2) -> list[int]:
    """Numbers in any order, one of them with so many digits and the others with at most as many."""
    numbers = [draw_number(rng, digits), *(draw_number(rng, rng.randint(1, digits)) for _ in range(count - 1))]
    rng.shuffle(numbers)
    return numbers


def lowest_first(value: int) -> list[int]:
    """The digits of a number, the least significant first."""
    return [int(digit) for digit in reversed(str(value))]


def make_add(rng: random.Random, d: int) -> tuple:
    """Every step adds two digits and the carry."""
    a, b = draw_operands(rng, d)
    columns = [lowest_first(n) + [0] * d for n in (a, b)]
    trace, carry = [], 0
    for i in range(d):
        total = columns[0][i] + columns[1][i] + carry
        trace.append(step(plus(columns[0][i], columns[1][i], carry), total))
        carry = total // 10
    return [("let", "x", ("+", a, b))], trace, ("=", "x", a + b), 2 * 10 ** d - 1


def make_mul(rng: random.Random, d: int) -> tuple:
    """Every step multiplies two digits and adds what stands in that column so far, and the carry."""
    a, b = draw_operands(rng, d)
    first, second = lowest_first(a), lowest_first(b)
    columns = [0] * (len(first) + len(second))
    trace = []
    for j, lower in enumerate(second):
        carry = 0
        for i, upper in enumerate(first):
            total = upper * lower + columns[i + j] + carry
            trace.append(step(plus(("*", upper, lower), columns[i + j], carry), total))
            carry, columns[i + j] = divmod(total, 10)
        columns[j + len(first)] = carry
    return [("let", "x", ("*", a, b))], trace, ("=", "x", a * b), 10 ** len(columns)


def make_mod(rng: random.Random, d: int) -> tuple:
    """Operands are reduced digit by digit, then combined one by one, the result reduced each time."""
    m, operator = rng.randint(2, 9), rng.choice("+*")
    numbers = draw_operands(rng, d, 2 + d // 4)
    trace = []

    # the rest of every operand
    rests = []
    for n in numbers:
        rest = 0
        for digit in reversed(lowest_first(n)):
            trace.append(step(("mod", 10 * rest + digit, m), (10 * rest + digit) % m))
            rest = (10 * rest + digit) % m
        rests.append(rest)

    # all of them together
    rest = rests[0]
    for other in rests[1:]:
        total = rest + other if operator == "+" else rest * other
        trace += [step((operator, rest, other), total), step(("mod", total, m), total % m)]
        rest = total % m
    term = reduce(lambda a, b: (operator, a, b), numbers)
    return [("let", "x", ("mod", term, m))], trace, ("=", "x", rest), m


def make_div(rng: random.Random, d: int) -> tuple:
    """Long division, the quotient multiplied back with the rest as first carry, the witness."""
    # a divisor m of n, or none
    divides = rng.random() < 0.5
    m, n = 0, 0
    while not m or (n % m == 0) != divides:
        m, n = rng.randint(2, 9), draw_number(rng, d)

    # the division
    trace, rest = [], 0
    for digit in reversed(lowest_first(n)):
        value = 10 * rest + digit
        trace.append(step(value, ("+", ("*", m, value // m), value % m)))
        rest = value % m

    # the quotient times m, and the rest
    carry = rest
    for digit in lowest_first(n // m):
        trace.append(step(("+", ("*", digit, m), carry), digit * m + carry))
        carry = (digit * m + carry) // 10
    trace.append(step("y", ("+", ("*", "x", n // m), rest)))
    shown = ("divides", "x", "y")
    return [("let", "x", m), ("let", "y", n)], trace, shown if divides else ("not", shown), 2


def facts_of(rng: random.Random, facts: list) -> list:
    """Facts as statements, in random order and under random names."""
    rng.shuffle(facts)
    return [("hyp", label, fact) for label, fact in zip(rng.sample(LABELS, len(facts)), facts)]


def with_distractors(rng: random.Random, d: int, edges: Callable) -> tuple[list, list, int]:
    """
    (d + 1 propositions, distracting implications, propositions in all). edges: propositions and others -> the
    implications that change no answer.
    """
    count = rng.randint(0, min(16, d, 62 - d))
    names = rng.sample(PROPOSITIONS, d + 1 + (count + 1) // 2)
    path, others = names[:d + 1], names[d + 1:]
    distractors = rng.sample([("=>", a, b) for a, b in edges(path, others) if a != b], count) if count else []
    return path, distractors, len({*path, *(name for edge in distractors for name in edge[1:])})


def make_chain(rng: random.Random, d: int) -> tuple:
    """A proposition and implications from one to the next; distractors come from elsewhere."""
    def edges_of(path: list, others: list) -> list:
        return [(a, b) for a in others for b in path + others]

    path, distractors, count = with_distractors(rng, d, edges_of)
    edges = list(zip(path, path[1:]))
    facts = facts_of(rng, [path[0], *(("=>", a, b) for a, b in edges), *distractors])
    return facts, [step(a, b, "deduce") for a, b in edges], path[-1], count


def make_order(rng: random.Random, d: int) -> tuple:
    """Numbers in a row, each greater than the next: the first is greater than the last."""
    names = rng.sample(VARIABLES, d + 2)
    trace = [step((">", names[0], a), (">", names[0], b), "deduce") for a, b in zip(names[1:], names[2:])]
    facts = facts_of(rng, [(">", a, b) for a, b in zip(names, names[1:])])
    return facts, trace, (">", names[0], names[-1]), len(names) * (len(names) - 1)


def make_set(rng: random.Random, d: int) -> tuple:
    """A number and the elements of a set, compared one by one until it is found."""
    name, elements = rng.choice(SETS), rng.sample(range(100), d)
    is_in = rng.random() < 0.5
    x = rng.choice(elements) if is_in else rng.choice([n for n in range(100) if n not in elements])
    trace = [step(name, ("set", *elements), "subst")]
    for element in elements[:elements.index(x) + 1] if is_in else elements:
        trace.append(step(("in", element, name), ("=" if element == x else "<>", "x", element)))
    problem = [("let", name, ("set", *elements)), ("let", "x", x)]
    return problem, trace, ("in" if is_in else "notin", "x", name), 2


def make_contra(rng: random.Random, d: int) -> tuple:
    """A chain of implications whose end is false: so its beginning is, by contradiction. Distractors lead elsewhere."""
    def edges_of(path: list, others: list) -> list:
        return [(a, b) for a in path + others for b in others]

    path, distractors, count = with_distractors(rng, d, edges_of)
    edges = list(zip(path, path[1:]))
    problem = facts_of(rng, [("not", path[-1]), *(("=>", a, b) for a, b in edges), *distractors])
    label = rng.choice(sorted(set(LABELS) - {name for _, name, _ in problem}))
    trace = [("assume", label, path[0]), *(step(a, b, "deduce") for a, b in edges),
             step(path[-1], ("not", path[-1]), "contra")]
    return problem, trace, ("not", path[0]), count


FAMILIES = dict(add=make_add, mul=make_mul, mod=make_mod, chain=make_chain, order=make_order, set=make_set,
                div=make_div, contra=make_contra)
MOST = dict(chain=31, contra=31, order=12, set=49)  # depths whose length set of twice as many still has names
MOST_DIGITS = 500  # of training: a problem of twice as many is still read and written by Python's own numbers
SHORTEST = 16      # tokens, less than any problem has with its end of text
TEST_SETS = dict(zip(("test", "x1.5", "x2"), (None, 1.5, 2)))  # name: difficulty by the knob; None: drawn up to it


@dataclass(frozen=True)
class Task:
    """What a corpus holds. RunError for settings that contradict each other."""
    families: tuple[str, ...] = tuple(FAMILIES)
    rendering: str = "symbolic"
    digits: int = 8
    depth: int = 8
    digit_order: str = "most"
    sequence_length: int = 512

    def __post_init__(self):
        # words
        object.__setattr__(self, "families", tuple(self.families))
        families = ",".join(map(str, self.families))
        require(self.families and set(self.families) <= set(FAMILIES) and len(set(self.families)) == len(self.families),
                f"--families takes some of {','.join(FAMILIES)}, each once; got {families[:200]!r}")
        require(self.rendering in TEMPLATES,
                f"--rendering must be one of {', '.join(TEMPLATES)}; got {self.rendering!r}")
        require(self.digit_order in ("most", "least"), f"--digit_order must be most or least; got {self.digit_order!r}")

        # numbers
        for name in ("digits", "depth", "sequence_length"):
            check_value(int, getattr(self, name), f"--{name}", None)
        require(self.digits >= 1 and self.depth >= 1,
                f"--digits and --depth must be at least 1, got {self.digits} and {self.depth}")
        check_option(self, "digits", 1, MOST_DIGITS)
        for family in self.families:
            require(self.depth <= MOST.get(family, self.depth),
                    f"--depth {self.depth} leaves too few names for {family} at twice that; it goes up to "
                    f"{MOST.get(family)}")
        require(self.sequence_length >= 2, f"--sequence_length must be at least 2, got {self.sequence_length}")
        check_option(self, "sequence_length", *RANGES["sequence_length"])

    def most(self, family: str) -> int:
        """The highest difficulty of training."""
        if family == "mul":
            return -(-5 * self.digits // 12)
        return self.digits if family in ("add", "mod", "div") else self.depth


@dataclass(frozen=True)
class Problem:
    """A problem with its solution, in no rendering yet."""
    family: str
    difficulty: int
    program: tuple  # (problem, block)
    choices: int    # possible answers

    def text(self, task: Task) -> tuple[list[str], list[str]]:
        """Its words in the task's rendering: (the prompt, the solution)."""
        problem, block = self.program
        if task.rendering == "answer_only":
            block = block[-1:]
        elif task.rendering == "shuffled_trace":
            trace = list(block[:-1])
            random.Random(normalise(problem)).shuffle(trace)
            block = (*trace, block[-1])
        return render_program((problem, block), task.rendering, task.digit_order)


def draw_problem(family: str, rng: random.Random, difficulty: int) -> Problem:
    """A problem of a family, its trace and what it shows."""
    problem, trace, shown, choices = FAMILIES[family](rng, difficulty)
    return Problem(family, difficulty, (tuple(problem), (*trace, ("show", shown))), choices)


def problems(task: Task, split: str, count: int, seed: int) -> Iterator[Problem]:
    """`count` problems of training or validation. RunError if a family has none in that split."""
    rng = random.Random(f"{split} {seed}")
    for _ in range(count):
        family = rng.choice(task.families)
        for _ in range(10_000):
            problem = draw_problem(family, rng, rng.randint(1, task.most(family)))
            if split_of(problem.program[0]) == split:
                break
        else:
            raise RunError(f"{family} has no {split} problems at this size; raise --digits or --depth")
        yield problem


def held_out(task: Task, count: int, seed: int) -> Iterator[tuple[str, Problem]]:
    """
    (test, x1.5 or x2, problem): `count` different problems of every family for each. RunError if there are not so many.
    """
    for family in task.families:
        most = task.most(family)
        for test_set, factor in TEST_SETS.items():
            rng = random.Random(f"{family} {test_set} {seed}")
            seen, tries = set(), 0
            while len(seen) < count:
                difficulty = math.ceil(factor * most) if factor else rng.randint(1, most)
                problem = draw_problem(family, rng, difficulty)
                form = normalise(problem.program[0])
                tries += 1
                if form not in seen and (factor or split_of(problem.program[0]) == "test"):
                    seen.add(form)
                    yield test_set, problem
                require(tries <= 1000 + 100 * count, f"no more than {len(seen)} different problems of {family} were "
                        f"found for its set {test_set}; raise --digits or --depth, or lower --test_count")


# ---- Shards -----------------------------------------------------------------

TESTS = "symbolic_test.jsonl"  # beside them


def document_of(task: Task, problem: Problem) -> tuple[list[int], int]:
    """(tokens, bytes of text) of a problem and its solution. RunError if a row is too short for them."""
    prompt, solution = problem.text(task)
    words = prompt + solution
    length = len(words) + 1
    require(length <= task.sequence_length,
            f"a document of {problem.family} has {length} tokens and a row {task.sequence_length}: raise "
            "--sequence_length, or lower --digits or --depth")
    return [IDS[word] for word in words], len(" ".join(words).encode())


def pack(task: Task, split: str, problems: Iterable[Problem]) -> Iterator[tuple]:
    """
    (split, tokens, bytes of text, True) as ShardWriter.add takes it: rows of whole documents, then pads. RunError for a
    document longer than a row.
    """
    held, size = None, 0         # the document before, not yielded until its pads are known, and its bytes
    room = task.sequence_length  # in the row
    for problem in problems:
        tokens, text_bytes = document_of(task, problem)
        length = len(tokens) + 1
        if held is not None:
            if length > room:
                held = held + [IDS[PAD]] * room
                room = task.sequence_length
            yield split, held, size, True
        held, size = tokens, text_bytes
        room -= length
    yield split, held + [IDS[PAD]] * room, size, True


def make(folder: Path, task: Task, count: int, val_count: int, test_count: int, seed: int) -> dict:
    """
    Write the shards and the tests; returns the meta data. RunError for a count below 1, a task without enough problems,
    or a folder that cannot be written.
    """
    # what can be known beforehand
    for name, number, most in (("count", count, 10 ** 12), ("val_count", val_count, 10 ** 12),
                               ("test_count", test_count, 10 ** 6)):
        require(number >= 1, f"--{name} must be at least 1, got {number}")
        check_value(int, number, f"--{name}", (1, most))
    check_value(int, seed, "--seed", RANGES["seed"])
    for family in task.families:  # the longest first: nobody waits for the tests only to learn that rows are too short
        document_of(task, draw_problem(family, random.Random(seed), task.most(family)))
    check_space(folder, SHORTEST * (count + val_count), "these problems, the shortest there are,",
                "ask for a lower --count or --val_count")

    # the tests, and the documents of both splits
    def documents():
        (folder / TESTS).unlink(missing_ok=True)
        lines = []
        for test_set, problem in held_out(task, test_count, seed):
            prompt, solution = map(" ".join, problem.text(task))
            test = dict(part=test_set, family=problem.family, difficulty=problem.difficulty, choices=problem.choices,
                        prompt=prompt, solution=solution)
            lines.append(json.dumps(test, ensure_ascii=False).encode() + b"\n")
        for split, number in (("train", count), ("val", val_count)):
            yield from pack(task, split, problems(task, split, number, seed))
        write_atomically(folder / TESTS, lambda file: file.writelines(lines))

    rows = max(1, SHARD_TOKENS // task.sequence_length)  # of a shard
    settings = asdict(task) | dict(families=list(task.families))
    return write_folder(
        folder, "symbolic", documents(), end_of_text=VOCAB_SIZE - 1, shard_tokens=rows * task.sequence_length,
        beside=[TESTS], tokenizer="symbolic_language", source="tasks/symbolic_language.py", seed=seed,
        symbolic_language=settings, loss_on="all", vocabulary=digest_of_vocabulary())


def digest_of_vocabulary() -> str:
    """The SHA-256 of all words in their order."""
    return hashlib.sha256("\n".join(VOCABULARY).encode()).hexdigest()


# ---- Evaluation -------------------------------------------------------------


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share."""
    share, wide = right / count, z * z / count
    middle = (share + wide / 2) / (1 + wide)
    half = z * math.sqrt(share * (1 - share) / count + wide / (4 * count)) / (1 + wide)
    return max(0.0, middle - half), min(1.0, middle + half)


def complete(decoder: Callable[[int], Decoder], prompts: list[list[int]], limits: list[int], end: list[int],
             stops: set[int], rows: int = 64) -> list[list[int]]:
    """
    What greedy decoding adds to each prompt, until it ends as `end` does, a token of `stops` comes (left out) or its
    limit is reached. decoder: context -> a fresh Decoder. Prompts of equal length are decoded together, at most `rows`
    at a time.
    """
    # batches of prompts of one length, by their indices
    by_length = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    batches = [same[start:start + rows] for _, same in sorted(by_length.items())
               for start in range(0, len(same), rows)]

    # each until all of its rows are closed
    completions = [[] for _ in prompts]
    for batch in batches:
        most, open_rows = max(limits[i] for i in batch), set(batch)
        tokens = torch.tensor([prompts[i] for i in batch], dtype=torch.int32)
        for chosen in sample(decoder(tokens.shape[1] + most), tokens, most, temperature=0.0):
            for i, token in zip(batch, chosen.tolist()):
                if i in open_rows and token not in stops:
                    completions[i].append(token)
                if token in stops or len(completions[i]) == limits[i] or completions[i][-len(end):] == end:
                    open_rows.discard(i)
            if not open_rows:
                break
    return completions


def answer_of(words: list[str], rendering: str) -> str | None:
    """The words after the last show, None without one."""
    shown = re.escape(TEMPLATES[rendering]["show"]).replace(r"\#", "([^.;]+?)")
    answers = re.findall(rf"(?:^| ){shown}", " ".join(words))
    return answers[-1] if answers else None


def mark(task: Task, test: dict, completion: list[str]) -> dict:
    """A test with its marks: exact, valid (None without traces), joint, identical, tokens."""
    prompt, solution = test["prompt"].split(), test["solution"].split()
    exact = answer_of(completion, task.rendering) == answer_of(solution, task.rendering)
    valid = None
    if task.rendering != "answer_only":
        try:
            program = Parser(to_symbolic(prompt + completion, task.rendering), task.digit_order).program()
            valid = check(program, ordered=task.rendering != "shuffled_trace").valid
        except (ValueError, RecursionError):
            valid = False
    joint = None if valid is None else exact and valid
    return test | dict(exact=exact, valid=valid, joint=joint, identical=completion == solution,
                       tokens=len(prompt) + len(completion))


def summary(tests: list[dict], task: Task) -> dict:
    """Shares with their intervals, (share, low, high), of marked tests, mean tokens, and the two levels of chance."""
    # the marks; None where the rendering has no trace
    n, shares = len(tests), {}
    for name in ("exact", "valid", "joint", "identical"):
        shares[name] = None
        if tests[0][name] is not None:
            right = sum(test[name] for test in tests)
            shares[name] = (right / n, *wilson(right, n))

    # chance: the most frequent answer of every family, and any possible one
    answers = Counter((test["family"], answer_of(test["solution"].split(), task.rendering)) for test in tests)
    most = {}
    for (family, _), count in answers.items():
        most[family] = max(count, most.get(family, 0))
    at_random = sum(1 / test["choices"] for test in tests)
    return shares | dict(tokens=sum(test["tokens"] for test in tests) / n, majority=sum(most.values()) / n,
                         random=at_random / n, count=n)


def tables(tests: list[dict], task: Task) -> dict[tuple[str, str], dict]:
    """{(family or all, set or a quarter of its difficulties): summary} of marked tests."""
    groups = {}
    for test in sorted(tests, key=lambda test: (test["part"], test["difficulty"])):
        for family in ("all", test["family"]):
            groups.setdefault((family, test["part"]), []).append(test)
        most = task.most(test["family"])
        if test["part"] == "test" and most > 1:
            quarter = -(-most // 4)
            low = (test["difficulty"] - 1) // quarter * quarter + 1
            high = min(low + quarter - 1, most)
            name = f"test {low}-{high}" if low < high else f"test {low}"
            groups.setdefault((test["family"], name), []).append(test)

    order = ["all", *task.families]
    keys = sorted(groups, key=lambda key: (order.index(key[0]), key[1][0]))
    return {key: summary(groups[key], task) for key in keys}


def read_test(line: str, task: Task, number: int) -> dict:
    """A test from its line of JSON. RunError if it is none of the task's."""
    kinds = dict(part=str, family=str, difficulty=int, choices=int, prompt=str, solution=str)
    try:
        test = json.loads(line)
    except (ValueError, RecursionError):
        test = None
    fault = f"line {number} of {TESTS} is no test of this task"
    require(isinstance(test, dict) and set(test) == set(kinds), fault)
    require(all(type(test[name]) is kind for name, kind in kinds.items()), fault)
    require(test["part"] in TEST_SETS and test["family"] in task.families and test["choices"] >= 1, fault)
    require(1 <= test["difficulty"] <= 2 * task.most(test["family"]), fault)
    prompt, solution = test["prompt"].split(), test["solution"].split()
    require(prompt and solution and set(prompt + solution) <= set(IDS), fault)
    return test


def read_tests(folder: Path, count: int, seed: int, length_count: int | None = None) -> tuple[Task, list[dict]]:
    """
    (task, tests) of a data folder: `count` of every family, `length_count` (None: as many) in each of its length sets,
    or all. RunError if it holds none or another version's.
    """
    # all tests of the folder
    remedy = "give --data a folder that tasks/symbolic_language.py made"
    try:
        meta = read_meta(folder)
        settings = meta.get("symbolic_language")
        require(isinstance(settings, dict) and set(settings) == set(Task.__dataclass_fields__),
                "meta.json has no settings of one")
        require(isinstance(settings["families"], list), "families in its meta.json is no list")
        task = Task(**settings)
        check_folder(folder)
        lines = (folder / TESTS).read_text(encoding="utf-8").splitlines()
        tests = [read_test(line, task, number) for number, line in enumerate(lines, 1)]
        require(tests, f"{TESTS} is empty")
    except (OSError, ValueError, TypeError, RunError) as error:
        raise RunError(f"{folder} does not hold a task of the symbolic language; {remedy} "
                       f"({str(error)[:200]})") from None
    require(meta.get("vocabulary") == digest_of_vocabulary(),
            f"{folder} was made with another vocabulary; make it again, or use the version that made it")

    # as many as wanted of every family and set, in random order
    length_count = count if length_count is None else length_count
    for name, number in (("count", count), ("length_count", length_count)):
        require(number >= 1, f"--{name} must be at least 1, got {number}")
    groups = {}
    for test in random.Random(seed).sample(tests, len(tests)):
        groups.setdefault((test["family"], test["part"]), []).append(test)
    counts = {test_set: count if test_set == "test" else length_count for test_set in TEST_SETS}
    return task, [test for (_, test_set), group in groups.items() for test in group[:counts[test_set]]]


def solve(decoder: Callable[[int], Decoder], task: Task, tests: list[dict]) -> list[dict]:
    """The tests, marked. A completion may be half as long again as the solution, and 16 tokens."""
    prompts = [[VOCAB_SIZE - 1, *(IDS[word] for word in test["prompt"].split())] for test in tests]
    limits = [len(test["solution"].split()) * 3 // 2 + 16 for test in tests]
    stops = {IDS[PAD], *range(len(VOCABULARY), VOCAB_SIZE)}
    end = [IDS[word] for word in TEMPLATES[task.rendering]["close"].split()]
    completions = complete(decoder, prompts, limits, end, stops)
    return [mark(task, test, [VOCABULARY[token] for token in tokens]) for test, tokens in zip(tests, completions)]


def evaluate(checkpoint: str, data: str = "", count: int = 1000, seed: int = 1, device: str = "auto",
             length_count: int | None = None) -> dict[tuple[str, str], dict]:
    """
    tables() of a checkpoint's model, on `count` tests of every family, drawn by the seed, and `length_count` (None: as
    many) in each of its length sets, which are the longest to answer. data: folder with the tests (default: the
    checkpoint's). RunError if the checkpoint or the tests cannot be read or do not fit.
    """
    # the checkpoint and the tests
    saved = read_checkpoint(find_checkpoint(checkpoint))
    config = Config(**saved["config"])
    config = replace(config, compile="off", device=device, data=data or config.data)
    task, tests = read_tests(find_shards(config, "train")[0].parent, count, seed, length_count)
    require(config.vocab_size == VOCAB_SIZE,
            f"{checkpoint} was trained on {config.vocab_size} token ids, and the symbolic language has "
            f"{VOCAB_SIZE}; give a checkpoint of a run on {config.data}")

    # the answers
    ranks = Ranks.start(config)
    with variants.applied(config.variant, config):
        model = train_gpt.trained_model(saved, config, ranks)
        cached = decodes_from_cache(model)
        return tables(solve(lambda context: Decoder(model, context, cached=cached), task, tests), task)


# ---- The command ------------------------------------------------------------


def task_of(options: argparse.Namespace) -> Task:
    """The task of a command line."""
    return Task(tuple(options.families.split(",")), options.rendering, options.digits, options.depth,
                options.digit_order, options.sequence_length)


def run_make(options: argparse.Namespace) -> int:
    """Write a task's shards and tests, and say how to train on them."""
    task = task_of(options)
    meta = make(options.output, task, options.count, options.val_count, options.test_count, options.seed)
    T, tokens = task.sequence_length, meta["train"]["tokens"]
    print(f"{options.output}: {options.count:,} training and {options.val_count:,} validation problems, "
          f"{tokens / options.count:.1f} tokens a training problem with pads, "
          f"{options.test_count:,} tests of each family and set\n"
          f"train with --data {options.output} --sequence_length {T} --align_documents "
          f"--batch_tokens {max(1, 8192 // T) * T}")
    return 0


def run_show(options: argparse.Namespace) -> int:
    """Print examples, a line each."""
    task = task_of(options)
    check_option(options, "count", 1, 10 ** 12)
    for family in task.families:
        for problem in problems(replace(task, families=(family,)), "train", options.count, options.seed):
            prompt, solution = problem.text(task)
            print(" ".join(prompt + solution))
    return 0


def run_check(options: argparse.Namespace) -> int:
    """Print a verdict on every line of a file. Returns 1 if one of them is rejected."""
    try:
        lines = options.file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {options.file} ({type(error).__name__}); give a text file in UTF-8 with a program "
                       "on every line") from None

    # a verdict on every line that is not empty
    rejected = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            words = to_symbolic(split_words(line), options.rendering)
            program = Parser(words, options.digit_order).program()
            verdict = check(program, ordered=options.rendering != "shuffled_trace")
        except (ValueError, RecursionError) as error:
            verdict = Verdict(False, False, str(error))
        rejected += not verdict.shown
        print(f"{options.file}:{number}:", "valid" if verdict.shown else verdict.fault)
    return int(rejected > 0)


def run_evaluate(options: argparse.Namespace) -> int:
    """Print a line for every checkpoint, family and set."""
    for checkpoint in options.checkpoint:
        results = evaluate(checkpoint, options.data, options.count, options.seed, options.device, options.length_count)
        for (family, test_set), row in results.items():
            shares = []
            for name in ("exact", "valid", "joint", "identical"):
                interval = "{:.4f} [{:.4f}, {:.4f}]".format(*row[name]) if row[name] else "-"
                shares.append(f"{name} {interval}")
            print(f"{checkpoint}: {family} {test_set}: {', '.join(shares)}; majority {row['majority']:.4f}, "
                  f"random {row['random']:.4f}; {row['tokens']:.1f} tokens, {row['count']:,} problems", flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    """
    Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr) or a rejected program, 130 when
    interrupted.
    """
    options = build_parser().parse_args(argv)
    return run_script("symbolic_language.py", lambda: options.run(options))


KNOBS = dict(digits="most digits of a number in training", depth="most deductions, steps or elements in training",
             sequence_length="tokens of a row")


def build_parser() -> argparse.ArgumentParser:
    """The command line; an option `run` is the function that carries it out."""
    parser = argparse.ArgumentParser(prog="symbolic_language.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("make", help="write shards and tests")
    showing = commands.add_parser("show", help="print examples")
    checking = commands.add_parser("check", help="check programs")
    evaluating = commands.add_parser("evaluate", help="marks of a checkpoint")

    # what several of them have
    runs = {making: run_make, showing: run_show, checking: run_check, evaluating: run_evaluate}
    for command, run in runs.items():
        command.set_defaults(run=run)
        renderings = [name for name in TEMPLATES if command is not checking or name != "answer_only"]
        if command is not evaluating:
            command.add_argument("--rendering", choices=renderings, default="symbolic", help="how problems are written")
            command.add_argument("--digit_order", choices=("most", "least"), default="most",
                                 help="which digit of a number comes first")
        if command is not checking:
            command.add_argument("--seed", type=int, default=1, help="of the random numbers")
    for command in (making, showing):
        command.add_argument("--families", default=",".join(FAMILIES), help="which, separated by commas")
        for name, text in KNOBS.items():
            command.add_argument(f"--{name}", type=int, default=Task.__dataclass_fields__[name].default, help=text)

    # what each has alone
    making.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    for name, default, text in (("count", 100_000, "training problems"), ("val_count", 2000, "validation problems"),
                                ("test_count", 1000, "tests of each family and set")):
        making.add_argument(f"--{name}", type=int, default=default, help=text)
    making.add_argument("--loss_on", choices=("all",), default="all", help="tokens that the loss is taken over")
    showing.add_argument("--count", type=int, default=1, help="examples of every family")
    checking.add_argument("file", type=Path, metavar="FILE", help="programs, one on every line")
    evaluating.add_argument("--checkpoint", nargs="+", required=True, metavar="FILE", help="checkpoints of the trainer")
    evaluating.add_argument("--data", default="", help="folder with the tests (default: the checkpoint's)")
    evaluating.add_argument("--count", type=int, default=1000, help="tests of every family and set")
    evaluating.add_argument("--length_count", type=int, help="of the sets of longer problems (default: as many)")
    evaluating.add_argument("--device", choices=train_gpt.CHOICES["device"], default="auto")
    return parser


if __name__ == "__main__":
    sys.exit(main())
