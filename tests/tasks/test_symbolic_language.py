"""
The symbolic language: syntax, checker, families, splits and shards, and the marks of models whose answers are known.
"""
import json
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt
import variants
from tasks import symbolic_language as language
from tasks import symbolic_proofs as proofs
from tasks.symbolic_language import (
    FAMILIES,
    Task,
    complete,
    draw_problem,
    evaluate,
    held_out,
    make,
    mark,
    pack,
    problems,
    read_tests,
    solve,
    tables,
    wilson,
)
from tasks.symbolic_proofs import (
    IDS,
    PAD,
    TEMPLATES,
    VOCAB_SIZE,
    VOCABULARY,
    Parser,
    check,
    normalise,
    render_program,
    split_of,
    split_words,
    to_symbolic,
    to_words,
)
from tests.loading import run_module
from train_gpt import Config, RunError, TokenLoader, open_shard, validation_batches, write_checkpoint

EXAMPLE = ("let x := 4 7 + 8 5 . { step 7 + 5 + 0 ~> 1 2 . by calc . step 4 + 8 + 1 ~> 1 3 . by calc . show x "
           "= 1 3 2 . } qed .")
WITH_TRACE = [rendering for rendering in TEMPLATES if rendering != "answer_only"]


def parse(text: str, digit_order: str = "most") -> tuple:
    return Parser(split_words(text), digit_order).program()


def some_problems(count: int, most: int = 6, seed: int = 0):
    """Problems of every family, of difficulties from 1 to `most`."""
    rng = random.Random(seed)
    return [draw_problem(family, rng, 1 + i % most) for family in FAMILIES for i in range(count)]


# ---- Words and syntax -------------------------------------------------------


def test_vocabulary():
    assert len(set(VOCABULARY)) == len(VOCABULARY) < VOCAB_SIZE < 600 and VOCAB_SIZE % 64 == 0 and VOCAB_SIZE != 257
    assert all(word.split() == [word] == split_words(word) for word in VOCABULARY)
    assert not any("#" in word for word in VOCABULARY) and IDS[PAD] == 0


def random_type(rng):
    return rng.choice(["Nat", "Prop", ("->", "Nat", "Prop"), ("->", "Prop", ("->", "Nat", "Nat"))])


def random_term(rng, depth):
    def inner():
        return random_term(rng, depth - 1)

    kinds = [lambda: rng.randrange(1000), lambda: rng.choice(proofs.VARIABLES + proofs.SETS)]
    if depth:
        kinds += [lambda: (rng.choice(["+", "*", "mod"]), inner(), inner()),
                  lambda: ("set", *(inner() for _ in range(rng.randint(1, 3)))), lambda: ("card", inner()),
                  lambda: ("prod", rng.choice("ijk"), inner(), inner()),
                  lambda: ("st", rng.choice("ijk"), random_type(rng), random_prop(rng, depth - 1))]
    return rng.choice(kinds)()


def random_prop(rng, depth):
    inner, term = lambda: random_prop(rng, depth - 1), lambda: random_term(rng, max(depth - 1, 0))
    kinds = [lambda: rng.choice(proofs.PROPOSITIONS),
             lambda: (rng.choice(["=", "<>", ">", "divides", "in", "notin"]), term(), term())]
    if depth:
        kinds += [lambda: (rng.choice(["=>", "/\\"]), inner(), inner()), lambda: ("not", inner()),
                  lambda: (rng.choice(["forall", "exists"]), rng.choice("ijk"), random_type(rng), inner()),
                  lambda: ("apply", rng.choice(proofs.PROPOSITIONS), term())]
    return rng.choice(kinds)()


@pytest.mark.parametrize("digit_order", ["most", "least"])
def test_expressions_are_read_as_they_were_written(digit_order):
    rng, written_ones = random.Random(0), 0
    for number in range(6000):
        prop = random_prop(rng, 1 + number % 4)
        try:
            words = to_words(prop, digit_order)
        except ValueError as error:  # a term that needs parentheses
            assert "would need parentheses, and terms have none" in str(error)
            continue
        written_ones += 1
        assert Parser(["show", *words, "."], digit_order).statement() == ("show", prop)
    assert written_ones > 3000


@pytest.mark.parametrize("text, node", [
    ("p1 => p2 => p3", ("=>", "p1", ("=>", "p2", "p3"))), ("( p1 => p2 ) => p3", ("=>", ("=>", "p1", "p2"), "p3")),
    ("not p1 /\\ p2 => p3", ("=>", ("/\\", ("not", "p1"), "p2"), "p3")), ("not x = 3", ("not", ("=", "x", 3))),
    ("a + b * 1 2 mod 7 = 0", ("=", ("mod", ("+", "a", ("*", "b", 12)), 7), 0)),
    ("a mod b + c = 1", ("=", ("mod", "a", ("+", "b", "c")), 1)),
    ("card { 1 , 2 } + 1 > 2", (">", ("+", ("card", ("set", 1, 2)), 1), 2)),
    ("p4 a /\\ p5", ("/\\", ("apply", "p4", "a"), "p5")),
    ("forall i : Nat , i > 1 => exists j : Nat -> Prop , p3 j",
     ("forall", "i", "Nat", ("=>", (">", "i", 1), ("exists", "j", ("->", "Nat", "Prop"), ("apply", "p3", "j"))))),
    ("prod i : S0 , i + 1 = 6", ("=", ("prod", "i", "S0", ("+", "i", 1)), 6)),
    ("3 notin { i : Nat st i divides 9 }", ("notin", 3, ("st", "i", "Nat", ("divides", "i", 9))))])
def test_precedence(text, node):
    assert Parser(["show", *text.split(), "."]).statement() == ("show", node)
    assert " ".join(to_words(node)) == text


