"""Grammars are refused with their place, before llama.cpp would print to stderr, loop or end the process."""

from __future__ import annotations

import time

import pytest

from edgelora.gbnf import MAX_DEPTH, problems


def test_the_grammars_that_llama_cpp_ships_have_no_problems() -> None:
    from llama_cpp import llama_grammar

    shipped = {name: text for name, text in vars(llama_grammar).items() if name.endswith("_GBNF")}
    assert len(shipped) >= 6
    assert {name: problems(text) for name, text in shipped.items()} == dict.fromkeys(shipped, ())


@pytest.mark.parametrize(
    ("grammar", "problem"),
    [
        ("", "empty"),
        ('answer ::= "yes"', "no rule is named root"),
        ('root ::= "yes', 'line 1, column 10: " is not closed'),
        ('root ::= "a\\q"', "line 1, column 10: .*unknown escape"),
        ("root ::= [a-z", r"line 1, column 10: \[ is not closed"),
        ('root ::= "a" |\n  b\n', "line 2, column 3: rule b is not defined"),
        ('root ::= "a"\n  | "b"\n', "line 2, column 3: expected the name of a rule"),
        ('root "a"', "line 1, column 6: expected ::="),
        ('root ::= ("a" | "b"', "expected a \\), found the end"),
        ('root ::= "a" )', "expected the end of rule root, found \\)"),
        ('root ::= "a"\nroot ::= "b"', "line 2, column 1: rule root is defined twice"),
        ("root ::= * ", "nothing before it to repeat"),
        ('root ::= ""?', "nothing before it to repeat"),
        ('root ::= "a"{3,2}', "maximum below its minimum"),
        ('root ::= "a"{2001}', "more than 2000 times"),
        ('root ::= "a"{1,2001}', "more than 2000 times"),
        ('root ::= "a"{100}{100}', "more than 2000 repetitions"),
        ("root ::= <think>", "written by its id"),
        ('root ::= "a\0"', "column 10"),
        ("root ::= \ud800", "half a character"),
        ("root ::= ä", "unexpected 'ä'"),
        ("root ::= " + "(" * (MAX_DEPTH + 1) + '"a"' + ")" * (MAX_DEPTH + 1), "parentheses in one another"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(grammar: str, problem: str) -> None:
    import re

    (found,) = problems(grammar)
    assert re.search(problem, found), found


def test_all_rules_that_are_missing_are_named() -> None:
    assert [problem.split(": ")[1] for problem in problems("root ::= a b\n")] == [
        "rule a is not defined",
        "rule b is not defined",
    ]


@pytest.mark.parametrize(
    ("endless", "twin"),
    [
        ('root ::= root "a" | "b"', 'root ::= "a" root | "b"'),
        ('root ::= gap root "a" | "b"\ngap ::= maybe\nmaybe ::= "" | "c"', 'root ::= gap root "a" | "b"\ngap ::= "c"'),
        ('root ::= ("a"?)*', 'root ::= ("a")*'),
        ('root ::= "a"**', 'root ::= "a"*'),
    ],
)
def test_recursion_without_an_end_is_refused(endless: str, twin: str) -> None:
    """The second one is overlooked by llama.cpp, which then takes memory until it is killed."""
    assert problems(endless)
    assert not problems(twin)


def test_a_rule_of_thousands_of_alternatives_is_refused() -> None:
    def words(count: int) -> str:
        return "root ::= " + " | ".join(f'"{number}"' for number in range(count))

    assert "more than 5000 ways" in problems(words(6000))[0]
    assert not problems(words(2000))


def test_a_grammar_that_can_begin_in_too_many_ways_is_refused_at_once() -> None:
    chain = [f"r{index} ::= r{index + 1} | r{index + 1}" for index in range(60)]
    began = time.perf_counter()
    assert "ways" in problems("\n".join(["root ::= r0", *chain, 'r60 ::= "a"']))[0]
    assert time.perf_counter() - began < 1
    assert not problems("\n".join(["root ::= r0", *chain[-8:], 'r60 ::= "a"']).replace("r52", "r0"))
