"""Whatever is written in a recipe or a genotype: a valid object, or an InputError; no other
exception, nothing executed.
"""

from __future__ import annotations

import json
import string

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lfmcw_app.errors import InputError
from lfmcw_app.recipe import Recipe
from lfmcw_app.recipe_loading import load_recipe, parsed_settings, validate_recipe
from lfmcw_app.search_space.genotype import Genotype, random_genotype
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES

plenty = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def bounded(error):
    """Checks that a message is one that a person can read."""
    assert len(str(error)) < 2000


def genotype(text):
    """What the parser makes of a text; None for an InputError."""
    try:
        found = Genotype.from_json(text)
    except InputError as error:
        return bounded(error)
    assert Genotype.from_json(found.to_json()) == found
    assert len(found.normal) == len(found.reduction) == 2 * found.nodes
    return found


def recipe(path, text):
    """What `--config` makes of a text; None for an InputError."""
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    try:
        found = load_recipe("smoke", config=path)
    except InputError as error:
        return bounded(error)
    assert validate_recipe(yaml.safe_load(found.to_yaml())) == found
    return found


# ------------------------------ genotypes

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
data = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
)
edges = st.lists(
    st.lists(
        st.tuples(st.sampled_from(DARTS_PRIMITIVES) | scalars, st.integers(-1, 4) | scalars).map(
            list
        ),
        min_size=2,
        max_size=2,
    ),
    max_size=3,
)


@plenty
@given(st.text() | st.text(alphabet='{}[]",:0123456789normalreductionskip_connect \n'))
@example("[" * 100_000)
@example("9" * 10_000)
@example('{"normal": ' + "9" * 10_000 + ', "reduction": []}')
@example('{"normal": 1e400, "reduction": NaN}')
@example('{"normal": [], "normal": [], "reduction": []}')
@example("\ud800")
def test_any_text_is_a_genotype_or_an_input_error(text):
    genotype(text)


@plenty
@given(data | st.fixed_dictionaries({"normal": data | edges, "reduction": data | edges}))
@example({"normal": [[["x" * 100_000, 0]] * 2], "reduction": []})
@example({"normal": [[[["skip_connect"], 0], ["skip_connect", True]]], "reduction": []})
def test_any_json_is_a_genotype_or_an_input_error(tree):
    genotype(json.dumps(tree))


@plenty
@given(st.integers(1, 5), st.integers(0, 10**6), st.data())
def test_a_changed_character_leaves_a_genotype_or_an_input_error(nodes, seed, draw):
    text = random_genotype(nodes, seed).to_json()
    assert genotype(text) == random_genotype(nodes, seed)
    place = draw.draw(st.integers(0, len(text) - 1))
    genotype(text[:place] + draw.draw(st.sampled_from(string.printable)) + text[place + 1 :])


# ------------------------------ genotypes in DARTS's notation


def from_darts(text):
    """What the parser makes of a text in DARTS's notation; None for an InputError."""
    try:
        found = Genotype.from_text(text)
    except InputError as error:
        return bounded(error)
    assert Genotype.from_text(found.to_darts()) == found
    return found


source = st.text(alphabet="Genotyp([{}])=,*.'\"\\0123456789 \n\t#:;-+~xrangelistnpreduce_conat")


@plenty
@given(
    st.text().map(lambda text: f"Genotype({text})") | source.map(lambda text: f"Genotype({text}")
)
@example("Genotype(" + "(" * 99_000)
@example("Genotype(normal=" + "~" * 90_000 + "1)")
@example("Genotype(normal=" + "a." * 40_000 + "a)")
@example("Genotype(normal=" + "9" * 10_000 + ")")
@example("Genotype(normal=f'{" + "1" * 5000 + "}')")
@example("Genotype(normal=lambda: (yield))")
@example("Genotype" + "(1)" * 30_000)
def test_any_notation_is_a_genotype_or_an_input_error(text):
    from_darts(text)


@plenty
@given(st.integers(1, 5), st.integers(0, 10**6), st.data())
def test_a_changed_letter_of_the_notation_is_read_or_refused(nodes, seed, draw):
    text = random_genotype(nodes, seed).to_darts()
    assert from_darts(text) == random_genotype(nodes, seed)
    place = draw.draw(st.integers(0, len(text) - 1))
    length = draw.draw(st.integers(0, 30))
    from_darts(text[:place] + draw.draw(source) + text[place + length :])


# ------------------------------ recipes


def leaves(model, prefix=()):
    """The dotted keys of a recipe."""
    for name, value in model.model_dump(by_alias=True).items():
        yield from leaves_of(value, (*prefix, name))


def leaves_of(value, prefix):
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves_of(inner, (*prefix, name))
    else:
        yield prefix


KEYS = [".".join(key) for key in leaves(load_recipe("smoke"))]


def nested(flat):
    tree: dict = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return tree


@plenty
@given(
    st.text()
    | st.text(alphabet="seardh:{}[]&*!|>-?,#%@`'\"0123456789.\n ")
    | st.binary().map(lambda b: b.decode("latin-1"))
)
@example("[" * 50_000)
@example("a: &a [*a]")
@example("search: {hypergradient: &a {name: neumann, step_size: *a}}")
@example("data: &a {search_fractions: *a}")
@example("seed: " + "9" * 10_000)
@example("seed: 2020-13-45")
@example("? {a: b}\n: c")
@example("? [a, b]\n: c")
@example("1: 2")
@example("seed: 0x" + "f" * 10_000)
@example("search: {1: 2}")
@example("null: 1")
@example("seed: !!binary abc")
@example("seed: !!python/object/apply:os.system ['true']")
@example("seed: !!timestamp abc")
@example("<<: 3")
@example("seed: !!int ''")
@example("seed: !!float x")
@example("a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c "
"[*b,*b,*b,*b,*b,*b,*b,*b]\n"
         "d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\nseed: [*d,*d,*d,*d,*d,*d,*d,*d]\n")  # fmt: skip
def test_any_text_is_a_recipe_or_an_input_error(tmp_path, text):
    recipe(tmp_path / "c.yaml", text)


@plenty
@given(st.dictionaries(st.sampled_from(KEYS), data, max_size=3))
@example({"search.hypergradient": {"name": "neumann", "num_terms": 3}})
@example({"search.hypergradient": {"w1": "cg", "default": {"name": "darts", "x": 1}}})
def test_any_value_of_any_key_is_a_recipe_or_an_input_error(tmp_path, flat):
    recipe(tmp_path / "c.yaml", yaml.safe_dump(nested(flat), allow_unicode=False))


@plenty
@given(
    st.sampled_from(KEYS) | st.text(max_size=20),
    st.text(max_size=20) | st.sampled_from(["1", "null", "{}", "[0.5, 0.5]"]),
)
@example("search.channels", "8")
@example(".", "1")
@example("search..channels", "1")
@example("search", "{}")
def test_any_assignment_is_a_recipe_or_an_input_error(key, value):
    try:
        found = load_recipe("smoke", overrides=parsed_settings([f"{key}={value}"]))
    except InputError:
        return
    assert isinstance(found, Recipe)


def test_the_fuzz_reaches_valid_recipes_too(tmp_path):
    assert recipe(tmp_path / "c.yaml", "seed: 3") is not None
    assert len(KEYS) > 40
    with pytest.raises(
        AssertionError
    ):  # of a parser that raised something else this could not be said
        assert recipe(tmp_path / "c.yaml", "seed: x") is not None