@pytest.mark.parametrize("text, message", [
    ("let x := 3 . { show x = 3 . } qed", "word 14 is the end, expected ."),
    ("let x := 3 . { show x = 3 . } qed . .", ". follows qed ."),
    ("{ show x = 3 = 4 . } qed .", "a proposition ends at word 5, expected a term"),
    ("{ show x . } qed .", "a term ends at word 3, expected a proposition"),
    ("{ show p1 + 2 = 3 . } qed .", "a proposition ends at word 3, expected a term"),
    ("{ show 3 => p1 . } qed .", "a term ends at word 3, expected a proposition"),
    ("{ step p1 ~> p2 . show p2 . } qed .", "word 7 is show, expected by"),
    ("{ by calc . } qed .", "word 2 is by, expected hyp or assume or let or step or show"),
    ("let qed := 3 . { } qed .", "word 2 is qed, expected a name"),
    ("let p3 := 3 . { } qed .", "word 2 is p3, expected a name"), ("{ show ( p1 . } qed .", "word 5 is ., expected )"),
    ("{ step 1 ~> 1 . by magic . } qed .", "'magic' is no word of the language"),
    ("hyp h1 : p1 | p2 . { } qed .", None), ("{ show", "word 3 is the end, expected ("),
    ("", "word 1 is the end, expected hyp")])
def test_what_is_no_program(text, message):
    with pytest.raises(ValueError, match=message and "^" + re.escape(message)):
        parse(text)


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
@pytest.mark.parametrize("text", ["hyp h1 : \u0303p1 .", "hyp h1 :  \u0303 p1 .", "hyp h1 :\u0303p1 .",
                                  "hyp h1 : \u02dc p1 ."])
def test_negation_survives_normalisation(text, form):
    assert split_words(unicodedata.normalize(form, text)) == "hyp h1 : not p1 .".split()


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_negation_that_has_merged_with_a_letter(form):
    text = unicodedata.normalize(form, "show p1 /\\ x = a\u0303")
    assert ("\u00e3" in text) == (form in ("NFC", "NFKC")) and split_words(text)[-2:] == ["a", "not"]
    lean = "≠ ∉ ∣ ¬"
    assert split_words(unicodedata.normalize(form, lean)) == lean.split()


@pytest.mark.parametrize("digit_order", ["most", "least"])
@pytest.mark.parametrize("rendering", TEMPLATES)
def test_renderings_are_read_as_they_were_written(rendering, digit_order):
    task = Task(rendering=rendering, digit_order=digit_order)
    for problem in some_problems(12):
        prompt, solution = problem.text(task)
        assert {*prompt, *solution} <= IDS.keys()
        assert prompt == render_program((problem.program[0], ()), rendering, digit_order)[0]
        text = " ".join(prompt + solution)
        program = Parser(to_symbolic(split_words(text), rendering), digit_order).program()
        if rendering == "shuffled_trace":
            assert sorted(map(repr, program[1])) == sorted(map(repr, problem.program[1]))
            assert program[1][-1] == problem.program[1][-1]
        else:
            assert program[1] == (problem.program[1][-1:] if rendering == "answer_only" else problem.program[1])
        assert program[0] == problem.program[0]
        assert language.answer_of(solution, rendering).split()


@pytest.mark.parametrize("rendering", ["english", "lean_like"])
def test_a_statement_with_a_binding(rendering):
    program = (("hyp", "h1", ("forall", "i", "Nat", ("=>", ("apply", "p1", "i"), ("apply", "p2", "i")))),
               ("hyp", "h2", ("apply", "p1", 3))), (
                   ("step", ("apply", "p1", 3), ("apply", "p2", 3), ("i", 3), "deduce"), ("show", ("apply", "p2", 3)))
    words = [word for part in render_program(program, rendering) for word in part]
    assert Parser(to_symbolic(words, rendering)).program() == program and check(program).shown


def test_the_same_problem_in_five_renderings():
    texts = {rendering: [" ".join(sum(problem.text(Task(rendering=rendering)), []))
                         for problem in problems(Task(), "train", 40, 1)] for rendering in TEMPLATES}
    assert len({tuple(text) for text in texts.values()}) == len(texts)
    assert EXAMPLE == " ".join(sum(render_program(parse(EXAMPLE), "symbolic"), []))
    assert " ".join(sum(render_program(parse(EXAMPLE), "symbolic", "least"), [])).startswith(
        "let x := 7 4 + 5 8 . { step 7 + 5 + 0 ~> 2 1 .")


# ---- The checker ------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
def test_every_example_passes(ordered):
    for problem in some_problems(40, most=12):
        verdict = check(problem.program, ordered)
        assert verdict.valid and verdict.shown and not verdict.fault, (problem, verdict)


PROVEN = [
    EXAMPLE, "hyp h1 : p1 /\\ p2 . { step p1 /\\ p2 ~> p2 . by deduce . show p2 . } qed .",
    "hyp h1 : forall i : Nat , p1 i => p2 i . hyp h2 : p1 7 . { step p1 7 ~> p2 7 for i in 7 . by "
    "deduce . show p2 7 . } qed .",
    "let x := 3 . let S0 := { 1 , 3 } . { step x + 1 ~> 3 + 1 . by subst . step card S0 ~> 2 . by calc "
    ". show x in S0 . } qed .",
    "let S0 := { 2 , 3 , 4 } . { step prod i : S0 , i + 1 ~> 6 0 . by calc . show 7 notin S0 . } qed .",
    "let x := 4 . { let y := x * x . step y ~> 1 6 . by calc . show y > x . } qed .",
    "let x := 5 . let y := x + 1 . { step y ~> x + 1 for y in x + 1 . by subst . show 3 divides y . } " "qed .",
    "hyp h1 : p1 => p2 . hyp h2 : p1 => not p2 . { assume h3 : p1 . step p1 ~> p2 . by deduce . step "
    "p1 ~> not p2 . by deduce . step p2 ~> not p2 . by contra . show not p1 . } qed ."]


@pytest.mark.parametrize("text", PROVEN)
def test_programs_that_hold(text):
    assert check(parse(text)) == check(parse(text), ordered=False) == proofs.Verdict(True, True)


