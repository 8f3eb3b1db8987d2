"""Coverage-guided fuzzing of the parsers of recipes and genotypes with atheris (`pip install
atheris`; not run by CI).

    python tests/faults/fuzz_parsers.py -max_total_time=60

Options are libFuzzer's. An input that makes a parser raise anything but an InputError ends it with
a traceback and is written to crash-*. The short version with Hypothesis is
tests/property/test_parsers.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import atheris

with atheris.instrument_imports(
    include=["lfmcw_app.recipe", "lfmcw_app.search_space.genotype", "yaml", "json"]
):
    from lfmcw_app.errors import InputError
    from lfmcw_app.plain_yaml import parse_yaml
    from lfmcw_app.recipe import Recipe, validate_recipe
    from lfmcw_app.search_space.genotype import Genotype

GENOTYPES = (Genotype.from_json, Genotype.from_darts)
SEEDS = (
    Recipe().to_yaml(),
    '{"normal": [[["skip_connect", 0], ["none", 1]]], "reduction": []}',
    "Genotype(normal=[('skip_connect', 0), ('max_pool_3x3', 1)], normal_concat=range(2, 3), "
    "reduce=[('skip_connect', 0), ('max_pool_3x3', 1)], reduce_concat=[2])",
)


def one_input(data: bytes) -> None:
    """Gives one input to both parsers."""
    text = atheris.FuzzedDataProvider(data).ConsumeUnicode(len(data))
    for parse in (*GENOTYPES, lambda text: validate_recipe(parse_yaml(text))):
        try:
            parse(text)
        except InputError:
            continue
        except ValueError as error:
            # parse_yaml's own, which its callers turn into an InputError.
            if type(error) is not ValueError or parse in GENOTYPES:
                raise


def main() -> None:
    """Entry point."""
    corpus = Path(sys.argv[1]) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else None
    if corpus is not None:
        corpus.mkdir(exist_ok=True)
        for index, seed in enumerate(SEEDS):
            (corpus / f"seed-{index}").write_text(seed, encoding="utf-8")
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