@pytest.mark.parametrize("text, fault", [
    ("let x := 4 . { step 7 + 5 ~> 1 3 . by calc . show x = 4 . } qed .", "line 1 of the block: 7 + 5 is 12, not 1 3"),
    ("let x := 4 . { step x > 5 ~> x > 3 . by calc . show x = 4 . } qed .", "line 1 of the block: x > 5 is false"),
    ("let x := 4 . { step x > 3 ~> x . by calc . show x = 4 . } qed .",
     "line 1 of the block: a step leads from a term to a term"),
    ("let x := 4 . { step z ~> 4 . by calc . show x = 4 . } qed .", "line 1 of the block: z has no value"),
    ("let x := 4 . { step x mod 0 ~> 4 . by calc . show x = 4 . } qed .", "line 1 of the block: modulo 0"),
    ("let x := 4 . { step x + { 1 } ~> 4 . by calc . show x = 4 . } qed .",
     "line 1 of the block: { 1 } is not a number"),
    ("let x := 4 . { step 1 in x ~> 1 in x . by calc . show x = 4 . } qed .", "line 1 of the block: x is not a set"),
    ("let x := 4 . { step card x ~> 4 . by calc . show x = 4 . } qed .",
     "line 1 of the block: card x cannot be calculated"),
    ("let x := 4 . { step p1 ~> p1 . by calc . show x = 4 . } qed .", "line 1 of the block: p1 cannot be calculated"),
    ("let x := 4 . { step x ~> 5 . by subst . show x = 4 . } qed .",
     "line 1 of the block: 5 is not x with names replaced"),
    ("let x := 4 . { step x ~> 5 for x in 5 . by subst . show x = 4 . } qed .",
     "line 1 of the block: x is not defined as 5"),
    ("let x := 5 . hyp h1 : forall x : Nat , 5 > 3 . { step forall x : Nat , 5 > 3 ~> forall x : Nat , "
     "x > 3 . by subst . show x = 5 . } qed .", "line 1 of the block: forall x : Nat , x > 3 is not"),
    ("let x := 4 . { let x := 5 . step 1 ~> 1 . by calc . show x = 5 . } qed .",
     "line 1 of the block: x already means something"),
    ("hyp h1 : a > b . { let a := 9 . step a ~> 9 . by calc . show a > 3 . } qed .",
     "line 1 of the block: a already means something"),
    ("hyp h1 : forall i : Nat , i > c . { let c := 9 . step c ~> 9 . by calc . show c > 3 . } qed .",
     "line 1 of the block: c already means something"),
    ("let x := 4 . { step 4 ~> 4 . by calc . hyp h1 : p3 . show p3 . } qed .",
     "line 2 of the block: hyp stands in the trace"),
    ("hyp h1 : p1 => p2 . { step p1 ~> p2 . by deduce . show p2 . } qed .", "line 1 of the block: p1 is not known"),
    ("hyp h1 : p1 . hyp h2 : p2 => p1 . { step p1 ~> p2 . by deduce . show p2 . } qed .",
     "line 1 of the block: no fact leads from p1 to p2"),
    ("hyp h1 : a > b . hyp h2 : c > d . { step a > b ~> a > d . by deduce . show a > d . } qed .",
     "line 1 of the block: no fact leads from a > b to a > d"),
    ("hyp h1 : p1 => p2 . { assume h2 : p1 . step p1 ~> p2 . by deduce . show p2 . } qed .", "p1 is still assumed"),
    ("hyp h1 : p1 . { step p1 ~> not p1 . by contra . show not p1 . } qed .",
     "line 1 of the block: nothing was assumed"),
    ("hyp h1 : not p2 . { assume h2 : p1 . step p1 ~> not p2 . by contra . show not p1 . } qed .",
     "line 2 of the block: p1 and not p2 do not clash"),
    ("hyp h1 : not p1 . { assume h2 : p1 . step p1 ~> not p1 . by contra . step p1 ~> p1 . by subst . "
     "show p1 . } qed .", "line 3 of the block: p1 is not known"),
    ("hyp h1 : p1 . { show p1 . } qed .", "there is no step"),
    ("hyp h1 : p1 . { } qed .", "the block does not end in show"),
    ("hyp h1 : p1 . { show p1 . show p1 . } qed .", "line 1 of the block: show stands in the trace"),
    ("step 1 ~> 1 . by calc . { show 1 = 1 . } qed .", "step stands before the block"),
    ("let x := x . { step x ~> 1 . by calc . show x = 1 . } qed .", "maximum recursion depth exceeded")])
def test_programs_that_do_not(text, fault):
    verdict = check(parse(text))
    assert not verdict.valid and not verdict.shown and verdict.fault.startswith(fault)


def test_a_valid_trace_with_a_wrong_answer():
    verdict = check(parse(EXAMPLE.replace("x = 1 3 2", "x = 1 3 3")))
    assert verdict == proofs.Verdict(True, False, "x = 1 3 3 does not follow")


def test_order_counts_but_for_shuffled_traces():
    text = ("hyp h1 : p1 . hyp h2 : p1 => p2 . hyp h3 : p2 => p3 . { step p2 ~> p3 . by deduce . step p1 ~> p2 "
            ". by deduce . show p3 . } qed .")
    assert check(parse(text)).fault == "line 1 of the block: p2 is not known"
    assert check(parse(text), ordered=False).shown
    circle = ("hyp h1 : p1 => p2 . hyp h2 : p2 => p1 . { step p2 ~> p1 . by deduce . step p1 ~> p2 . by deduce . "
              "show p1 . } qed .")
    assert not check(parse(circle), ordered=False).valid


def test_a_corrupted_step_fails():
    """
    Every step of every family: another number on the right, another proposition, or a fact taken away from under it.
    """
    count = 0
    for problem in some_problems(12):
        facts, block = problem.program
        for i, (keyword, *parts) in enumerate(block[:-1]):
            if keyword != "step":
                continue
            before, after, binding, rule = parts
            wrong = after + 1 if isinstance(after, int) else ("+", after,
                                                              1) if not proofs.is_prop(after) else (
                "=", 1, 2) if rule == "calc" else (">", after[1],
                                                   after[1]) if after[0] == ">" else "p63" if after != "p63" else "p62"
            changed = (*block[:i], ("step", before, wrong, binding, rule), *block[i + 1:])
            assert not check((facts, changed)).valid and not check((facts, changed),
                                                                   ordered=False).valid, (problem, changed[i])
            count += 1
        if problem.family in ("chain", "contra", "order"):
            needed = {fact for _, _, fact in facts} & {("=>", line[1], line[2])
                                                       for line in block if line[0] == "step"} or {facts[0][2]}
            for fact in needed:
                assert not check((tuple(line for line in facts if line[2] != fact), block)).valid
    assert count > 400


@pytest.mark.parametrize("rendering", TEMPLATES)
def test_nothing_breaks_the_checker(rendering):
    """Programs with words exchanged, left out or doubled, as models write them: read or refused, with a verdict."""
    rng, read = random.Random(2), 0
    texts = [sum(problem.text(Task(rendering=rendering)), [])
             for problem in some_problems(4)] + [word for text in PROVEN
                                                 for word in [sum(render_program(parse(text), rendering), [])]]
    pool = sorted({word for text in texts for word in text})
    for _ in range(1500):
        words = list(rng.choice(texts))
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(words))
            words[place:place + rng.randint(0, 2)] = [rng.choice(pool)] * rng.randint(0, 2)
        try:
            program = Parser(to_symbolic(words, rendering)).program()
        except ValueError:
            continue
        for ordered in (True, False):
            verdict = check(program, ordered)
            assert verdict.shown == (not verdict.fault) and (verdict.valid or not verdict.shown)
        read += 1
    assert 100 < read < 1400


def test_numbers_stay_small():
    lets = "let a := 9 * 9 . " + " ".join(f"let {b} := {a} * {a} ."
                                          for a, b in zip("abcdefghijklmnopqrstuvw", "bcdefghijklmnopqrstuvwx"))
    product = parse(lets + " { step x ~> 1 . by calc . show x = 1 . } qed .")
    assert check(product).fault == "line 1 of the block: a product is too long"
    total = parse(lets.replace("*", "+") + " { step x ~> a + 1 . by calc . show x = 1 . } qed .")
    assert check(total).fault == f"line 1 of the block: x is {18 * 2 ** 23}, not a + 1"


def test_another_problems_trace_fails():
    """
    Traces by deduction are bound to their problem; a calculation is true wherever it stands, but its answer is not.
    """
    for family in FAMILIES:
        several = [problem for problem in some_problems(30, most=4) if problem.family == family
                   and problem.difficulty > 2]
        for a, b in zip(several, several[1:]):
            verdict = check((a.program[0], b.program[1]))
            assert not (verdict.valid and verdict.shown) or a.program[1][-1] == b.program[1][-1]


# ---- Families ---------------------------------------------------------------


def closure(problem) -> set:
    """The propositions that facts give, by their plain meaning."""
    known = {fact for _, _, fact in problem if isinstance(fact, str)}
    edges = [fact[1:] for _, _, fact in problem if fact[0] == "=>"]
    while new := {b for a, b in edges if a in known} - known:
        known |= new
    return known


def plain(node) -> str:
    """A term as Python writes it."""
    if isinstance(node, int):
        return str(node)
    sign = {"+": "+", "*": "*", "mod": "%"}[node[0]]
    return f"({plain(node[1])} {sign} {plain(node[2])})"


@pytest.mark.parametrize("family", FAMILIES)
def test_answers(family):
    """Each answer is the only right one, found here in another way than by its trace."""
    rng, truths = random.Random(1), set()
    for difficulty in [1, 2, 3, 5, 8, 12] * 20:
        problem = draw_problem(family, rng, difficulty)
        facts, block = problem.program
        assert [line[0] for line in block].count("show") == 1 and block[-1][0] == "show" and problem.choices >= 2
        answer = block[-1][1]
        if family in ("add", "mul", "mod"):
            (_, name, term), = facts
            assert answer == ("=", name, eval(plain(term))) and answer[2] < problem.choices
            numbers = re.findall(r"\d+", plain(term))[:-1 if family == "mod" else None]
            assert max(map(len, numbers)) == difficulty
        elif family == "div":
            m, n = (meaning for _, _, meaning in facts)
            assert answer == (("divides", "x", "y") if n % m == 0 else ("not", ("divides", "x", "y")))
            assert len(str(n)) == difficulty
            truths.add(n % m == 0)
        elif family == "set":
            (_, name, elements), (_, x, value) = facts
            assert answer == ("in" if value in elements[1:] else "notin", x, name)
            assert len({*elements[1:]}) == difficulty
            truths.add(value in elements[1:])
        elif family == "chain":
            known = closure(facts)
            assert [p for p in known if not any(fact[0] == "=>" and fact[1] == p for _, _, fact in facts)] == [answer]
            assert len(known) == difficulty + 1
            truths.add(len(facts) > difficulty + 1)
        elif family == "contra":
            no, = (fact[1] for _, _, fact in facts if fact[0] == "not")
            start = [fact for fact in facts if fact[2][0] == "=>"]
            refuted = {p for p in proofs.PROPOSITIONS if no in closure([*start, ("hyp", "h0", p)])} - {no}
            assert answer[0] == "not"
            assert [p for p in refuted if not any(fact[2] == p for _, _, fact in start)] == [answer[1]]
            assert len(refuted) == difficulty
            truths.add(len(facts) > difficulty + 1)
        else:
            greater, less = ({fact[i] for _, _, fact in facts} for i in (1, 2))
            assert greater - less == {answer[1]} and less - greater == {answer[2]} and len(block) == difficulty + 1
    assert len(truths) != 1


def test_calculations_lead_to_the_answer():
    """The digits of the answer can be read off the right sides of the trace."""
    rng = random.Random(3)
    for difficulty in [1, 2, 3, 5, 8] * 20:
        for family in ("add", "mul"):
            problem = draw_problem(family, rng, difficulty)
            (_, _, (_, a, b)), = problem.program[0]
            results = [line[2] for line in problem.program[1][:-1]]
            width = difficulty if family == "add" else len(str(a))
            columns = [0] * (2 * difficulty + 1)
            for start in range(0, len(results), width):
                for i, result in enumerate(results[start:start + width], start // width):
                    columns[i], columns[i + 1] = result % 10, result // 10
            assert sum(digit * 10 ** i for i, digit in enumerate(columns)) == problem.program[1][-1][1][2] == (
                a + b if family == "add" else a * b)
        mod, div = (draw_problem(family, rng, difficulty).program for family in ("mod", "div"))
        assert mod[1][-2][2] == mod[1][-1][1][2] and {line[4] for line in mod[1][:-1]} == {"calc"}
        (_, _, m), (_, _, n) = div[0]
        assert div[1][-2][1:3] == ("y", ("+", ("*", "x", n // m), n % m))


def test_normalised():
    def same(a, b):
        return normalise(parse(a + " { } qed .")[0]) == normalise(parse(b + " { } qed .")[0])

    assert same("hyp h1 : p1 => p2 . hyp h2 : p1 .", "hyp h7 : p1 . hyp h3 : p1 => p2 .")
    assert not same("hyp h1 : p1 => p2 .", "hyp h1 : p2 => p1 .")
    assert same("let x := 1 2 + 7 + 3 .", "let x := 3 + 1 2 + 7 .")
    assert same("let x := 2 * 3 mod 5 .", "let x := 3 * 2 mod 5 .")
    assert not same("let x := 3 mod 5 .", "let x := 5 mod 3 .")
    assert same("let S0 := { 1 , 2 } . let x := 2 .", "let x := 2 . let S0 := { 2 , 1 } .")
    assert not same("let x := 2 . let y := 3 .", "let x := 3 . let y := 2 .")
    assert not same("let x := 2 + 3 .", "let x := 2 * 3 .") and not same("let x := 3 + 3 .", "let x := 3 .")


def test_no_problem_is_in_two_splits():
    task, found = Task(digits=3, depth=2), {}
    for split in ("train", "val"):
        for seed in (1, 2):
            found.setdefault(split, set()).update(normalise(problem.program[0])
                                                  for problem in problems(task, split, 400, seed))
    tests = [(part, problem) for seed in (1, 2) for part, problem in held_out(task, 30, seed)]
    found["test"] = {normalise(problem.program[0]) for part, problem in tests}
    assert not found["train"] & found["val"] and not found["test"] & (found["train"] | found["val"])
    assert {split_of(problem.program[0]) for part, problem in tests if part == "test"} == {"test"}
    assert {part: {problem.difficulty for other, problem in tests if other == part and problem.family == "chain"}
            for part in ("test", "x1.5", "x2")} == {"test": {1, 2}, "x1.5": {3}, "x2": {4}}
    once = [(part, problem.family, normalise(problem.program[0])) for part, problem in held_out(task, 30, 1)]
    assert len(set(once)) == len(once) == 30 * 3 * 8


def test_longest_length_sets_have_enough_names():
    for family, depth in language.MOST.items():
        for seed in range(20):
            verdict = check(draw_problem(family, random.Random(seed),
                                         2 * Task(families=(family,), depth=depth).most(family)).program)
            assert verdict.shown, verdict


# ---- Shards -----------------------------------------------------------------


def test_same_seed_same_bytes(tmp_path):
    task = Task(digits=3, depth=3, sequence_length=256)
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        make(tmp_path / folder, task, 50, 10, 5, seed)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["meta.json", "symbolic_test.jsonl", "symbolic_train_000000.bin", "symbolic_val_000000.bin"]
    for name in names:
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b != c


@pytest.mark.parametrize("rendering", TEMPLATES)
def test_the_folder_trains(tmp_path, rendering):
    task, T = Task(rendering=rendering, digits=3, depth=3, sequence_length=192), 192
    meta = make(tmp_path, task, 300, 40, 4, seed=3)
    assert meta == json.loads((tmp_path / "meta.json").read_text()) and Task(**meta["symbolic_language"]) == task
    assert (meta["vocab_size"], meta["train"]["documents"], meta["val"]["documents"],
            meta["loss_on"]) == (VOCAB_SIZE, 300, 40, "all")
    rows, end = open_shard(tmp_path / "symbolic_train_000000.bin").reshape(-1, T), VOCAB_SIZE - 1
    assert (rows[:, 0] == end).all()
    read = []
    for row in rows:
        words = " ".join("\n" if token == end else VOCABULARY[token] for token in row)
        texts = [text.split() for text in words.split("\n")[1:]]
        assert all(PAD not in text for text in texts[:-1])  # pads at the end of a row only
        texts[-1] = [word for word in texts[-1] if word != PAD]
        read += texts
    expected = [sum(problem.text(task), []) for problem in problems(task, "train", 300, 3)]
    assert read == expected
    config = Config(data=str(tmp_path), sequence_length=T, batch_tokens=4 * T, align_documents=True,
                    vocab_size=VOCAB_SIZE, val_tokens=10 ** 6)
    loader, whole = TokenLoader(config), {row.tobytes() for row in rows}
    seen = {row.numpy().astype(rows.dtype).tobytes() for _ in range(len(rows) // 4)
            for row in loader.next_batch()[0][:, :T]}
    assert seen <= whole and len(seen) >= len(rows) - 4
    assert (np.concatenate(validation_batches(config))[:, [0, -1]] == end).all()
    read_task, tests = read_tests(tmp_path, 3, 1)
    assert read_task == task and len(tests) == 3 * 3 * 8
    assert tests == read_tests(tmp_path, 3, 1)[1] != read_tests(tmp_path, 3, 2)[1]


def test_packing():
    task = Task(families=("add",), digits=1, sequence_length=40)
    rows = list(pack(task, "train", problems(task, "train", 7, 1)))
    lengths = [len(tokens) + 1 for _, tokens, _, _ in rows]
    assert sum(lengths) % 40 == 0 and len(rows) == 7 and all(begins for *_, begins in rows)
    plain = [sum(problem.text(task), []) for problem in problems(task, "train", 7, 1)]
    assert [size for _, _, size, _ in rows] == [len(" ".join(words)) for words in plain]
    equal = Task(families=("order",), depth=1)  # two documents fill a row exactly
    length = 1 + len(sum(next(problems(equal, "train", 1, 1)).text(equal), []))
    assert {len(tokens) + 1 for _, tokens, _, _ in pack(Task(families=("order",), depth=1, sequence_length=2 * length),
                                                        "train", problems(equal, "train", 6, 1))} == {length}
    with pytest.raises(RunError,
                       match=r"a document of chain has \d+ tokens and a row 40: raise --sequence_length, or lower "
                             r"--digits or --depth"):
        list(pack(Task(families=("chain",), sequence_length=40), "train",
                  problems(Task(families=("chain",)), "train", 50, 1)))


# ---- Marks ------------------------------------------------------------------


@pytest.mark.parametrize("right, count, low, high",
                         [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0),
                          (990, 1000, 0.9817, 0.9946)])
def test_wilson(right, count, low, high):
    assert wilson(right, count) == pytest.approx((low, high), abs=1e-4)


class Oracle:
    """Stands for a Decoder: goes on with what it knows of a prompt, by text."""

    def __init__(self, known: dict, fed: list):
        self.known, self.fed, self.rows = known, fed, None

    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.rows is None:
            assert (tokens[:, 0] == VOCAB_SIZE - 1).all()
            self.rows, self.place = [self.known[tuple(row)] for row in tokens[:, 1:].tolist()], 0
            self.fed.append(tokens.shape)
        else:
            assert tokens[:, 0].tolist() == [(row[self.place - 1:self.place] or [VOCAB_SIZE - 1])[0]
                                             for row in self.rows]
        logits = torch.zeros(len(self.rows), VOCAB_SIZE)
        for logit, row in zip(logits, self.rows):
            logit[(row[self.place:self.place + 1] or [VOCAB_SIZE - 1])[0]] = 1.0
        self.place += 1
        return logits


def solved(tests: list[dict], task: Task, change=lambda test: test["solution"]) -> tuple[dict, list]:
    def ids(text):
        return [IDS[word] for word in text.split()]

    known, fed = {tuple(ids(test["prompt"])): ids(change(test)) for test in tests}, []
    return tables(solve(lambda context: Oracle(known, fed), task, tests), task), fed


@pytest.mark.parametrize("digit_order", ["most", "least"])
@pytest.mark.parametrize("rendering", TEMPLATES)
def test_an_oracle_is_always_right(tmp_path, rendering, digit_order):
    task = Task(rendering=rendering, digits=3, depth=3, digit_order=digit_order)
    make(tmp_path, task, 1, 1, 6, 1)
    _, tests = read_tests(tmp_path, 1000, 1)
    found, fed = solved(tests, task)
    assert set(found) == {(family, part) for family in ("all", *FAMILIES) for part in ("test", "x1.5", "x2")} | {
        (family, f"test {d}") for family in FAMILIES for d in range(1, 3 + (family != "mul"))
        if any(t["family"] == family and t["difficulty"] == d and t["part"] == "test" for t in tests)}
    for row in found.values():
        assert row["exact"] == row["identical"] == (1.0, *wilson(row["count"], row["count"]))
        assert row["valid"] == row["joint"] == (None if rendering == "answer_only" else row["exact"])
    assert found["all", "test"]["count"] == 48 and sum(rows for rows, _ in fed) == len(tests) and len(fed) < len(tests)
    assert found["all", "test"]["tokens"] == pytest.approx(
        np.mean([len((test["prompt"] + " " + test["solution"]).split()) for test in tests if test["part"] == "test"]))


def test_wrong_models(tmp_path):
    task = Task(families=("add", "chain"), digits=3, depth=3)
    make(tmp_path, task, 1, 1, 40, 1)
    _, tests = read_tests(tmp_path, 1000, 1)
    answer = re.compile(r"show ([^.]+) \.")

    def no_trace(test):
        return answer.search(test["solution"])[0] + " } qed ."

    found, _ = solved(tests, task, no_trace)
    assert all(row["exact"][0] == 1 and row["valid"][0] == row["joint"][0] == row["identical"][0] == 0
               for row in found.values())

    def wrong(test):
        return answer.sub("show p63 ." if "p63" not in test["solution"] else "show p62 .", test["solution"])

    found, _ = solved(tests, task, wrong)
    assert all(row["valid"][0] == 1 and row["exact"][0] == row["joint"][0] == row["identical"][0] == 0
               for row in found.values())

    def endless(test):
        return "step 1 ~> 1 . by calc . " * 100

    found, _ = solved(tests, task, endless)
    assert all(row["exact"][0] == row["valid"][0] == 0 for row in found.values())

    def silent(test):
        return PAD

    found, _ = solved(tests, task, silent)
    assert all(row["exact"][0] == row["valid"][0] == 0 for row in found.values())
    assert found["add", "test"]["tokens"] < 20

    def half(test):
        return test["solution"] if len(test["prompt"].split()) % 2 else no_trace(test)

    found, _ = solved(tests, task, half)
    share = np.mean([len(test["prompt"].split()) % 2 for test in tests if test["part"] == "test"])
    assert found["all", "test"]["joint"][0] == pytest.approx(share) and 0 < share < 1


def test_levels_of_chance():
    task, base = Task(families=("set", "add")), dict(part="test", difficulty=1,
                                                     prompt="let S0 := { 1 } . let x := 3 . {")
    tests = [mark(task, base | dict(family="set", choices=2, solution=f"show x {answer} S0 . }} qed ."), [])
             for answer in ("in", "in", "notin")]
    tests += [mark(task, base | dict(family="add", choices=10, solution="show x = 3 . } qed ."), [])]
    found = tables(tests, task)
    assert (found["set", "test"]["majority"], found["set", "test"]["random"]) == (2 / 3, 0.5)
    assert (found["all", "test"]["majority"], found["all", "test"]["random"]) == (3 / 4, pytest.approx(1.6 / 4))
    assert found["all", "test"]["exact"][0] == 0


@pytest.mark.parametrize("text, rendering, answer", [
    ("show p1 . show x = 1 2 . } qed .", "symbolic", "x = 1 2"),
    ("therefore x is not in S1 . this", "english", "x is not in S1"), ("show ¬ p1 ; done", "lean_like", "¬ p1"),
    ("show p1", "symbolic", None), ("", "english", None)])
def test_the_answer_is_what_the_last_show_says(text, rendering, answer):
    assert language.answer_of(text.split(), rendering) == answer


def test_buckets_of_difficulty():
    task, parts = Task(families=("order", "mul"), digits=8, depth=11), {"order": 11, "mul": 4}
    tests = [dict(family=family, part=part, difficulty=d, choices=2, solution="show p1 .", exact=d % 2 == 0, valid=True,
                  joint=True, identical=True, tokens=d) for family, most in parts.items()
             for part, difficulties in (("test", range(1, most + 1)), ("x2", [2 * most])) for d in difficulties]
    found = tables(tests, task)
    assert list(found) == [("all", "test"), ("all", "x2"), ("order", "test"), ("order", "test 1-3"),
                           ("order", "test 4-6"), ("order", "test 7-9"), ("order", "test 10-11"), ("order", "x2"),
                           ("mul", "test"), ("mul", "test 1"), ("mul", "test 2"), ("mul", "test 3"), ("mul", "test 4"),
                           ("mul", "x2")]
    assert found["order", "test 4-6"]["exact"] == (2 / 3, *wilson(2, 3))
    assert found["order", "test 10-11"]["tokens"] == 10.5 and found["all", "test"]["count"] == 15


def test_complete_stops_where_it_should():
    known = {(1, 2): [5, 6, 7, 8], (3, 4): [5, 9, 6, 7], (5,): [7, 7, 7, 7]}
    fed, contexts = [], []

    def decoder(context):
        contexts.append(context)
        return Oracle(known, fed)
    end = VOCAB_SIZE - 1
    assert complete(decoder, [[end, 1, 2], [end, 5], [end, 3, 4]], [10, 3, 10], end=[6, 7],
                    stops={9}) == [[5, 6, 7], [7, 7, 7], [5]]
    assert fed == [(1, 2), (2, 3)] and contexts == [2 + 3, 3 + 10]
    assert complete(decoder, [[end, 1, 2]] * 3, [1] * 3, [0], set(), rows=2) == [[5]] * 3
    assert fed[2:] == [(2, 3), (1, 3)]
    assert complete(decoder, [[end, 1, 2], [end, 3, 4]], [2, 4], [0], set()) == [[5, 6], [5, 9, 6, 7]]


def trained(folder: Path, *arguments: str) -> str:
    """The checkpoint of a run of the trainer on a folder with rows of 128 tokens."""
    assert train_gpt.main(["--data", str(folder), "--log_dir", str(folder / "logs"), "--run_id", "run", "--device",
                           "cpu", "--compile", "off", "--sequence_length", "128", "--align_documents", "--batch_tokens",
                           "2048", "--val_every", "0", "--val_tokens", "1280", "--layers", "2", "--model_dim", "64",
                           "--heads", "4", "--head_dim", "16", "--mlp_hidden", "128", *arguments], loader=variants) == 0
    return str(folder / "logs" / "run.pt")


@pytest.mark.parametrize("variant", [pytest.param(None, marks=pytest.mark.slow), "swiglu_mlp:hidden=40"])
def test_evaluate_a_checkpoint(tmp_path, capsys, variant):
    task = Task(families=("add", "chain"), digits=2, depth=2, sequence_length=128)
    make(tmp_path, task, 100, 60, 8, seed=1)
    checkpoint = trained(tmp_path, "--steps", "1", *(["--variant", variant] if variant else []))
    found = evaluate(checkpoint, count=4)
    assert found == evaluate(checkpoint, data=str(tmp_path), count=4)
    assert [key for key in found if key[0] == "all"] == [("all", "test"), ("all", "x1.5"), ("all", "x2")]
    assert found["all", "test"]["count"] == 8
    assert found["all", "test"]["joint"][0] == 0 and found["all", "test"]["tokens"] > 20
    fewer = evaluate(checkpoint, count=4, length_count=1)
    assert fewer["all", "test"] == found["all", "test"]
    assert [fewer["all", part]["count"] for part in ("x1.5", "x2")] == [2, 2]
    capsys.readouterr()
    assert language.main(["evaluate", "--checkpoint", checkpoint, "--count", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    share = r"[01]\.\d{4} \[[01]\.\d{4}, [01]\.\d{4}\]"
    assert len(lines) == len(found)
    assert all(re.fullmatch(
        rf"\S+run.pt: (all|add|chain) (test( \d)?|x1.5|x2): exact {share}, valid {share}, joint {share}, "
        rf"identical {share}; majority [01]\.\d{{4}}, random 0\.\d{{4}}; \d+\.\d tokens, \d+ problems", line)
               for line in lines)
    saved = torch.load(checkpoint, weights_only=True)
    del saved["format"], saved["digest"]
    saved["config"].update(vocab_size=100, document_token=99)
    write_checkpoint(tmp_path / "other.pt", saved)
    with pytest.raises(RunError,
                       match="was trained on 100 token ids, and the symbolic language has 320; give a checkpoint of a "
                             "run on "):
        evaluate(str(tmp_path / "other.pt"))


def test_a_whole_pass_decodes_as_the_cache_does(tmp_path, monkeypatch):
    task = Task(families=("order",), depth=2, sequence_length=128)
    make(tmp_path, task, 200, 60, 4, seed=1)
    checkpoint, passes = trained(tmp_path, "--steps", "3"), []
    monkeypatch.setattr(language, "decodes_from_cache", lambda model: passes.append(model) or False)
    whole = evaluate(checkpoint, count=2)
    monkeypatch.undo()
    assert whole == evaluate(checkpoint, count=2) and len(passes) == 1


@pytest.mark.parametrize("change", [lambda folder: (folder / "meta.json").write_text('{"vocab_size": 320}'),
                                    lambda folder: (folder / "symbolic_test.jsonl").write_text("no"),
                                    lambda folder: (folder / "symbolic_test.jsonl").unlink(),
                                    lambda folder: (folder / "meta.json").write_text(
    '{"symbolic_language": {"pear": 1}}')])
def test_a_folder_without_a_task(tmp_path, change):
    make(tmp_path, Task(families=("add",), digits=2, depth=2), 2, 2, 2, 1)
    change(tmp_path)
    with pytest.raises(RunError, match="does not hold a task of the symbolic language; give --data a folder that "
                       "tasks/symbolic_language.py made"):
        read_tests(tmp_path, 10, 1)


def test_a_folder_of_another_version(tmp_path):
    make(tmp_path, Task(families=("add",), digits=2, depth=2), 2, 2, 2, 1)
    with pytest.raises(RunError, match="--count must be at least 1, got 0"):
        read_tests(tmp_path, 0, 1)
    with pytest.raises(RunError, match="--length_count must be at least 1, got 0"):
        read_tests(tmp_path, 1, 1, 0)
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | dict(vocabulary="")))
    with pytest.raises(RunError,
                       match="was made with another vocabulary; make it again, or use the version that made it"):
        read_tests(tmp_path, 10, 1)


# ---- The command ------------------------------------------------------------


@pytest.mark.parametrize("arguments, message", [
    ("--families add,sub", "--families takes some of add,mul,mod,chain,order,set,div,contra, each once; got 'add,sub'"),
    ("--families add,add", "--families takes some of add,mul,mod,chain,order,set,div,contra, each once; got 'add,add'"),
    ("--digits 0", "--digits and --depth must be at least 1, got 0 and 8"),
    ("--depth 0", "--digits and --depth must be at least 1, got 8 and 0"),
    ("--depth 13", "--depth 13 leaves too few names for order at twice that; it goes up to 12"),
    ("--sequence_length 1", "--sequence_length must be at least 2, got 1"),
    ("--count 0", "--count must be at least 1, got 0"), ("--val_count 0", "--val_count must be at least 1, got 0"),
    ("--test_count 0", "--test_count must be at least 1, got 0"),
    ("--families add --digits 1 --test_count 100",
     "no more than 9 different problems of add were found for its set test; raise --digits or --depth, "
     "or lower --test_count"), ("--sequence_length 30 --test_count 1", None)])
def test_faults(tmp_path, capsys, arguments, message):
    assert language.main(["make", "-o", str(tmp_path / "data"), *arguments.split()]) == 1
    error = capsys.readouterr().err
    assert error == f"symbolic_language.py: error: {message}\n" if message else re.fullmatch(
        r"symbolic_language.py: error: a document of \w+ has \d+ tokens and a row 30: .*\n", error)
    assert not list(tmp_path.glob("data/*"))


def test_show_and_check(tmp_path, capsys):
    for rendering in WITH_TRACE:
        assert language.main(["show", "--rendering", rendering, "--count", "2", "--digits", "3", "--digit_order",
                              "least"]) == 0
        (tmp_path / "programs").write_text(capsys.readouterr().out + "\n")
        assert language.main(["check", str(tmp_path / "programs"), "--rendering", rendering, "--digit_order",
                              "least"]) == 0
        assert capsys.readouterr().out.splitlines() == [f"{tmp_path}/programs:{i}: valid" for i in range(1, 17)]
    (tmp_path / "programs").write_text(
        f"{EXAMPLE}\n\n{EXAMPLE.replace('8 + 1', '8 + 2')}\nlet y .\n{EXAMPLE.replace('x = 1', 'x = 2')}\n")
    assert language.main(["check", str(tmp_path / "programs")]) == 1
    assert [line.split(":", 1)[1] for line in capsys.readouterr().out.splitlines()] == [
        "1: valid", "3: line 2 of the block: 4 + 8 + 2 is 14, not 1 3", "4: word 3 is ., expected :=",
        "5: x = 2 3 2 does not follow"]
    assert language.main(["check", str(tmp_path / "nothing")]) == 1
    assert capsys.readouterr().err == (
        f"symbolic_language.py: error: cannot read {tmp_path}/nothing (FileNotFoundError); give a text "
        "file in UTF-8 with a program on every line\n")


def test_command_line(tmp_path, capsys):
    arguments = f"make -o {tmp_path} --count 10 --val_count 3 --test_count 2 --sequence_length 1024".split()
    assert run_module("tasks.symbolic_language", *arguments) == 0
    out, error = capsys.readouterr()
    assert error == ""
    assert re.fullmatch(
        r"\S+: 10 training and 3 validation problems, \d+\.\d tokens a training problem with pads, 2 tests "
        r"of each family and set\ntrain with --data \S+ --sequence_length 1024 --align_documents "
        r"--batch_tokens 8192\n", out)


@pytest.mark.slow
def test_a_small_model_learns_it(tmp_path):
    make(tmp_path, Task(families=("add",), digits=2, sequence_length=128), 20_000, 200, 100, seed=1)
    found = evaluate(trained(tmp_path, "--steps", "400"), count=100)
    assert found["add", "test"]["joint"][0] > 0.8 and found["add", "test"]["majority"] < 0.1
    assert found["add", "test"]["random"] < 0.02
